"""The part that talks to lm-eval. Importing it takes seconds, so only a running evaluation does."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import datasets
import lm_eval.api.task
import lm_eval.models.huggingface
import torch
from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from slim.errors import SlimError
from slim.evaluation.task_files import data_files, is_local, read_rows
from slim.progress import progress_bar

FEWSHOT_SEED = 1234  # lm-eval's own default, so that figures equal those of its command line


class LoadedModel(HFLM):
    """A model in memory as lm-eval sees it, which shows slim's progress bar and notes the tasks with NaN in them."""

    def __init__(self, model, tokenizer, batch_size: int, max_length: int):
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            softmax_dtype="float32",  # otherwise the model's type, in which bfloat16 has three digits
        )
        self.broken: set[str] = set()
        self._advance = lambda steps: None

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with progress_bar("tasks", len(requests)) as self._advance:
            answers = super().loglikelihood(requests, disable_tqdm=True)
        self._note_nan(requests, (score for score, _ in answers))
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        scores = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._note_nan(requests, scores)
        return scores

    def _model_call(self, inps, *args, **kwargs) -> torch.Tensor:
        self._advance(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _note_nan(self, requests, scores) -> None:
        pairs = zip(requests, scores, strict=True)
        self.broken |= {request.task_name for request, score in pairs if math.isnan(score)}


def evaluate(
    model,
    tokenizer,
    paths: list[Path],
    *,
    limit: int | None,
    num_fewshot: int | None,
    batch_size: int,
    max_length: int,
) -> dict[str, dict]:
    """Run the tasks in the YAML files ``paths``; return task -> metrics, questions, num_fewshot, version.

    Raises ``SlimError`` if a task cannot be built, which mostly means that its data cannot be reached.
    """
    with quiet():
        tasks = {}
        for path in paths:
            task = build_task(path, num_fewshot)
            tasks[task.task_name] = task
        lm = LoadedModel(model, tokenizer, batch_size, max_length)
        # One bootstrap round: the errors of means are computed directly, and 0 would leave those out too.
        found = run_tasks(lm, {"tasks": tasks}, limit=limit, bootstrap_iters=1, log_samples=False)
    return {name: _result(found, name, broken=name in lm.broken) for name in tasks}


def build_task(path: Path, num_fewshot: int | None):
    """Build the lm-eval task of a YAML file; local data are handed over in memory.

    The datasets library keeps JSON files in a cache of its own; in memory there is nothing that could be out of date.
    """
    try:
        config = load_yaml(path)
        files = data_files(path) if is_local(path) else {}
        if files:
            config["custom_dataset"] = partial(_in_memory, files)
            config.pop("dataset_kwargs")
        (task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
    except SlimError:
        raise
    except Exception as error:  # a task file can fail in as many ways as there are loaders and template mistakes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SlimError(
            f"The task in {path.name} cannot be set up: {reason}\n"
            "Its data come from the hub unless they are embedded: without a network, name YAML files of your own."
        ) from error
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:  # as on lm-eval's command line, a fixed 0 stays
        task.set_config(key="num_fewshot", value=num_fewshot)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


def _in_memory(files: dict[str, list[Path]], **_) -> dict[str, datasets.Dataset]:
    return {split: datasets.Dataset.from_list(read_rows(paths)) for split, paths in files.items()}


def _result(found: dict, name: str, broken: bool) -> dict:
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, variant = key.partition(",")
        if variant and isinstance(value, (int, float)):
            metrics[metric if variant == "none" else f"{metric}/{variant}"] = math.nan if broken else float(value)
    return {
        "metrics": metrics,
        "questions": found["n-samples"][name]["effective"],
        "num_fewshot": found["n-shot"][name],
        "version": found["versions"][name],
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from writing logs and progress bars of their own."""
    with ExitStack() as undo:
        for name in ("lm_eval", "datasets"):
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        for module in (lm_eval.api.task, lm_eval.models.huggingface):
            undo.callback(setattr, module, "tqdm", module.tqdm)
            module.tqdm = partial(module.tqdm, disable=True)
        if datasets.utils.logging.is_progress_bar_enabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield

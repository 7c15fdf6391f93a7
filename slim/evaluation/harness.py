"""The part that talks to lm-eval. Importing it takes seconds, so only a running evaluation does."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
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
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from slim.core.console import progress_bar, warn
from slim.core.errors import SlimError
from slim.evaluation.choices import fits, score
from slim.evaluation.documents import document_nll, document_tokens
from slim.evaluation.local_data import use_local_files
from slim.evaluation.task_files import data_files, is_local, read_rows

CPU_BATCH = 32  # answers in one forward pass on a CPU, where larger batches gain nothing
# entries of a document's logits beyond which they are computed in slices: 256 MiB in float32
LOGITS_AT_ONCE = 2**26
LONGEST_SHOWN = 60  # characters of a question in a message


class LoadedModel(HFLM):
    """A model in memory as lm-eval sees it, which shows slim's progress bar and notes the tasks
    with NaN in them.

    Attributes:
        broken: names of the tasks with a score that is NaN.
    """

    def __init__(self, model, tokenizer, batch_size: int | None, max_length: int):
        if not batch_size:
            batch_size = CPU_BATCH if model.device.type == "cpu" else "auto"
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            # otherwise the model's type, in which bfloat16 has three digits
            softmax_dtype="float32",
        )
        self.broken: set[str] = set()
        self._advance = lambda steps: None

    def loglikelihood(self, requests, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with progress_bar("tasks", len(requests)) as self._advance:
            answers = super().loglikelihood(requests, disable_tqdm=True)
        self._note_nan(requests, [score for score, _ in answers])
        return answers

    def _loglikelihood_tokens(self, requests, *args, **kwargs) -> list[tuple[float, bool]]:
        """Score answers; raise ``SlimError`` for those that cannot be, before any is."""
        cut = 0
        for asked, context, tokens in requests:
            if asked is None:  # a window of a document, which lm-eval has cut to fit
                continue
            question, answer = asked
            if not tokens:
                raise SlimError(
                    f"An answer to {shown(question)} is empty. Give every choice a text, or leave "
                    "the question out."
                )
            if not context:
                raise SlimError(
                    f"The question of the answer {shown(answer)} is empty, and the tokenizer has "
                    "no token that begins a text. Give it a text, or leave it out."
                )
            if len(tokens) > self.max_length:
                raise SlimError(
                    f"An answer to {shown(question)} has {len(tokens)} tokens, more than the "
                    f"context of {self.max_length}. Shorten it, or leave the question out."
                )
            # the last token is only predicted, so it needs no place in the context
            if len(context) + len(tokens) > self.max_length + 1:
                cut += 1
        if cut:
            warn(
                f"{cut} of {len(requests)} answers with their questions are longer than the "
                f"context of {self.max_length} tokens: the beginnings of these questions are cut."
            )
        if fits(self.model, requests, self.max_length):
            size = None if self.batch_size == "auto" else int(self.batch_size)
            return score(self.model, requests, size, self._advance)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
        for request in requests:
            settings = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            wanted = settings["max_gen_toks"]
            if wanted >= self.max_length:
                raise SlimError(
                    f"The task {request.task_name} generates max_gen_toks={wanted} tokens, which "
                    f"leaves no room for a question in the context of {self.max_length}. Set "
                    "fewer in generation_kwargs of its file."
                )
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
        # lm-eval holds the logits of a whole window, and their copy in float32
        if self.max_length * self.model.config.vocab_size > LOGITS_AT_ONCE:
            scores = [self._rolling_in_slices(*request.args) for request in requests]
        else:
            with progress_bar("tasks", None) as self._advance:
                scores = super().loglikelihood_rolling(requests, disable_tqdm=True)
        self._note_nan(requests, scores)
        return scores

    def _rolling_in_slices(self, text: str) -> float:
        """Return what ``loglikelihood_rolling`` does, up to rounding, without the logits of a whole
        window at once."""
        first, tokens = document_tokens(self.tokenizer, text)
        return -document_nll(self.model, first, tokens, self.max_length)

    def _model_call(self, inps, *args, **kwargs) -> torch.Tensor:
        self._advance(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _note_nan(self, requests, scores) -> None:
        for request, value in zip(requests, scores, strict=True):
            if math.isnan(value):
                self.broken.add(request.task_name)


def evaluate(
    model,
    tokenizer,
    paths: dict[Path, dict[str, list[Path]]],
    *,
    limit: int | None,
    num_fewshot: int | None,
    seed: int,
    batch_size: int | None,
    max_length: int,
) -> dict[str, dict]:
    """Run tasks on a model in memory.

    Args:
        model: a torch module of transformers.
        tokenizer: of the checkpoint.
        paths: the tasks' YAML files, each with split -> local files that are read instead of the
            hub's data (empty: the hub's).
        limit: number of questions from the start of each task; None for all.
        num_fewshot: solved examples before each question; None for what the task says.
        seed: of the choice of these examples.
        batch_size: answers scored in one forward pass; None for 32 on a CPU and the most that fits
            on a GPU.
        max_length: tokens that the model has room for.

    Returns:
        Task -> ``metrics``, ``questions`` (their number), ``num_fewshot``, ``version`` of the task,
        ``questions_sha256`` and ``records``.

    Raises:
        SlimError: when a task cannot be built, which mostly means that its data cannot be reached,
            or a question cannot be asked.
    """
    with quiet():
        tasks = {}
        for path, files in paths.items():
            task = build_task(path, num_fewshot, files, seed)
            tasks[task.task_name] = task
        lm = LoadedModel(model, tokenizer, batch_size, max_length)
        try:
            # One bootstrap round: the errors of means are computed directly, and 0 would leave
            # those out too.
            results = run_tasks(
                lm, {"tasks": tasks}, limit=limit, bootstrap_iters=1, log_samples=True
            )
        except (SlimError, RuntimeError, OSError, MemoryError):  # torch's, and what is no mistake
            raise
        except Exception as error:  # templates and data fail in as many ways as there are
            raise SlimError(
                f"The tasks {', '.join(tasks)} cannot be asked: {reason_of(error)}\n"
                "A field that a task names may be missing or of another type in its data."
            ) from error
    return {name: _result(results, name, broken=name in lm.broken) for name in tasks}


def shown(text: str) -> str:
    """Return the end of a question for a message: what tells it from others comes last."""
    text = " ".join(text.split())
    if len(text) > LONGEST_SHOWN:
        text = "..." + text[-LONGEST_SHOWN:]
    return repr(text)


def reason_of(error: Exception) -> str:
    """Return the first line of an error, or its name where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return lines[0]


def build_task(path: Path, num_fewshot: int | None, local: dict[str, list[Path]], seed: int):
    """Build the lm-eval task of a YAML file.

    Args:
        path: the YAML file.
        num_fewshot: solved examples before each question; None for what the task says.
        local: split -> local files that are read instead of the hub's data. They are handed over in
            memory: the datasets library keeps JSON files in a cache of its own, and in memory there
            is nothing that could be out of date.
        seed: of the choice of examples.

    Returns:
        The task, with its data.

    Raises:
        SlimError: when its data cannot be reached or do not fit, or hold too few examples.
    """
    files = local
    try:
        config = load_yaml(path)
        if not files and is_local(path):
            files = data_files(path)
        if files:
            config = use_local_files(config, files)
            config["custom_dataset"] = partial(_in_memory, files)
        (task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
    except SlimError:
        raise
    # a task file can fail in as many ways as there are loaders and template mistakes
    except Exception as error:
        raise _not_set_up(path, local, files, reason_of(error)) from error
    # as on lm-eval's command line, a fixed 0 stays
    if num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)
    check_examples(task)
    return task


def _not_set_up(
    path: Path, local: dict[str, list[Path]], files: dict[str, list[Path]], reason: str
) -> SlimError:
    """Return the error for a task that cannot be built, by where its data come from."""
    if local:
        names = ", ".join(map(str, itertools.chain(*local.values())))
        return SlimError(f"{names}: not in the hub's schema of the task in {path.name} ({reason}).")
    if files:
        return SlimError(
            f"The task in {path.name} cannot be set up: {reason}\n"
            "Its data lack something that it names, or hold it in another type."
        )
    return SlimError(
        f"The task in {path.name} cannot be set up: {reason}\n"
        "Its data come from the hub unless they are embedded: without a network, name YAML "
        "files of your own."
    )


def check_examples(task) -> None:
    """Raise ``SlimError`` where a task has fewer solved examples than are asked for."""
    wanted = task.get_config("num_fewshot")
    if not wanted:
        return
    known = len(list(task.fewshot_docs() or []))
    # a question is never its own example, so one more is drawn from those that are asked too
    if known <= wanted:
        raise SlimError(
            f"eval.tasks.num_fewshot={wanted}: the task {task.task_name} has {known} solved "
            f"examples, of which one may be the question. Use at most {max(known - 1, 0)}."
        )


def _in_memory(files: dict[str, list[Path]], **_) -> dict[str, datasets.Dataset]:
    splits = {}
    for split, paths in files.items():
        splits[split] = datasets.Dataset.from_list(read_rows(paths))
    return splits


def _result(results: dict, name: str, broken: bool) -> dict:
    """Return what :func:`evaluate` does for a task, from what lm-eval returned for all of them."""
    samples = results["samples"][name]
    hashes = "".join(sample["doc_hash"] for sample in samples)
    return {
        "records": records(samples),
        "questions_sha256": hashlib.sha256(hashes.encode()).hexdigest(),
        "metrics": _metrics(results["results"][name], broken),
        "questions": results["n-samples"][name]["effective"],
        "num_fewshot": results["n-shot"][name],
        "version": results["versions"][name],
    }


def _metrics(values: dict, broken: bool) -> dict[str, float]:
    """Return the metrics among what lm-eval says of a task; all are NaN where one score was."""
    metrics = {}
    for key, value in values.items():
        # "acc,none": the metric and the filter that the answers went through
        name, _, variant = key.partition(",")
        if not variant or not isinstance(value, (int, float)):
            continue
        if variant != "none":
            name = f"{name}/{variant}"
        # lm-eval takes a NaN for a wrong answer, and the accuracy would look like a poor one
        metrics[name] = math.nan if broken else float(value)
    return metrics


def records(samples: list[dict]) -> list[dict]:
    """Reduce lm-eval's samples to plain JSON.

    Args:
        samples: of one task, as lm-eval logs them.

    Returns:
        Per question ``doc_id``, ``doc_hash``, ``filter`` and its metrics. Those with choices also
        have ``context``, ``choices``, ``scores`` (log-likelihoods in nats) and ``target``;
        generated answers ``context``, ``answer`` and ``target``; documents nothing else.
    """
    rows = []
    for sample in samples:
        row = {
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "filter": sample["filter"],
            **_asked(sample),
        }
        for name in sample["metrics"]:
            row[name] = _plain(sample[name])
        rows.append(row)
    return rows


def _asked(sample: dict) -> dict:
    """Return what was asked and answered, by the kind of question."""
    arguments = sample["arguments"]
    answers = sample["filtered_resps"]
    if len(arguments[0]) == 1:  # a whole document
        return {}
    if isinstance(arguments[0][1], str):  # the second argument of a generation is its settings
        return {
            "context": arguments[0][0],
            "choices": [choice for _, choice in arguments],
            "scores": [score for score, *_ in answers],
            "target": _plain(sample["target"]),
        }
    return {
        "context": arguments[0][0],
        "answer": _plain(answers[0]),
        "target": _plain(sample["target"]),
    }


def _plain(value):
    """Reduce numpy numbers and tuples to plain JSON values."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        return value.item()
    return value


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
        # finding the batch size is told by print
        undo.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if datasets.utils.logging.is_progress_bar_enabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield

"""Accuracies on question sets through lm-eval, on the model that is already in memory.

An answer is scored by its log-likelihood after the question: ``acc`` takes the highest sum over its
tokens, ``acc_norm`` the highest sum per character of the answer. The figures are lm-eval's own;
slim finds the task, hands local data over in memory, and keeps a NaN a NaN."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.core.settings import require_number
from slim.evaluation import task_files
from slim.evaluation.local_data import check_rows, local_files

FEWSHOT_SEED = 1234  # lm-eval's own default, so that figures equal those of its command line

# what a task's accuracy depends on, among what the harness returns
PROTOCOL = ("questions", "num_fewshot", "version", "questions_sha256")


@dataclass
class Tasks:
    """Which tasks, and how much of them.

    Attributes:
        names: embedded tasks, tasks that lm-eval ships, or YAML files.
        limit: number of questions from the start of each task; None for all.
        num_fewshot: solved examples before each question; None for what the task says.
        batch_size: answers scored in one forward pass; None for the most that fits on a GPU, 32 on
            a CPU. Changes the speed, and the result only by rounding.
        local_data: folder with the questions of stock tasks, one ``TASK.jsonl`` each in the hub's
            schema; None for the hub's.
        seed: of the choice of few-shot examples; the default is lm-eval's own.
    """

    cache_name: ClassVar[str] = "Tasks"

    names: list[str] = field(default_factory=list)
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = field(default=None, metadata={"cache_key": False})
    local_data: str | None = None
    seed: int = FEWSHOT_SEED

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            self.names = [self.names]
        self.names = list(self.names or [])  # a list of OmegaConf, or None
        named = all(isinstance(name, str) and name for name in self.names)
        # first whether they are texts: other things may have no hash
        if not named or len(set(self.names)) != len(self.names):
            raise SlimError(
                "eval.tasks.names takes different task names, for example "
                "eval.tasks.names=[tiny_facts]."
            )
        require_number("eval.tasks.seed", self.seed, 0, integer=True)
        for name, low in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
            if getattr(self, name) is not None:
                require_number(f"eval.tasks.{name}", getattr(self, name), low, integer=True)

    def cache_key(self) -> dict:
        tasks = []
        for name in self.names:
            tasks.append({**task_files.fingerprint(name), **self._local_checksums(name)})
        return {
            "tasks": tasks,
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "seed": self.seed,
            "lm_eval": task_files.harness_version(),
        }

    def local_files(self, path: Path) -> dict[str, list[Path]]:
        """Return split -> local files for the task file ``path``; empty where ``local_data`` does
        not concern it."""
        if self.local_data is None or task_files.is_local(path):
            return {}
        return local_files(task_files.task_name(path), self.local_data, task_files.read_plain(path))

    def _local_checksums(self, name: str) -> dict:
        files = self.local_files(task_files.find_task(name))
        # the hub's data are named by the task alone; its identity stays without the key
        if not files:
            return {}
        checksums = {}
        for split, paths in files.items():
            checksums[split] = [sha256(path) for path in paths]
        return {"local_data": checksums}

    def check(self) -> None:
        """Raise ``SlimError`` if a task does not exist, or a local one lacks its data or is called
        like another."""
        seen: set[str] = set()
        for name in self.names:
            path = task_files.find_task(name)
            local = task_files.is_local(path)
            check_rows(path, task_files.data_files(path) if local else self.local_files(path))
            if local:  # named by its file so far
                name = task_files.task_name(path)
            # results are kept by these names
            if name in seen:
                raise SlimError(
                    f"eval.tasks.names holds two tasks called '{name}'. Rename one of them."
                )
            seen.add(name)

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Ask all questions of all tasks.

        Args:
            model: a torch module of transformers.
            tokenizer: of the checkpoint.
            context_length: tokens that the model has room for.

        Returns:
            ``metrics``: per task ``<task>/acc`` and the like, and their mean ``tasks/acc``;
            ``protocol``: what each depends on; ``records``: every question of every task with the
            scores of its answers, as :func:`slim.evaluation.harness.records` gives them.
        """
        # imported here: lm-eval takes seconds
        from slim.evaluation.harness import evaluate

        # by file: two names of one file are one task, which check() refuses
        paths = {}
        for name in self.names:
            path = task_files.find_task(name)
            paths[path] = self.local_files(path)
        results = evaluate(
            model,
            tokenizer,
            paths,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            seed=self.seed,
            batch_size=self.batch_size,
            max_length=context_length,
        )
        metrics, protocol, records = {}, {}, {}
        for task, result in results.items():
            for name, value in result["metrics"].items():
                metrics[f"{task}/{name}"] = value
            protocol[task] = {key: result[key] for key in PROTOCOL}
            records[task] = result["records"]
        # tasks without choices have none
        accuracies = [value for name, value in metrics.items() if name.endswith("/acc")]
        if accuracies:
            metrics["tasks/acc"] = mean(accuracies)
        protocol["lm_eval"] = task_files.harness_version()
        return {"metrics": metrics, "protocol": protocol, "records": records}


def mean(values: list[float]) -> float:
    """Return the mean; NaN if one of them is NaN."""
    if any(map(math.isnan, values)):
        return math.nan
    return statistics.fmean(values)

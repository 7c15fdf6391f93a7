"""Accuracies on question sets through lm-eval, on the model that is already in memory.

An answer is scored by its log-likelihood after the question: ``acc`` takes the highest sum over its tokens,
``acc_norm`` the highest sum per character of the answer. The figures are lm-eval's own; slim finds the task, hands
local data over in memory, and keeps a NaN a NaN.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from slim.errors import SlimError
from slim.evaluation import task_files
from slim.settings import require_number


@dataclass
class Tasks:
    """Which tasks, and how much of them.

    names: embedded tasks, tasks that lm-eval ships, or YAML files.
    limit: number of questions from the start of each task; None for all.
    num_fewshot: solved examples before each question; None for what the task says.
    batch_size: answers scored in one forward pass. Changes the speed, and the result only by rounding.
    """

    names: list[str] = field(default_factory=list)
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = field(default=32, metadata={"identity": False})

    def __post_init__(self) -> None:
        self.names = [self.names] if isinstance(self.names, str) else list(self.names or [])
        if not all(isinstance(name, str) and name for name in self.names) or len(set(self.names)) != len(self.names):
            raise SlimError("eval.tasks.names takes different task names, for example eval.tasks.names=[tiny_facts].")
        require_number("eval.tasks.batch_size", self.batch_size, 1, integer=True)
        for name, low in (("limit", 1), ("num_fewshot", 0)):
            if getattr(self, name) is not None:
                require_number(f"eval.tasks.{name}", getattr(self, name), low, integer=True)

    def identity(self) -> dict:
        tasks = [task_files.fingerprint(name) for name in self.names]
        version = task_files.harness_version()
        return {"tasks": tasks, "limit": self.limit, "num_fewshot": self.num_fewshot, "lm_eval": version}

    def check(self) -> None:
        """Raise ``SlimError`` if a task does not exist, or a local one lacks its data or is called like another."""
        seen: set[str] = set()
        for name in self.names:
            path = task_files.find_task(name)
            if task_files.is_local(path):
                task_files.data_files(path)
                name = task_files.task_name(path)
            if name in seen:
                raise SlimError(f"eval.tasks.names holds two tasks called '{name}'. Rename one of them.")
            seen.add(name)

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Return ``{"metrics": {...}, "protocol": {...}}``: per task ``<task>/acc`` and the like, and ``tasks/acc``."""
        from slim.evaluation.harness import evaluate

        paths = [task_files.find_task(name) for name in self.names]
        found = evaluate(
            model,
            tokenizer,
            paths,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            batch_size=self.batch_size,
            max_length=context_length,
        )
        metrics, protocol = {}, {}
        for task, result in found.items():
            metrics.update({f"{task}/{name}": value for name, value in result["metrics"].items()})
            protocol[task] = {key: result[key] for key in ("questions", "num_fewshot", "version")}
        accuracies = [value for name, value in metrics.items() if name.endswith("/acc")]
        if accuracies:
            metrics["tasks/acc"] = mean(accuracies)
        return {"metrics": metrics, "protocol": {**protocol, "lm_eval": task_files.harness_version()}}


def mean(values: list[float]) -> float:
    """Return the mean; NaN if one of them is NaN."""
    return math.nan if any(math.isnan(value) for value in values) else statistics.fmean(values)

"""How long a chain will take: counted work, times the speed of this machine, corrected by how wrong
earlier estimates here were.

``machine.json`` in the store keeps, per machine, the measured rate and for each kind of work the
last ratios of truth to estimate. The first estimate of a kind is rough, the next ones are not.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from slim.checkpoints.result import Step
from slim.checkpoints.stage import Stage
from slim.checkpoints.store import digest
from slim.core.console import duration
from slim.core.errors import SlimError
from slim.core.hardware import versions
from slim.core.io import read_json, write_json
from slim.core.settings import cache_name
from slim.models.accounting import macs_per_token

if TYPE_CHECKING:
    from slim.models.spec import ModelSpec

FILE = "machine.json"
SIZE = 512  # rows and columns of the matrices that are multiplied to measure the rate
MEASURES = 5  # times that they are, of which the median counts
MEASURE_SECONDS = 0.04  # of work, each time
REMEMBERED = 5  # ratios kept per kind of work
# Passes over the model per token of its text, each 2 operations per multiply-accumulate: a forward
# pass is one, a backward pass two. Quantization runs a block before and after it is changed.
PASSES = {"prune": 3, "quantize": 2, "tune": 3, "distill": 4, "student": 1}
OVERHEAD = 2.0  # seconds to load libraries and weights
# Of a text whose length its settings do not tell, and of a question with all its answers.
TEXT_TOKENS = 300_000
QUESTION_TOKENS = 60
QUESTIONS = 1000  # of a task, where its settings do not tell
BYTES_PER_TOKEN = 4
# A generated token reads all weights for itself: about so much slower than one that is read.
GENERATED = 8
WAITED = Path("/proc/self/schedstat")  # of the main thread, where the system says it
# the parts of an evaluation, by the names of their settings
MEASURED = ("perplexity", "documents", "tasks", "answers", "prompts", "judge", "speed", "extra")
# settings that make one kind of work take another time than the count of its tokens says
COSTLY = ("reconstruct", "refine", "act_order", "bits")


@dataclass
class Clock:
    """Estimates for one machine.

    Attributes:
        path: the file in the store.
        key: which machine, device and version of torch.
        rate: operations per second, as measured.
        ratios: kind of work -> the last ratios of truth to estimate.
    """

    path: Path
    key: str
    rate: float
    ratios: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def read(cls, store: Path, device: str) -> Clock:
        """Read what is known of this machine; measure it where nothing is.

        Args:
            store: root of the store. Nothing is written where it does not exist yet.
            device: ``cpu`` or ``cuda``.
        """
        path = store / FILE
        key = machine_key(device)
        record = _records(path).get(key)
        if record is not None:
            return cls(path, key, record["rate"], record["ratios"])
        clock = cls(path, key, measured_rate(device))
        if store.is_dir():
            clock.save()
        return clock

    def save(self) -> None:
        """Keep what is known of this machine. A store that may only be read stays as it is."""
        records = _records(self.path)
        records[self.key] = {"rate": self.rate, "ratios": self.ratios}
        try:
            write_json(self.path, records)
        except OSError:
            return

    def stage_seconds(self, stage: Stage, spec: ModelSpec) -> float:
        """Estimate the time of a stage.

        Args:
            stage: with its settings.
            spec: the model that it works on.
        """
        return self._corrected(work_name(stage), self._counted(stage_operations(stage, spec)))

    def evaluation_seconds(self, evaluation: object, spec: ModelSpec) -> float:
        """Estimate the time to measure one checkpoint.

        Args:
            evaluation: its settings; None for no measuring.
            spec: the model.
        """
        name = evaluation_name(evaluation)
        if not name:
            return 0.0
        tokens = evaluation_tokens(evaluation)
        return self._corrected(name, self._counted(2.0 * macs_per_token(spec) * tokens))

    def learn(self, name: str, estimate: float, seconds: float) -> None:
        """Take note of how long something took.

        Args:
            name: the kind of work.
            estimate: seconds, as estimated before.
            seconds: the truth, see :class:`Stopwatch`.
        """
        ratio = self._ratio(name) * seconds / max(estimate, 1e-9)
        self.ratios[name] = [*self.ratios.get(name, []), round(ratio, 4)][-REMEMBERED:]
        self.save()

    def knows(self, name: str) -> bool:
        """Whether a kind of work has run here before."""
        return name in self.ratios

    def _counted(self, operations: float) -> float:
        return OVERHEAD + operations / self.rate

    def _corrected(self, name: str, seconds: float) -> float:
        return seconds * self._ratio(name)

    def _ratio(self, name: str) -> float:
        return median(self.ratios.get(name) or [1.0])


def time_line(steps: list[Step], evaluation: object, store: Path, device: str) -> str:
    """Say how long what is missing of a plan will take, in one line.

    Args:
        steps: the plan.
        evaluation: how every checkpoint is measured, None for not at all.
        store: root of the store.
        device: ``cpu`` or ``cuda``.
    """
    clock = Clock.read(store, device)
    parts = []
    total = 0.0
    rough = False
    for number, step in enumerate(steps):
        if not isinstance(step.stage, Stage) or step.cached:
            continue
        parent = steps[number - 1] if number else step
        seconds = clock.stage_seconds(step.stage, parent.spec)
        parts.append(f"{step.label} {duration(seconds)}")
        total += seconds
        rough = rough or not clock.knows(work_name(step.stage))
    if evaluation_name(evaluation):
        # what is measured already is known by the files' content only, so all of it is counted
        seconds = sum(clock.evaluation_seconds(evaluation, step.spec) for step in steps)
        parts.append(f"measuring up to {duration(seconds)}")
        total += seconds
        rough = rough or not clock.knows(evaluation_name(evaluation))
    if not parts:
        return "Nothing has to be run."
    note = "; a rough estimate, until it has run here once" if rough else ""
    return f"Time: about {duration(total)} ({', '.join(parts)}{note})."


def stage_operations(stage: Stage, spec: ModelSpec) -> float:
    """Count the operations of a stage's passes over the model and of reading and writing it.

    Args:
        stage: with its settings.
        spec: the model that it works on.
    """
    passes = PASSES.get(stage.kind, 2)
    touched = 100.0 * spec.parameters()  # loading, rounding and writing a weight
    if hasattr(stage, "refine"):  # GPTQ: each weight's error goes to those behind it in its row
        rounds = 1 + _number(stage, "refine")
        touched += 2.0 * rounds * spec.hidden_size * spec.parameters()
    return 2.0 * passes * macs_per_token(spec) * stage_tokens(stage) + touched


def stage_tokens(stage: Stage) -> float:
    """Return how many tokens a stage reads, as far as its settings tell."""
    steps = _number(stage, "steps")
    if steps:
        return steps * (_number(stage, "batch_tokens") or 1) * (_number(stage, "accumulation") or 1)
    calibration = getattr(stage, "calibration", None)
    samples = _number(stage, "samples") or _number(calibration, "samples")
    length = _number(stage, "length") or _number(calibration, "length")
    return samples * length


def work_name(stage: Stage) -> str:
    """Name the kind of work whose time is comparable: the method, and the settings that change its
    time beyond what is counted."""
    words = [stage.kind, cache_name(stage)]
    for setting in COSTLY:
        value = getattr(stage, setting, None)
        if value is True or isinstance(value, str) or (setting == "refine" and value):
            words.append(f"{setting}={value}")
    return " ".join(words)


def evaluation_name(evaluation: object) -> str:
    """Name the kind of measuring whose time is comparable, by its parts; empty for none."""
    parts = [part for part in MEASURED if getattr(evaluation, part, None)]
    if not parts:
        return ""
    engine = getattr(evaluation, "engine", None)
    if engine is not None:
        parts.append(engine)
    return " ".join(["evaluate", *parts])


def evaluation_tokens(evaluation: object) -> float:
    """Count the tokens that measuring one checkpoint takes, about; a generated one as several.

    Args:
        evaluation: its settings.
    """
    tokens = 0.0
    for name in ("perplexity", "documents"):
        tokens += text_tokens(getattr(evaluation, name, None))
    tasks = getattr(evaluation, "tasks", None)
    if tasks is not None:
        tokens += len(tasks.names) * (tasks.limit or QUESTIONS) * QUESTION_TOKENS
    generated = len(evaluation.prompts) * evaluation.new_tokens
    speed = evaluation.speed
    if speed is not None:
        runs = (len(speed.prompts) or speed.count) * (speed.repeats + speed.warmup)
        tokens += runs * _largest(speed.prompt_length)
        generated += runs * _largest(speed.new_tokens)
    answers = getattr(evaluation, "answers", None)
    if answers is not None:
        generated += (_number(answers, "limit") or QUESTIONS) * _number(answers, "new_tokens")
    return tokens + GENERATED * generated


def text_tokens(text: object) -> float:
    """Return about how many tokens of a text are measured, 0 for none.

    Args:
        text: settings of a perplexity.
    """
    if text is None:
        return 0.0
    size = float(TEXT_TOKENS)
    path = text.path
    if path is not None and path.is_file():
        size = path.stat().st_size / BYTES_PER_TOKEN
    limit, window = _number(text, "limit"), _number(text, "window")
    if limit and window:
        return min(size, limit * window)
    return size


def _largest(value: object) -> float:
    """Return a number, or the largest of a list of them."""
    if isinstance(value, (list, tuple)):
        return max(value, default=0)
    return value or 0


def machine_key(device: str) -> str:
    """Name this machine without loading torch: processor, its threads, device and version."""
    threads = os.environ.get("OMP_NUM_THREADS") or os.cpu_count()
    machine = [platform.node(), platform.machine(), str(threads), versions().get("torch"), device]
    return digest(["machine 2", *machine])  # 2: what is counted and measured has changed


def measured_rate(device: str) -> float:
    """Measure how many float32 operations per second the device does on small matrices.

    On a CPU the time of the process counts, which is the same whatever else is running.
    """
    import torch

    clock, threads = time.perf_counter, 1
    if device == "cpu":  # of all threads together
        clock, threads = time.process_time, torch.get_num_threads()
    matrix = torch.ones(SIZE, SIZE, device=device)
    (matrix @ matrix).sum().item()  # the first product loads what it needs
    rates = []
    for _ in range(MEASURES):
        started = clock()
        count = 0
        elapsed = 0.0
        while elapsed < MEASURE_SECONDS * threads:
            (matrix @ matrix).sum().item()  # a sum that is read waits for the device
            count += 1
            elapsed = clock() - started
        rates.append(2.0 * SIZE**3 * count * threads / elapsed)
    return median(rates)


class Stopwatch:
    """Seconds since it was made, without those that this process was ready to work and others held
    the processors: what is learnt under load is true without it."""

    def __init__(self):
        self._started = time.monotonic()
        self._waited = seconds_waited()

    def seconds(self) -> float:
        waited = seconds_waited() - self._waited
        return max(time.monotonic() - self._started - waited, 0.0)


def seconds_waited() -> float:
    """Return how long the main thread has waited for a processor so far; 0 where the system does
    not say."""
    try:
        return int(WAITED.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _records(path: Path) -> dict[str, Any]:
    """Return what is kept of all machines; nothing where the file is damaged: it is made again."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except SlimError:
        return {}


def _number(holder: object, name: str) -> float:
    """Return a setting that is a number, 0 for one that is missing or something else."""
    value = getattr(holder, name, None)
    if isinstance(value, (int, float)):
        return value
    return 0

"""The chain of stages from a source to a small model: what is there is used, what is missing is made, all is measured.

The pipeline knows nothing of methods. It names each result by a hash of the stage's settings and version and of the
parent's hash, so the same stage after the same parent is never computed twice.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slim.accounting import macs_per_token
from slim.architecture import ModelDescription
from slim.checkpoint import Checkpoint
from slim.errors import SlimError
from slim.evaluation.energy import stage_energy
from slim.machine import available_memory, fingerprint, free_disk, git_commit, versions
from slim.progress import console
from slim.source import Source, verified_checksums
from slim.stage import Context, Stage
from slim.store import Store, digest, write_manifest
from slim.training import distributed

if TYPE_CHECKING:
    from slim.evaluation.evaluation import Evaluation
    from slim.tracking import Tracker


@dataclass
class Step:
    """One row of the plan: a stage (or the source), what it will give, and whether it is there already."""

    label: str
    stage: Stage | Source
    description: ModelDescription
    digest: str | None = None
    folder: Path | None = None
    cached: bool = False
    peak_bytes: int = 0


@dataclass
class Result:
    """A checkpoint of the chain with its figures."""

    label: str
    checkpoint: Checkpoint
    digest: str
    cached: bool
    seconds: float
    content: str = ""  # digest of the files themselves, wherever they came from
    facts: dict = field(default_factory=dict)
    quality: dict = field(default_factory=dict)
    speed: dict = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return self.checkpoint.description.parameters()

    @property
    def metrics(self) -> dict[str, float]:
        """All figures of the checkpoint under the names they are tracked by."""
        description = self.checkpoint.description
        figures = {
            "parameters": self.parameters,
            "bytes_on_disk": self.checkpoint.bytes_on_disk,
            "macs_per_token": macs_per_token(description),
        }
        return {**figures, **self.quality.get("metrics", {}), **self.speed.get("metrics", {})}


@dataclass
class Pipeline:
    """A source, the stages behind it, and how each checkpoint is measured.

    model: where the chain begins. stages: in their order. evaluation: protocol for every checkpoint, or None.
    store: where results are kept. device: ``cpu`` or ``cuda``. ignore_limits: go on where the plan exceeds disk or memory.
    """

    model: Source | Stage
    stages: list[Stage]
    evaluation: Evaluation | None
    store: Store
    device: str = "cpu"
    ignore_limits: bool = False
    _verified: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    def plan(self) -> list[Step]:
        """Describe every step without doing any work; raises ``SlimError`` for whatever cannot work."""
        steps = [self._first_step()]
        for stage in self.stages:
            parent = steps[-1]
            stage.check(parent.description)
            steps.append(self._step(stage, parent))
        if self.evaluation is not None:
            for step in steps:
                self.evaluation.check(step.description)
        return steps

    def _first_step(self) -> Step:
        description = self.model.describe()
        if isinstance(self.model, Stage):
            name = digest([self.model.identity(), self.model.version])
            folder = self.store.stage_folder(self.model.kind, name)
            peak = self.model.peak_bytes(description, self.device)
            return Step(label(self.model), self.model, description, name, folder, folder.is_dir(), peak)
        local = self.model.local_folder()
        if local is None:
            return Step(self.model.label, self.model, description)
        checkpoint = self.model.resolve()
        return Step(self.model.label, self.model, description, self._source_digest(checkpoint), local, True)

    def _source_digest(self, checkpoint: Checkpoint) -> str:
        if checkpoint.folder not in self._verified:  # reading a large model once is enough
            self._verified[checkpoint.folder] = digest(verified_checksums(checkpoint))
        return self._verified[checkpoint.folder]

    def _step(self, stage: Stage, parent: Step) -> Step:
        description = stage.expect(parent.description)
        peak = stage.peak_bytes(parent.description, self.device)
        step = Step(label(stage), stage, description, peak_bytes=peak)
        if parent.digest is not None:
            step.digest = stage_digest(stage, parent.digest)
            step.folder = self.store.stage_folder(stage.kind, step.digest)
            step.cached = step.folder.is_dir()
        return step

    def check_limits(self, steps: list[Step]) -> None:
        """Raise ``SlimError`` if the stages still to run need more disk or memory than there is."""
        problem = None if self.ignore_limits else self.limit_problem(steps)
        if problem:
            raise SlimError(f"{problem} Use less, or add ignore_limits=true to try all the same.")

    def limit_problem(self, steps: list[Step]) -> str | None:
        """Say what the stages still to run lack: disk or memory, how much is needed, free and missing; None if nothing."""
        missing = [step for step in steps if isinstance(step.stage, Stage) and not step.cached]
        if not missing:
            return None
        disk, free = sum(step.description.weight_bytes() for step in missing), free_disk(self.store.root)
        if disk > free:
            return (
                f"The results need about {gigabytes(disk)} on disk, and {gigabytes(free)} are free at {self.store.root}: "
                f"{gigabytes(disk - free)} are missing (store=FOLDER chooses another place)."
            )
        worst, memory = max(missing, key=lambda step: step.peak_bytes), available_memory(self.device)
        if memory is not None and worst.peak_bytes > memory:
            return (
                f"'{worst.label}' needs about {gigabytes(worst.peak_bytes)} of memory, and {gigabytes(memory)} are free on "
                f"{self.device}: {gigabytes(worst.peak_bytes - memory)} are missing."
            )
        return None

    def run(self, tracker: Tracker | None = None) -> list[Result]:
        """Run what is not there yet, evaluate every checkpoint, and return the source and all results in order."""
        self.check_limits(self.plan())
        results: list[Result] = []
        for stage in [self.model, *self.stages]:
            started = time.monotonic()
            result, curves = self._make(stage, results[-1] if results else None)
            result.seconds = time.monotonic() - started
            self._evaluate(result)
            results.append(result)
            if tracker is not None:
                tracker.log_result(result, stage, curves)
        return results

    def _make(self, stage: Source | Stage, parent: Result | None) -> tuple[Result, list]:
        if isinstance(stage, Source):
            checkpoint = stage.resolve()
            name = self._source_digest(checkpoint)
            return Result(stage.label, checkpoint, name, True, 0.0, content=name), []
        name = stage_digest(stage, parent.digest) if parent else digest([stage.identity(), stage.version])
        folder = self.store.stage_folder(stage.kind, name)
        with self.store.lock(folder):
            checkpoint = self.store.find(folder)
            cached = checkpoint is not None
            if not cached:
                self._run_stage(stage, parent, name, folder)
                checkpoint = Checkpoint(folder)
        manifest = checkpoint.manifest
        content = digest(manifest["checksums"])
        return Result(label(stage), checkpoint, name, cached, 0.0, content, manifest["facts"]), manifest["curves"]

    def _run_stage(self, stage: Stage, parent: Result | None, name: str, folder: Path) -> None:
        console().print(f"[bold]{label(stage)}[/] ...", highlight=False)
        curves: list = []
        context = Context(
            self.device,
            metric=lambda key, value, at=None: curves.append([key, value, at]),
            work=self.store.work_folder(folder),
        )
        started = time.time()
        if stage.together:
            distributed.call({"stage": self._number(stage), "source": str(parent.checkpoint.folder), "work": str(context.work)})
        with self.store.writing(folder) as partial:
            used: dict = {}
            with stage_energy(getattr(self.evaluation, "energy", None), self.device, used):
                facts = stage.run(parent.checkpoint.folder if parent else None, partial, context)
            facts = {**facts, **used}
            manifest = {
                "kind": stage.kind,
                "method": type(stage).__name__,
                "settings": stage.identity(),
                "version": stage.version,
                "hash": name,
                "lineage": [*lineage(parent), {"label": label(stage), "hash": name}],
                "versions": versions(),
                "git_commit": git_commit(),
                "seconds": round(time.time() - started, 3),
                "facts": facts,
                "curves": curves,
            }
            write_manifest(partial, manifest)

    def _number(self, stage: Stage) -> int:
        return next(number for number, own in enumerate(self.stages) if own is stage)

    def _evaluate(self, result: Result) -> None:
        """Fill in quality (a fact about a checkpoint) and speed (one about a checkpoint on a machine)."""
        if self.evaluation is None:
            return
        evaluation, model = self.evaluation, result.checkpoint.description
        quality = [evaluation.quality_identity(), self.device, evaluation.quality_dtype(model, self.device)]
        speed = [evaluation.speed_identity(), evaluation.speed_dtype(model, self.device), fingerprint(self.device)]
        keys = {
            "quality": digest(["quality", result.content, *quality]),
            "speed": digest(["speed", result.content, self.device, *speed]),
        }
        files = {part: self.store.evaluation_file(key) for part, key in keys.items()}
        with self.store.lock(files["quality"]):
            found = {part: self.store.find_evaluation(path) for part, path in files.items()}
            missing = {part for part, figures in found.items() if figures is None}
            if missing:
                from slim.evaluation.run import measure

                console().print(f"[dim]evaluating {result.label} ...[/]", highlight=False)
                measured = measure(
                    result.checkpoint.folder, evaluation, self.device,
                    quality="quality" in missing, speed="speed" in missing,
                )  # fmt: skip
                for part in missing:
                    found[part] = measured[part] or {}
                    self.store.write_evaluation(files[part], found[part])
        result.quality, result.speed = found["quality"], found["speed"]


def label(stage: Stage) -> str:
    """Name a stage in tables: its kind and method."""
    return f"{stage.kind} {type(stage).__name__.lower()}"


def stage_digest(stage: Stage, parent: str) -> str:
    """Name the result of ``stage`` after the result named ``parent``."""
    return digest([stage.kind, stage.identity(), stage.version, parent])


def lineage(parent: Result | None) -> list[dict]:
    """Return the chain up to ``parent`` as recorded in its manifest; a foreign checkpoint is one entry."""
    if parent is None:
        return []
    return parent.checkpoint.manifest.get("lineage") or [{"label": parent.label, "hash": parent.digest}]


def gigabytes(count: float) -> str:
    """Show bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

"""The chain of stages from a source to a small model: what is there is used, what is missing is
made, all is measured.

The pipeline knows nothing of methods. It names each result by a hash of the stage's settings and
version and of the parent's hash, so the same stage after the same parent is never computed twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slim.chain.estimate import Clock, Stopwatch, evaluation_name, work_name
from slim.chain.ready import text_problem
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.result import Result, Step
from slim.checkpoints.source import Source, verified_checksums
from slim.checkpoints.stage import Context, Expected, Stage
from slim.checkpoints.store import Store, digest, write_manifest
from slim.core import processes
from slim.core.console import activity, say
from slim.core.errors import SlimError
from slim.core.hardware import available_memory, fingerprint, free_disk, git_commit, versions
from slim.core.settings import cache_name, spoken_name
from slim.core.text import gigabytes
from slim.evaluation.energy import stage_energy
from slim.evaluation.machine import machine_dtype
from slim.pruning.carried_mask import carried_mask
from slim.quantization.storage import weight_bytes

if TYPE_CHECKING:
    from slim.evaluation.evaluation import Evaluation
    from slim.models.spec import ModelSpec
    from slim.tracking.tracker import Tracker


@dataclass
class Pipeline:
    """A source, the stages behind it, and how each checkpoint is measured.

    Attributes:
        model: where the chain begins.
        stages: in their order.
        evaluation: protocol for every checkpoint, None for no measuring.
        store: where results are kept.
        device: ``cpu`` or ``cuda``.
        ignore_limits: whether to start where the plan exceeds disk or memory.
    """

    model: Source | Stage
    stages: list[Stage]
    evaluation: Evaluation | None
    store: Store
    device: str = "cpu"
    ignore_limits: bool = False
    _verified: dict[Path, str] = field(default_factory=dict, init=False, repr=False)

    def plan(self) -> list[Step]:
        """Describe every step without doing any work.

        Returns:
            The source and the result of each stage in order.

        Raises:
            SlimError: when a stage cannot work on what the one before it gives.
        """
        steps = [self._first_step()]
        for number, stage in enumerate(self.stages):
            parent = steps[-1]
            stage.look_ahead(parent.spec, self.stages[number + 1 :])
            # against the planned model: a mistake in the last stage is found before the first runs
            stage.check(parent.spec)
            steps.append(self._step(stage, parent))
        if self.evaluation is not None:
            for step in steps:
                self.evaluation.check(step.spec)
        return steps

    def _first_step(self) -> Step:
        spec = self.model.describe()
        if isinstance(self.model, Stage):
            name = digest([self.model.cache_key(), self.model.version])
            folder = self.store.stage_folder(self.model.kind, name)
            peak = self.model.peak_bytes(spec, self.device)
            return Step(label(self.model), self.model, spec, name, folder, folder.is_dir(), peak)
        local = self.model.local_folder()
        if local is None:  # on the hub: a plan fetches no weights, so the digest is unknown
            return Step(self.model.label, self.model, spec)
        checkpoint = self.model.resolve()
        return Step(
            self.model.label, self.model, spec, self._source_digest(checkpoint), local, True
        )

    def _source_digest(self, checkpoint: Checkpoint) -> str:
        if checkpoint.folder not in self._verified:  # reading a large model once is enough
            self._verified[checkpoint.folder] = digest(verified_checksums(checkpoint))
        return self._verified[checkpoint.folder]

    def _step(self, stage: Stage, parent: Step) -> Step:
        spec = stage.output_spec(parent.spec)
        peak = stage.peak_bytes(parent.spec, self.device)
        step = Step(label(stage), stage, spec, peak_bytes=peak)
        if parent.digest is not None:
            step.digest = stage_digest(stage, parent.digest)
            step.folder = self.store.stage_folder(stage.kind, step.digest)
            step.cached = step.folder.is_dir()
        return step

    def check_limits(self, steps: list[Step]) -> None:
        """Raise ``SlimError`` if the stages still to run need more disk or memory than there is."""
        if self.ignore_limits:
            return
        problem = self.limit_problem(steps)
        if problem:
            raise SlimError(f"{problem} Use less, or add ignore_limits=true to try all the same.")

    def text_problem(self, steps: list[Step]) -> str | None:
        """Say which texts cannot be had that a run of ``steps`` will need; None if it has all."""
        evaluation = self.evaluation
        if all(self._is_measured(step) for step in steps):
            evaluation = None
        return text_problem(steps, evaluation)

    def _is_measured(self, step: Step) -> bool:
        """Whether the quality of a planned checkpoint is known, as far as a plan can tell."""
        if self.evaluation is None:
            return True
        if not step.cached or step.folder is None:
            return False
        content = step.digest
        if isinstance(step.stage, Stage):
            try:
                content = digest(Checkpoint(step.folder).manifest["checksums"])
            except (SlimError, KeyError):  # damaged, so it will be made again
                return False
        if self.evaluation.kl:  # its name needs what it is compared with, which is not made yet
            return True
        return self._quality_file(content, step.spec).is_file()

    def limit_problem(self, steps: list[Step]) -> str | None:
        """Say what the stages still to run lack: disk or memory, how much is needed, free and
        missing; None if nothing."""
        missing = []
        disk = 0
        for step in steps:
            if isinstance(step.stage, Stage) and not step.cached:
                missing.append(step)
                disk += weight_bytes(step.spec)
        if not missing:
            return None
        free = free_disk(self.store.root)
        if disk > free:
            return (
                f"The results need about {gigabytes(disk)} on disk, and {gigabytes(free)} are free "
                f"at {self.store.root}: {gigabytes(disk - free)} are missing "
                "(store=FOLDER chooses another place)."
            )
        # one stage runs at a time, so the memory of the largest is what is needed
        worst = max(missing, key=lambda step: step.peak_bytes)
        memory = available_memory(self.device)
        if memory is not None and worst.peak_bytes > memory:
            return (
                f"'{worst.label}' needs about {gigabytes(worst.peak_bytes)} of memory, and "
                f"{gigabytes(memory)} are free on {self.device}: "
                f"{gigabytes(worst.peak_bytes - memory)} are missing."
            )
        return None

    def run(self, tracker: Tracker | None = None, reference: Result | None = None) -> list[Result]:
        """Run what is not there yet, and evaluate every checkpoint.

        Args:
            tracker: records every result; None records nothing.
            reference: whose predictions those of all checkpoints are compared with where that is
                asked for; None: the source's.

        Returns:
            The source and all results, in order.
        """
        steps = self.plan()
        self.check_limits(steps)
        for step in steps:
            if isinstance(step.stage, Stage) and not step.cached:
                step.stage.fetch()
        if isinstance(self.model, Source) and not all(step.cached for step in steps[1:]):
            # imports torch, so a chain that is there already does without; evaluation checks too
            from slim.checkpoints.verify import verify

            verify(self.model.resolve())
        results: list[Result] = []
        parent = None
        for stage in [self.model, *self.stages]:
            started = time.monotonic()
            result, curves = self._make(stage, parent)
            # the import of a file: an engine measures the file itself
            result.file = getattr(stage, "file", None)
            result.seconds = time.monotonic() - started
            self._compare_with(reference or result)
            self._evaluate(result)
            results.append(result)
            parent = result
            reference = results[0] if reference is None else reference
            if tracker is not None:
                tracker.log_result(result, stage, curves)
        return results

    def _make(self, stage: Source | Stage, parent: Result | None) -> tuple[Result, list]:
        if isinstance(stage, Source):
            checkpoint = stage.resolve()
            for note in checkpoint.notes:
                say(note, head=stage.label)
            name = self._source_digest(checkpoint)
            return Result(stage.label, checkpoint, name, True, 0.0, content=name), []
        if parent is None:  # a fresh model has none
            name = digest([stage.cache_key(), stage.version])
        else:
            name = stage_digest(stage, parent.digest)
        folder = self.store.stage_folder(stage.kind, name)
        with self.store.lock(folder):
            # looked for with the lock: another process may just have finished it
            checkpoint = self.store.find(folder)
            cached = checkpoint is not None
            if not cached:
                self._run_stage(stage, parent, name, folder)
                checkpoint = Checkpoint(folder)
        manifest = checkpoint.manifest
        content = digest(manifest["checksums"])
        result = Result(label(stage), checkpoint, name, cached, 0.0, content, manifest["facts"])
        return result, manifest["curves"]

    def _run_stage(self, stage: Stage, parent: Result | None, name: str, folder: Path) -> None:
        say("...", head=label(stage))
        curves: list = []
        resumed = self.store.work_folder(folder).is_dir()
        clock = Clock.read(self.store.root, self.device)
        estimate = clock.stage_seconds(stage, self._input_spec(stage, parent))
        context = Context(
            self.device,
            metric=lambda key, value, at=None: curves.append([key, value, at]),
            resume_dir=self.store.work_folder(folder),
        )
        started = time.time()
        watch = Stopwatch()
        if stage.together:
            processes.broadcast(
                {
                    "stage": self._number(stage),
                    "source": str(parent.checkpoint.folder),
                    "work": str(context.resume_dir),
                }
            )
        with self.store.writing(folder) as partial:
            used: dict = {}  # what measuring the energy adds to the metadata
            read = None  # a fresh model has no parent
            source = None
            if parent is not None:
                read = parent.checkpoint
                source = read.folder
            energy = stage_energy(getattr(self.evaluation, "energy", None), self.device, used)
            with activity(label(stage)), energy:
                metadata = stage.run(source, partial, context)
            metadata = {**metadata, **used, **carried_mask(read, partial, metadata)}
            seconds = time.time() - started
            manifest = {
                "kind": stage.kind,
                "method": cache_name(stage),
                "settings": stage.cache_key(),
                "version": stage.version,
                "hash": name,
                "lineage": [*lineage(parent), {"label": label(stage), "hash": name}],
                "versions": versions(),
                "git_commit": git_commit(),
                "seconds": round(seconds, 3),
                "estimated_seconds": round(estimate, 3),
                "facts": metadata,
                "curves": curves,
            }
            write_manifest(partial, manifest)
            self._check(partial, context.expected)  # inside: what does not load never gets its name
        if not resumed:  # half of the work says little of the time for all
            clock.learn(work_name(stage), estimate, watch.seconds())

    def _input_spec(self, stage: Stage, parent: Result | None) -> ModelSpec:
        if parent is None:
            return stage.describe()
        return parent.checkpoint.spec

    def _check(self, folder: Path, expected: Callable[[], Expected] | None) -> None:
        """Load what a stage has written once more; a difference means that it is not kept."""
        from slim.loading.check_result import check_result  # loads torch

        check_result(folder, expected)

    def _number(self, stage: Stage) -> int:
        """Return the place of a stage, by identity: two may have equal settings."""
        for number, candidate in enumerate(self.stages):
            if candidate is stage:
                return number
        raise ValueError("not a stage of this pipeline")

    def _compare_with(self, reference: Result) -> None:
        """Let predictions be compared with those of ``reference``, where that is asked for."""
        if self.evaluation is not None and self.evaluation.kl:
            from slim.evaluation.divergence import Reference  # local: torch

            self.evaluation.reference = Reference.of(reference, self.store)

    def _evaluate(self, result: Result) -> None:
        """Fill in quality (a fact about a checkpoint) and speed (one about a checkpoint on a
        machine)."""
        if self.evaluation is None:
            return
        evaluation = self.evaluation
        spec = result.checkpoint.spec
        self._choose_speed_dtype()
        # quality holds wherever it is measured; speed only on this machine
        speed = [
            evaluation.speed_cache_key(),
            evaluation.speed_dtype(spec, self.device),
            fingerprint(self.device),
        ]
        content = result.content
        if evaluation.engine is not None and result.file is not None:
            # what was imported may equal a plain checkpoint, and its file is smaller all the same
            content = digest([content, result.digest])
        speed_key = digest(["speed", content, self.device, *speed])
        files = {
            "quality": self._quality_file(content, spec),
            "speed": self.store.evaluation_file(speed_key),
        }
        # one lock for both parts: they are measured with the model loaded once
        with self.store.lock(files["quality"]):
            measured = {}
            missing = set()
            for part, path in files.items():
                measured[part] = self.store.find_evaluation(path)
                if measured[part] is None:
                    missing.add(part)
            if missing:
                fresh = self._measure(result, missing)
                for part in missing:
                    measured[part] = fresh[part] or {}
                    self.store.write_evaluation(files[part], measured[part])
        result.quality = measured["quality"]
        result.speed = measured["speed"]

    def _quality_file(self, content: str, spec: ModelSpec) -> Path:
        """Return where the quality of a checkpoint is kept.

        Args:
            content: name of the checkpoint's content.
            spec: the checkpoint.
        """
        quality = [
            self.evaluation.quality_cache_key(),
            self.device,
            self.evaluation.quality_dtype(spec, self.device),
        ]
        return self.store.evaluation_file(digest(["quality", content, *quality]))

    def _measure(self, result: Result, missing: set[str]) -> dict:
        """Measure the parts of an evaluation that are ``missing``: ``quality``, ``speed``."""
        from slim.evaluation.run import measure  # local: torch and lm-eval

        say(f"evaluating {result.label} ...", dim=True)
        clock = Clock.read(self.store.root, self.device)
        estimate = clock.evaluation_seconds(self.evaluation, result.checkpoint.spec)
        watch = Stopwatch()
        with activity(f"evaluating {result.label}"):
            measured = measure(
                result.checkpoint.folder,
                self.evaluation,
                self.device,
                quality="quality" in missing,
                speed="speed" in missing,
                file=result.file,
            )
        name = evaluation_name(self.evaluation)
        if name and len(missing) == 2:  # a part alone says little of the rest
            clock.learn(name, estimate, watch.seconds())
        return measured

    def _choose_speed_dtype(self) -> None:
        """Let all checkpoints be timed in the type that is faster on this machine."""
        evaluation = self.evaluation
        if self.device != "cpu" or not evaluation.has_speed or evaluation.dtype != "auto":
            return
        if evaluation.engine is not None:
            return  # it computes in types of its own
        if evaluation.machine_dtype is None:
            evaluation.machine_dtype = machine_dtype(self.store)


def label(stage: Stage) -> str:
    """Name a stage in tables: its kind and method, or what it calls itself."""
    return getattr(stage, "label", None) or f"{stage.kind} {spoken_name(stage)}"


def stage_digest(stage: Stage, parent: str) -> str:
    """Name the result of a stage.

    Args:
        stage: with its settings.
        parent: name of the result that it works on.
    """
    return digest([stage.kind, stage.cache_key(), stage.version, parent])


def lineage(parent: Result | None) -> list[dict]:
    """Return the chain up to ``parent`` as recorded in its manifest; a foreign checkpoint is one
    entry."""
    if parent is None:
        return []
    recorded = parent.checkpoint.manifest.get("lineage")
    if not recorded:
        return [{"label": parent.label, "hash": parent.digest}]
    *earlier, last = recorded
    if parent.label != last["label"]:  # a chain's source, known here by its folder's name
        last = {**last, "name": parent.label}
    return [*earlier, last]

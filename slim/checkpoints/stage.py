"""A stage: settings plus ``run(source, target, context)``. It reads a checkpoint folder and writes
one.

A stage knows nothing of the pipeline, the tracker or the other stages. The pipeline names its
result by ``cache_key()``, ``version`` and the parent's hash, and gives it an empty folder that
appears under its final name only when ``run`` has returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.core.settings import dataclass_cache_key

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec


def _ignore(name: str, value: float, step: int | None = None) -> None:
    """Take a metric and do nothing with it: the default outside a pipeline."""


@dataclass(frozen=True)
class Expected:
    """What a stage's result has to compute, for the check after the stage.

    Attributes:
        tokens: int64 [1, length], an input.
        hidden: float32 [length, hidden], what leaves the last block for it.
        tolerance: most that the result may differ, per token and relative to ``hidden``.
    """

    tokens: torch.Tensor
    hidden: torch.Tensor
    tolerance: float


@dataclass
class Context:
    """What the surroundings offer a stage while it runs.

    Attributes:
        device: torch device for the work, ``"cpu"`` or ``"cuda"``.
        resume_dir: Folder that outlives a run that is killed and is removed when the stage is done:
            what it needs to resume is kept there. None: nothing is kept.
        metric: ``metric(name, value, step)`` records a curve (training loss, error per block) as it
            appears.
        expected: Set by a stage that knows what its result computes; called only where there is
            memory to compare it. None: it does not know.
    """

    device: str = "cpu"
    resume_dir: Path | None = None
    metric: Callable[[str, float, int | None], None] = field(default=_ignore)
    expected: Callable[[], Expected] | None = None


class Stage:
    """Base of every stage. Subclasses are dataclasses whose fields are the settings, checked in
    ``__post_init__``.

    Attributes:
        kind: What it does to a model: ``prune``, ``tune``, ``distill``, ``quantize``; also the
            start of its folder's name.
        version: Raised whenever the same settings begin to give a different result, so that old
            results are not reused.
        together: Whether all processes that torchrun started run it. What returns in others than
            process zero, which get no target, is ignored.
        after_quantizer: Whether it works on what the quantizer of its chain makes.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    together: ClassVar[bool] = False
    after_quantizer: ClassVar[bool] = False

    @property
    def input_multiple(self) -> int:
        """What the inputs of a model's linear layers are best a multiple of for this stage: the
        size of its groups of weights."""
        return 1

    def look_ahead(self, spec: ModelSpec, following: Sequence[Stage]) -> None:
        """Choose what settings leave to the chain; called before ``check`` and ``cache_key``.

        Args:
            spec: The model that the stage runs on.
            following: The later stages of the chain.
        """

    def cache_key(self) -> dict:
        """Settings that determine the result, as plain JSON values."""
        return dataclass_cache_key(self)

    def check(self, spec: ModelSpec) -> None:
        """Check that the stage can work on a model. Runs before any work and needs no weights.

        Args:
            spec: The model.

        Raises:
            SlimError: It cannot.
        """

    def to_fetch(self) -> str | None:
        """Say what :meth:`fetch` would get, how large that is and where it goes; None where
        nothing is missing."""
        return None

    def fetch(self) -> None:
        """Get what the stage needs besides the model, such as a tool's environment. Called before
        the first stage of a chain runs.

        Raises:
            SlimError: It cannot be had.
        """

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        """Describe the result, for the plan and for the checks of later stages.

        Args:
            spec: The model that the stage runs on.
        """
        return spec

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        """Estimate the peak memory of ``run`` over the bare interpreter, in bytes.

        Args:
            spec: The model that the stage runs on.
            device: ``"cpu"`` or ``"cuda"``.
        """
        raise NotImplementedError

    def run(self, source: Path, target: Path, context: Context) -> dict:
        """Read a checkpoint and write the new one.

        Files for people (plots, score tables) go to ``target / "report"``; the pipeline hands them
        to the tracker.

        Args:
            source: The checkpoint to read.
            target: An existing, empty folder.
            context: What the surroundings offer.

        Returns:
            Metadata for the manifest as plain JSON values (what was removed, losses, errors);
            numbers at its top level are also logged as metrics.
        """
        raise NotImplementedError

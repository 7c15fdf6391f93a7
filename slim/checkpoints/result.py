"""A checkpoint of a chain: planned, and made and measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Stage
from slim.models.accounting import macs_per_token
from slim.models.spec import ModelSpec


@dataclass
class Step:
    """One row of the plan: a stage (or the source), what it will give, and whether it is there
    already.

    Attributes:
        label: Its name in tables.
        stage: What makes it.
        spec: The model it will be.
        digest: Its name; None where that is known only once its parent is.
        folder: Where it is or will be.
        cached: Whether it is there already.
        peak_bytes: Memory that making it takes, at most.
    """

    label: str
    stage: Stage | Source
    spec: ModelSpec
    digest: str | None = None
    folder: Path | None = None
    cached: bool = False
    peak_bytes: int = 0


@dataclass
class Result:
    """A checkpoint of the chain with what was measured of it.

    Attributes:
        label: Its name in tables.
        checkpoint: The checkpoint.
        digest: Its name: a hash of the settings that made it.
        cached: Whether it was there already.
        seconds: What making it took.
        content: Hash of the files themselves, wherever they came from.
        metadata: What the stage says of its work, plain JSON values (``facts`` in files).
        quality: What the evaluation measured of the checkpoint alone.
        speed: What it measured of the checkpoint on this machine.
        file: What the checkpoint was imported from; None where it was not.
    """

    label: str
    checkpoint: Checkpoint
    digest: str
    cached: bool
    seconds: float
    content: str = ""  # digest of the files themselves, wherever they came from
    metadata: dict = field(default_factory=dict)
    quality: dict = field(default_factory=dict)
    speed: dict = field(default_factory=dict)
    file: Path | None = None

    @property
    def parameters(self) -> int:
        """Parameters, packed weights as the weights they stand for."""
        return self.checkpoint.spec.parameters()

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics of the checkpoint under the names they are tracked by."""
        metrics = {
            "parameters": self.parameters,
            "bytes_on_disk": self.checkpoint.bytes_on_disk,
            "macs_per_token": macs_per_token(self.checkpoint.spec),
        }
        metrics.update(self.quality.get("metrics", {}))
        metrics.update(self.speed.get("metrics", {}))
        return metrics

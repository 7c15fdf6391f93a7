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
    already."""

    label: str
    stage: Stage | Source
    spec: ModelSpec
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
        return self.checkpoint.spec.parameters()

    @property
    def metrics(self) -> dict[str, float]:
        """All figures of the checkpoint under the names they are tracked by."""
        spec = self.checkpoint.spec
        figures = {
            "parameters": self.parameters,
            "bytes_on_disk": self.checkpoint.bytes_on_disk,
            "macs_per_token": macs_per_token(spec),
        }
        return {**figures, **self.quality.get("metrics", {}), **self.speed.get("metrics", {})}

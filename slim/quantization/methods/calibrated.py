"""Base of the stages that quantise with calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.settings import require_flag
from slim.data.calibration import Calibration
from slim.quantization.methods.base import Quantization

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint
    from slim.models.spec import ModelSpec


@dataclass
class CalibratedQuantization(Quantization):
    """Settings of the calibrated methods, besides those of every method.

    Attributes:
        calibration: the text that H = X^T X is summed over.
        propagate: whether layers also make up for what the quantised ones before them changed
            (``slim/calibration/propagation.py``). The plain model is run next to the quantised one,
            block by block.
    """

    calibration: Calibration | None = None
    propagate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag("quant.propagate", self.propagate)

    def cache_key(self) -> dict:
        key = super().cache_key()
        if not self.propagate:  # results from before it was a setting
            del key["propagate"]
        return key

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        if self.propagate:
            require_held_out(self.calibration)

    def tokens(self, source: Checkpoint) -> torch.Tensor:
        return self.calibration.tokens_for(source)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        from slim.calibration.sequential import calibration_bytes, propagation_bytes

        length = min(self.calibration.length, spec.context_length)
        calibration = calibration_bytes(spec, self.calibration.samples, length)
        if self.propagate:
            calibration += propagation_bytes(spec, self.calibration.samples, length)
        return super().peak_bytes(spec, device) + calibration


def require_held_out(calibration: Calibration) -> None:
    """Raise ``SlimError`` where a calibration text leaves no sample to hold out."""
    from slim.calibration.propagation import HELD_OUT  # loads torch

    if calibration.samples < HELD_OUT:
        raise SlimError(
            f"quant.propagate=true holds out every {HELD_OUT}th calibration sample, and "
            f"calibration.samples={calibration.samples} leaves none.\n"
            f"Use at least calibration.samples={HELD_OUT}, or quant.propagate=false."
        )

"""Base of the stages that quantise with calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    """

    calibration: Calibration | None = None

    def tokens(self, source: Checkpoint) -> torch.Tensor:
        return self.calibration.tokens_for(source)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        from slim.calibration.sequential import calibration_bytes

        length = min(self.calibration.length, spec.context_length)
        calibration = calibration_bytes(spec, self.calibration.samples, length)
        return super().peak_bytes(spec, device) + calibration

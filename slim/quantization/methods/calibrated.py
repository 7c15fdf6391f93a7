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
    """Settings, beside those of every method.

    calibration: the text that G = X^T X is taken over.
    """

    calibration: Calibration | None = None

    def tokens(self, source: Checkpoint) -> torch.Tensor:
        return self.calibration.tokens_for(source)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        from slim.calibration.sequential import calibration_bytes

        samples, length = (
            self.calibration.samples,
            min(self.calibration.length, spec.context_length),
        )
        return super().peak_bytes(spec, device) + calibration_bytes(spec, samples, length)

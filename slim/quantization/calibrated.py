"""Base of the stages that quantise with calibration samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.data.calibration import Calibration
from slim.quantization.method import Quantization

if TYPE_CHECKING:
    import torch

    from slim.architecture import ModelDescription
    from slim.checkpoint import Checkpoint


@dataclass
class CalibratedQuantization(Quantization):
    """Settings, beside those of every method.

    calibration: the text that G = X^T X is taken over.
    """

    calibration: Calibration | None = None

    def tokens(self, source: Checkpoint) -> torch.Tensor:
        from slim.checkpoint import load_tokenizer

        return self.calibration.tokens(load_tokenizer(source.folder), source.description.context_length)

    def peak_bytes(self, model: ModelDescription, device: str) -> int:
        from slim.blockwise import walk_bytes

        samples, length = self.calibration.samples, min(self.calibration.length, model.context_length)
        return super().peak_bytes(model, device) + walk_bytes(model, samples, length)

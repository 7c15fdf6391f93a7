"""The Hessian H = X^T X of linear layers' inputs, summed over calibration batches.

For a linear layer y = x W^T the squared output error |X D^T|^2 of a change D of its weights is
tr(D H D^T): H is half of that error's second derivative with respect to any row of D. Papers write
2 X^T X or a mean over tokens; the factor changes nothing in any method here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

HESSIAN_TILE = 384  # columns of H computed at once; only tiles on and below the diagonal are


@dataclass
class Hessian:
    """Sums H = X^T X over batches; only tiles on and below the diagonal are computed.

    Attributes:
        features: columns of X.
        device: torch device of the sum.
        rows: rows of X added so far.
        total: float32 [features, features], the sum; its upper tiles are filled by :meth:`matrix`.
    """

    features: int
    device: str = "cpu"
    rows: int = 0
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(
            self.features, self.features, dtype=torch.float32, device=self.device
        )

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs [..., features]."""
        x = inputs.reshape(-1, self.features).float()
        # H is symmetric: leaving out the tiles above the diagonal saves half the work on wide
        # inputs
        for start in range(0, self.features, HESSIAN_TILE):
            stop = min(start + HESSIAN_TILE, self.features)
            self.total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
        self.rows += len(x)

    def matrix(self) -> torch.Tensor:
        """Return H, float32 [features, features]: the sum itself, not a copy of it."""
        for start in range(0, self.features, HESSIAN_TILE):
            stop = min(start + HESSIAN_TILE, self.features)
            self.total[start:stop, stop:] = self.total[stop:, start:stop].T
        return self.total


@contextmanager
def precision_of(dtype: str) -> Iterator[None]:
    """Let float32 matrix products round their factors to ``dtype`` where that is faster.

    A model stored in bfloat16 is later run in it, so its calibration inputs need no more than 8
    bits of mantissa, with sums in float32. On a GPU, TF32's 11 bits serve float16 too. A model
    stored in float32 is calibrated in float32.

    Args:
        dtype: type the model is stored in, such as ``"bfloat16"``.
    """
    cpu = torch.backends.mkldnn.matmul
    gpu = torch.backends.cuda.matmul
    cpu_before = cpu.fp32_precision
    gpu_before = gpu.fp32_precision
    try:
        if dtype == "bfloat16":
            cpu.fp32_precision = "bf16"
        if dtype in ("bfloat16", "float16"):
            gpu.fp32_precision = "tf32"
        yield
    finally:
        cpu.fp32_precision = cpu_before
        gpu.fp32_precision = gpu_before

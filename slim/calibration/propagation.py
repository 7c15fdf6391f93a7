"""What the layers before it have done to a layer's input, and the weights that answer to it.

Sequential calibration gives a layer's solver the inputs X^ [tokens, in] that the changed layers
before it produce, and asks it to keep X^ W^T. But what the model should keep is X W^T, with the
inputs X of the plain model. For any weights V

    |X W^T - X^ V^T|^2 = const + tr((V - W*) H (V - W*)^T),
    H = X^^T X^,  C = X^T X^,  (W* - W) (H + lambda I) = W (C - H),

(lambda = 0), so every solver stays as it is and gets the target W + a (W* - W). A layer whose
output joins the residual stream can also make up for what that lacks, R - R^: its target outputs
are X W^T + R - R^, and (R - R^)^T X^ is added to W (C - H).

The full step follows noise of the calibration text; QEP (arXiv:2504.09629) takes a = 0.5 and GPTAQ
(arXiv:2504.02692) a = 0.25. Here lambda, which draws the target to W, and a are chosen for each
layer on samples that W* has not seen: in closed form for a, as the held-out error is quadratic in
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.calibration.hessian import Hessian
from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

HELD_OUT = 8  # every eighth sample
RIDGES = (0.01, 0.1, 1.0)  # values of lambda that are tried, in means of H's diagonal


class Products:
    """Sums H = X^^T X^ and C = X^T X^ over batches.

    Attributes:
        hessian: H.
        cross: C, float32 [in, in].
        residual: (R - R^)^T X^, float32 [hidden, in]; None where the layer's output is not added to
            the residual stream.
    """

    def __init__(self, features: int, device: str):
        """Begin with no rows.

        Args:
            features: columns of X.
            device: torch device of the sums.
        """
        self.hessian = Hessian(features, device)
        self.cross = torch.zeros(features, features, dtype=torch.float32, device=device)
        self.residual: torch.Tensor | None = None

    def add(
        self, plain: torch.Tensor, changed: torch.Tensor, residual: torch.Tensor | None
    ) -> None:
        """Add rows of X, the same rows of X^, each [..., in], and of R - R^, [..., hidden]."""
        self.hessian.add(changed)
        features = self.hessian.features
        changed = changed.reshape(-1, features).float()
        self.cross.addmm_(plain.reshape(-1, features).float().T, changed)
        if residual is not None:
            gained = residual.reshape(-1, residual.shape[-1]).float().T @ changed
            self.residual = gained if self.residual is None else self.residual.add_(gained)

    def missing(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what the outputs of W lack, in products with X^: W (C - H) + (R - R^)^T X^.

        Args:
            weight: W, float32 [out, in].
        """
        missing = weight @ (self.cross - self.hessian.matrix())
        return missing if self.residual is None else missing.add_(self.residual)


@dataclass
class Drift:
    """How the inputs of a linear group differ from the plain model's.

    Attributes:
        seen: sums over most samples.
        held_out: sums over the others.
    """

    seen: Products
    held_out: Products

    @classmethod
    def empty(cls, features: int, device: str) -> Drift:
        """Return one without samples, for inputs of that many features."""
        return cls(Products(features, device), Products(features, device))

    def add(
        self,
        plain: torch.Tensor,
        changed: torch.Tensor,
        residual: torch.Tensor | None,
        first: int,
    ) -> None:
        """Add a batch.

        Args:
            plain: X, [samples, length, in].
            changed: X^, [samples, length, in].
            residual: R - R^, [samples, length, hidden], or None.
            first: number of the batch's first sample in the calibration text.
        """
        numbers = torch.arange(first, first + len(plain))
        held = numbers % HELD_OUT == HELD_OUT - 1
        for products, rows in ((self.seen, ~held), (self.held_out, held)):
            if bool(rows.any()):
                lacking = None if residual is None else residual[rows]
                products.add(plain[rows], changed[rows], lacking)

    def hessian(self) -> torch.Tensor:
        """Return H over all samples, float32 [in, in]."""
        return self.seen.hessian.matrix() + self.held_out.hessian.matrix()

    def correct(self, weights: dict[str, torch.Tensor]) -> dict[str, Correction]:
        """Return the target of every layer that gains by one on the held-out samples.

        Args:
            weights: layer -> W, float32 [out, in].
        """
        missing = {name: self.seen.missing(weight) for name, weight in weights.items()}
        held_missing = {name: self.held_out.missing(weight) for name, weight in weights.items()}
        hessian, held = self.seen.hessian.matrix(), self.held_out.hessian.matrix()
        best: dict[str, Correction] = {}
        mean = float(hessian.diagonal().mean())
        for ridge in RIDGES:
            shifted = hessian.clone()
            shifted.diagonal().add_(ridge * mean)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if failed:
                continue
            for name, weight in weights.items():
                step = torch.cholesky_solve(missing[name].T, factor).T
                # held-out error of W + a step, less that of W: a^2 curvature - 2 a slope
                slope = float((held_missing[name] * step).sum())
                curvature = float(((step @ held) * step).sum())
                if slope <= 0 or curvature <= 0:
                    continue
                length = min(1.0, slope / curvature)
                gain = 2 * length * slope - length**2 * curvature
                if name not in best or gain > best[name].gain:
                    best[name] = Correction(weight + length * step, length, ridge, gain)
        return best


@dataclass
class Correction:
    """The weights a layer should have behind changed layers.

    Attributes:
        weight: W + a (W* - W), float32 [out, in].
        length: a, from 0 to 1.
        ridge: lambda, in means of H's diagonal.
        gain: by how much it lowers the squared error on the held-out samples.
    """

    weight: torch.Tensor
    length: float
    ridge: float
    gain: float

"""Mixed precision: more bits for the layers that need them, fewer for the others, under a budget.

The walk measures for every layer l and every width b what rounding to b bits would cost, as a share
of the layer's output:

    e_l(b) = tr(D_b G D_b^T) / tr(W G W^T),    D_b = Q_b(W) - W

and the bits are chosen to make the sum of n_l e_l(b_l) small under sum n_l b_l <= budget, n_l the
number of weights. Without the share, layers with large outputs would take all bits: what follows
them (a norm, a residual stream) does not care for absolute size. All layers begin with the fewest
bits; the step with the largest gain per bit comes next, along each layer's lower convex hull, so
that only steps that fit no more can be missed (Shoham & Gersho 1988)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from slim.calibration.errors import relative_error
from slim.calibration.sequential import BlockMethod, LinearGroup
from slim.quantization.scheme import BITS, Scheme
from slim.quantization.solvers.grid import search, shrink_factors

if TYPE_CHECKING:
    import torch

FACTORS = shrink_factors(6)


class Sensitivity(BlockMethod):
    """Measures e_l(b) on the walk and changes nothing. errors: full layer name -> bits -> e_l(b).

    scheme: whose group size and symmetry hold. dtype: of scales. calibrated: whether G is looked
    at; without it D and W are compared as they are."""

    resumable = True

    def __init__(self, scheme: Scheme, dtype: torch.dtype, calibrated: bool):
        self.scheme, self.dtype, self.needs_hessian = scheme, dtype, calibrated
        self.errors: dict[str, dict[int, float]] = {}

    def state(self) -> dict:
        return {"errors": {name: list(found.items()) for name, found in self.errors.items()}}

    def resume(self, state: dict) -> None:
        self.errors = {name: dict(map(tuple, found)) for name, found in state["errors"].items()}

    def process(self, view: LinearGroup) -> dict[str, float]:
        importance = None if view.hessian is None else view.hessian.diagonal()
        for name, linear in view.linears.items():
            found = {}
            for bits in BITS:
                scheme = Scheme(bits, self.scheme.group_size, self.scheme.symmetric)
                rounded = search(
                    linear.weight, scheme, self.dtype, importance, FACTORS, each_end=False
                ).dequantize()
                found[bits] = (
                    relative_error(rounded - linear.weight, linear.weight, view.hessian) ** 2
                )
            self.errors[f"{view.prefix}.{name}"] = found
        return {}


def allocate(
    errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: float
) -> dict[str, int]:
    """Return layer -> bits with a small sum of n_l e_l(b_l) and at most ``average`` bits per
    weight.

    errors: layer -> bits -> e_l(b). sizes: layer -> number of weights n_l.
    """
    chosen = {name: min(found) for name, found in errors.items()}
    left = average * sum(sizes.values()) - sum(sizes[name] * bits for name, bits in chosen.items())
    while True:
        steps = [
            ((errors[name][now] - error) / (bits - now), name, bits)
            for name, now in chosen.items()
            for bits, error in errors[name].items()
            if bits > now
            and error < errors[name][now]
            and sizes[name] * (bits - now) <= left + 1e-6
        ]
        if not steps:
            return chosen
        _, name, bits = max(steps)  # of equal gains the last name: the same choice every time
        left -= sizes[name] * (bits - chosen[name])
        chosen[name] = bits

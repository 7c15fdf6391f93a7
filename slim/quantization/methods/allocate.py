"""Mixed precision: more bits for the layers that need them, fewer for the others, under a budget.

A first pass over the blocks measures for every layer l and every width b what rounding to b bits
would cost, as a share of the layer's output:

    e_l(b) = tr(D_b H D_b^T) / tr(W H W^T),    D_b = Q_b(W) - W

and the bits are chosen to make the sum of n_l e_l(b_l) small under sum n_l b_l <= budget, n_l the
number of weights. Without the share, layers with large outputs would take all bits: what follows
them (a norm, a residual stream) does not care for absolute size. All layers begin with the fewest
bits; the step with the largest gain per bit comes next, along each layer's lower convex hull, so
that only steps that fit no more can be missed (Shoham & Gersho 1988).

Engines keep the layers that share an input (queries, keys and values; gate and up projections) in
one matrix with one scheme. So they are one layer here, with the mean of their errors, unless each
is to be chosen by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from slim.calibration.errors import relative_error
from slim.calibration.sequential import BlockMethod, LinearGroup
from slim.quantization.scheme import BITS, Scheme
from slim.quantization.solvers.grid import search, shrink_factors

if TYPE_CHECKING:
    import torch

FACTORS = shrink_factors(6)


class Sensitivity(BlockMethod):
    """Measures e_l(b) and changes nothing.

    Attributes:
        errors: full layer name -> bits -> e_l(b).
    """

    resumable = True

    def __init__(self, scheme: Scheme, dtype: torch.dtype, calibrated: bool):
        """Take the settings.

        Args:
            scheme: its group size and symmetry hold for every width.
            dtype: type scales are stored in.
            calibrated: whether H is looked at; without it D and W are compared as they are.
        """
        self.scheme = scheme
        self.dtype = dtype
        self.needs_hessian = calibrated
        self.errors: dict[str, dict[int, float]] = {}

    def state(self) -> dict:
        # JSON has no integer keys: pairs instead
        return {"errors": {name: list(errors.items()) for name, errors in self.errors.items()}}

    def resume(self, state: dict) -> None:
        self.errors = {name: dict(map(tuple, pairs)) for name, pairs in state["errors"].items()}

    def process(self, group: LinearGroup) -> dict[str, float]:
        importance = None if group.hessian is None else group.hessian.diagonal()
        for name, linear in group.linears.items():
            errors = {}
            for bits in BITS:
                scheme = Scheme(bits, self.scheme.group_size, self.scheme.symmetric)
                rounded = search(
                    linear.weight, scheme, self.dtype, importance, FACTORS, each_end=False
                )
                change = rounded.dequantize() - linear.weight
                errors[bits] = relative_error(change, linear.weight, group.hessian) ** 2
            self.errors[f"{group.prefix}.{name}"] = errors
        return {}


def allocate_together(
    errors: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    average: float,
    groups: Sequence[Sequence[str]],
) -> dict[str, int]:
    """Return layer -> bits as :func:`allocate` does, the same for all layers of a group.

    Args:
        errors: layer -> bits -> e_l(b).
        sizes: layer -> number of weights n_l.
        average: the most bits per weight there may be on average.
        groups: names of layers that belong together; names that ``errors`` lacks do not matter.
    """
    members = {name: [name] for name in errors}
    for group in groups:
        together = [name for name in group if name in errors]
        for name in together:
            del members[name]
        if together:
            members[together[0]] = together
    joined_errors, joined_sizes = {}, {}
    for first, names in members.items():
        size = sum(sizes[name] for name in names)
        joined_sizes[first] = size
        joined_errors[first] = {}
        for bits in errors[first]:
            # n_l e_l(b), which the sum to be made small consists of, over all weights of the group
            total = sum(sizes[name] * errors[name][bits] for name in names)
            joined_errors[first][bits] = total / size
    chosen = allocate(joined_errors, joined_sizes, average)
    return {name: chosen[first] for first, names in members.items() for name in names}


def allocate(
    errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: float
) -> dict[str, int]:
    """Return layer -> bits with a small sum of n_l e_l(b_l).

    Args:
        errors: layer -> bits -> e_l(b).
        sizes: layer -> number of weights n_l.
        average: the most bits per weight there may be on average.
    """
    chosen = {name: min(widths) for name, widths in errors.items()}
    spent = sum(sizes[name] * bits for name, bits in chosen.items())
    left = average * sum(sizes.values()) - spent
    while True:
        steps = list(_steps(errors, sizes, chosen, left))
        if not steps:
            return chosen
        _, name, bits = max(steps)  # of equal gains the last name: the same choice every time
        left -= sizes[name] * (bits - chosen[name])
        chosen[name] = bits


def _steps(
    errors: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    chosen: Mapping[str, int],
    left: float,
) -> Iterator[tuple[float, str, int]]:
    """Yield (gain per bit, layer, bits) of every step to more bits that fits what is left."""
    for name, now in chosen.items():
        for bits, error in errors[name].items():
            fits = sizes[name] * (bits - now) <= left + 1e-6
            if bits > now and fits and error < errors[name][now]:
                yield (errors[name][now] - error) / (bits - now), name, bits

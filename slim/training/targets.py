"""Which layers get adapters, and of which rank: names and patterns against what the model has.
Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from slim.core.errors import SlimError, did_you_mean
from slim.models.spec import ModelSpec
from slim.quantization.assign import layer_shapes


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern``, a regular expression, is the whole of ``name`` or its end behind a dot
    (PEFT's own rule)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def find_targets(spec: ModelSpec, targets: Iterable[str] | None, setting: str) -> list[str]:
    """Return the full names of the blocks' linear layers that ``targets`` mean, in the model's
    order; None: all.

    Raises ``SlimError`` for an entry that is no layer's name and matches none, with the nearest
    name."""
    names = list(layer_shapes(spec))
    if targets is None:
        return names
    found = set()
    for target in targets:
        found.update(require_match(spec, target, names, setting, "layer"))
    return [name for name in names if name in found]


def find_ranks(
    spec: ModelSpec, adapted: list[str], r: int, pattern: Mapping[str, int], group: str
) -> dict[str, int]:
    """Return full name -> rank for the layers ``adapted``: that of the first entry of ``pattern``
    that fits, else ``r``.

    Raises ``SlimError`` for an entry that fits no adapted layer.
    """
    for entry in pattern:
        require_match(spec, entry, adapted, f"{group}.rank_pattern", "adapted layer")
    return {
        name: next((rank for entry, rank in pattern.items() if matches(entry, name)), r)
        for name in adapted
    }


def require_small(spec: ModelSpec, ranks: Mapping[str, int], group: str) -> None:
    """Raise ``SlimError`` for a rank that is larger than its layer."""
    shapes = layer_shapes(spec)
    for name, rank in ranks.items():
        if rank > min(shapes[name]):
            shape, least = (
                " x ".join(map(str, shapes[name])),
                min(min(shapes[adapted]) for adapted in ranks),
            )
            raise SlimError(
                f"An adapter of rank {rank} is larger than {name} of {spec.name}, which is {shape}. "
                f"Use {group}.r of at most {least}, or a smaller rank there by {group}.rank_pattern."
            )


def require_match(
    spec: ModelSpec, pattern: str, names: Iterable[str], setting: str, what: str
) -> list[str]:
    """Return those of ``names`` that ``pattern`` matches. Raises ``SlimError`` if there are none,
    or it is no pattern."""
    try:
        found = [name for name in names if matches(pattern, name)]
    except re.error as error:
        raise SlimError(f"{setting}: '{pattern}' is no regular expression ({error}).") from error
    if not found:
        short = list(dict.fromkeys(name.split(".")[-1] for name in names))
        raise SlimError(
            f"{setting}: no {what} '{pattern}' in {spec.name}. Possible: {', '.join(short)}; a pattern is matched with the "
            f"end of names such as {next(iter(names))}.{did_you_mean(pattern, short)}"
        )
    return found

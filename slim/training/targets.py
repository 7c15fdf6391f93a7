"""Which layers get adapters, and of which rank: names and patterns against what the model has.
Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from slim.core.errors import SlimError, did_you_mean
from slim.models.spec import ModelSpec
from slim.quantization.assign import layer_shapes


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the whole of a name or its end after a dot (PEFT's own rule).

    Args:
        pattern: A regular expression.
        name: Of a layer, such as ``model.layers.3.mlp.up_proj``.
    """
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def find_targets(spec: ModelSpec, targets: Iterable[str] | None, setting: str) -> list[str]:
    """Return the full names of the blocks' linear layers that are meant, in the model's order.

    Args:
        spec: The model.
        targets: Names or patterns; None for all layers.
        setting: The setting that names them, as the user types it.

    Raises:
        SlimError: An entry is no layer's name and matches none.
    """
    names = list(layer_shapes(spec))
    if targets is None:
        return names
    chosen: set[str] = set()
    for target in targets:
        chosen.update(require_match(spec, target, names, setting, "layer"))
    return [name for name in names if name in chosen]


def find_ranks(
    spec: ModelSpec, adapted: list[str], r: int, pattern: Mapping[str, int], group: str
) -> dict[str, int]:
    """Return full name -> rank of the layers with adapters.

    Args:
        spec: The model.
        adapted: Full names of the layers with adapters.
        r: The rank of layers that no pattern fits.
        pattern: Pattern -> rank; the first that fits counts.
        group: Where the settings are typed.

    Raises:
        SlimError: A pattern fits no layer with adapters.
    """
    for entry in pattern:
        require_match(spec, entry, adapted, f"{group}.rank_pattern", "adapted layer")
    return {name: _rank_of(name, r, pattern) for name in adapted}


def _rank_of(name: str, r: int, pattern: Mapping[str, int]) -> int:
    for entry, rank in pattern.items():
        if matches(entry, name):
            return rank
    return r


def require_small(spec: ModelSpec, ranks: Mapping[str, int], group: str) -> None:
    """Check that no rank is larger than its layer.

    Args:
        spec: The model.
        ranks: Full name -> rank.
        group: Where the settings are typed.

    Raises:
        SlimError: One is.
    """
    shapes = layer_shapes(spec)
    for name, rank in ranks.items():
        if rank > min(shapes[name]):
            shape = " x ".join(str(size) for size in shapes[name])
            smallest = min(min(shapes[adapted]) for adapted in ranks)
            raise SlimError(
                f"An adapter of rank {rank} is larger than {name} of {spec.name}, which is "
                f"{shape}.\nUse {group}.r of at most {smallest}, "
                f"or a smaller rank there by {group}.rank_pattern."
            )


def require_match(
    spec: ModelSpec, pattern: str, names: Collection[str], setting: str, what: str
) -> list[str]:
    """Return the names that a pattern matches.

    Args:
        spec: The model, for the message.
        pattern: A regular expression.
        names: Full names of layers.
        setting: The setting with the pattern, as the user types it.
        what: What the names are, for the message.

    Raises:
        SlimError: It matches none, or is no regular expression.
    """
    try:
        matching = [name for name in names if matches(pattern, name)]
    except re.error as error:
        raise SlimError(f"{setting}: '{pattern}' is no regular expression ({error}).") from error
    if not matching:
        short = list(dict.fromkeys(name.split(".")[-1] for name in names))
        raise SlimError(
            f"{setting}: no {what} '{pattern}' in {spec.name}. Possible: {', '.join(short)}; "
            f"a pattern is matched with the end of names such as {next(iter(names))}."
            f"{did_you_mean(pattern, short)}"
        )
    return matching

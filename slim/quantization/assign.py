"""Which layer gets which scheme: one for all blocks, exceptions by name, the head and the
embedding. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from slim.core.errors import SlimError
from slim.core.settings import require_choice
from slim.models.spec import ModelSpec
from slim.quantization.scheme import BITS, GROUP_SIZES, WHOLE_ROW, Scheme

PLAIN_BITS = 16  # in an override: leave the layer as it is
# per row and symmetric: what torch's int8 kernel multiplies with
HEAD_SCHEME = Scheme(8, WHOLE_ROW, True)
OVERRIDE_KEYS = {
    "bits": (*BITS, PLAIN_BITS),
    "group_size": (*GROUP_SIZES, WHOLE_ROW),
    "symmetric": (True, False),
}


def layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Return full name -> (out_features, in_features) of the blocks' linear layers, in order.

    Args:
        spec: The model.
    """
    return spec.linears()


def check_overrides(overrides: Mapping) -> None:
    """Check the setting ``quant.overrides``.

    Args:
        overrides: Its value.

    Raises:
        SlimError: It is no mapping of patterns to settings that a scheme has.
    """
    if not isinstance(overrides, Mapping):
        raise SlimError(
            f"quant.overrides={overrides}: must map layer names to settings, such as "
            "'quant.overrides={*.down_proj:{bits:8}}'."
        )
    for pattern, settings in overrides.items():
        if not isinstance(settings, Mapping):
            raise SlimError(
                f"quant.overrides: '{pattern}' is given {settings}. It takes settings in braces, "
                f"such as {{bits:8}}; bits:{PLAIN_BITS} leaves a layer as it is."
            )
        for key, value in settings.items():
            require_choice(f"quant.overrides: the setting for '{pattern}'", key, OVERRIDE_KEYS)
            require_choice(f"quant.overrides: '{pattern}': {key}", value, OVERRIDE_KEYS[key])


def assign(
    spec: ModelSpec,
    schemes: Mapping[str, Scheme],
    overrides: Mapping[str, Mapping],
    lm_head: bool,
    embeddings: bool,
) -> dict[str, Scheme]:
    """Return the scheme of every layer that is quantized.

    Args:
        spec: The model.
        schemes: Full layer name -> scheme of the blocks' layers, before overrides.
        overrides: Pattern -> settings, applied in their order; a pattern is a whole name with ``*``
            for anything.
        lm_head: Whether the head is quantized.
        embeddings: Whether the embedding is, and a head that shares it.

    Returns:
        Full layer name -> scheme; layers left plain are not in it.

    Raises:
        SlimError: No layer has a pattern's name, or groups do not divide a layer's inputs.
    """
    family = spec.family
    assigned = dict(schemes)
    if lm_head and spec.is_encoder:
        raise SlimError(
            f"quant.lm_head=true: {spec.name} is an encoder, which has no head that predicts "
            "tokens. Use quant.lm_head=false, or quant.embeddings=true for its embedding."
        )
    if not spec.is_encoder and (lm_head or (embeddings and spec.tied)):
        assigned[family.head] = HEAD_SCHEME
    if embeddings:
        assigned[family.embeddings] = HEAD_SCHEME
    for pattern, settings in overrides.items():
        names = [name for name in assigned if fnmatchcase(name, pattern)]
        if not names:
            raise SlimError(
                f"quant.overrides: '{pattern}' is not the name of any quantized layer of "
                f"{spec.name}.\nNames look like '{next(iter(schemes))}'; * stands for anything, "
                "such as '*.down_proj'."
            )
        for name in names:
            assigned[name] = replace(assigned[name], **settings)
    assigned = {name: scheme for name, scheme in assigned.items() if scheme.bits != PLAIN_BITS}
    if not assigned:
        raise SlimError("quant.overrides leave no layer to quantize. Use quant=none for that.")
    check_groups(spec, assigned)
    return assigned


def pinned_layers(names: Iterable[str], overrides: Mapping[str, Mapping]) -> set[str]:
    """Return the layers whose bits an override sets.

    Args:
        names: Full layer names.
        overrides: Pattern -> settings.
    """
    pinned: set[str] = set()
    names = list(names)
    for pattern, settings in overrides.items():
        if "bits" in settings:
            pinned.update(name for name in names if fnmatchcase(name, pattern))
    return pinned


def fused_groups(spec: ModelSpec) -> list[tuple[str, ...]]:
    """Return the layers of the blocks that engines keep in one matrix: those that share an input.

    Args:
        spec: The model.

    Returns:
        Full names of queries, keys and values of every block, and of gate and up projections.
        Layers that have their input for themselves are in no group.
    """
    groups = []
    for block in range(spec.blocks):
        prefix = f"{spec.family.blocks}.{block}"
        for group in spec.family.linear_groups:
            if len(group.linears) > 1:
                groups.append(tuple(f"{prefix}.{name}" for name in group.linears))
    return groups


def split_groups(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> str | None:
    """Say what engines make of layers that they fuse and that have different schemes.

    Args:
        spec: The model.
        schemes: Full layer name -> scheme; layers left plain are not in it.

    Returns:
        A sentence for the user; None where all layers of a fused matrix are alike.
    """
    split = []
    for group in fused_groups(spec):
        if len({schemes.get(name) for name in group}) > 1:
            split.append(group)
    if not split:
        return None
    bits = []
    for name in split[0]:
        scheme = schemes.get(name)
        width = "plain" if scheme is None else f"{scheme.bits} bits"
        bits.append(f"{name.rpartition('.')[2]} {width}")
    return (
        f"{len(split)} groups of layers that engines keep in one matrix have different schemes "
        f"(first {split[0][0].rpartition('.')[0]}: {', '.join(bits)}). vLLM does not load such a "
        "file; slim, transformers and llama.cpp (quant.format=gguf) do."
    )


def check_plain(spec: ModelSpec) -> None:
    """Check that a model can be quantized.

    Args:
        spec: The model.

    Raises:
        SlimError: It is quantized already, has an adapter, or is of an unknown family.
    """
    spec.family  # noqa: B018 - refuses families whose parts are unknown
    spec.require_plain("Quantize the model it was made from.")


def check_groups(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> None:
    """Check that groups divide the inputs of their layers.

    Args:
        spec: The model.
        schemes: Full layer name -> scheme.

    Raises:
        SlimError: They do not; the message names the sizes that fit.
    """
    inputs = {name: columns for name, (_, columns) in layer_shapes(spec).items()}
    inputs |= dict.fromkeys((spec.family.head, spec.family.embeddings), spec.hidden_size)
    for name, scheme in schemes.items():
        if inputs[name] % scheme.group(inputs[name]) == 0:
            continue
        widths = {inputs[layer] for layer in schemes}
        fits = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
        use = f"quant.group_size={WHOLE_ROW} (whole rows)"
        if fits:
            *smaller, largest = map(str, fits)
            others = ", ".join([*smaller, f"{WHOLE_ROW} (whole rows)"])
            use = f"quant.group_size={largest}; these fit all layers, too: {others}"
        raise SlimError(
            f"quant.group_size={scheme.group_size} does not divide the {inputs[name]} inputs of "
            f"{name} in {spec.name}.\nUse {use}."
        )

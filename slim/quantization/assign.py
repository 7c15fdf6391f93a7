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
    """Raise ``SlimError`` for overrides that are no mapping of patterns to settings that a scheme
    has."""
    if not isinstance(overrides, Mapping):
        raise SlimError(
            f"quant.overrides={overrides}: must map layer names to settings, such as "
            "'quant.overrides={*.down_proj:{bits:8}}'."
        )
    for pattern, settings in overrides.items():
        if not isinstance(settings, Mapping):
            raise SlimError(
                f"quant.overrides: '{pattern}' is given {settings}. It takes settings in braces, such as {{bits:8}}; "
                f"bits:{PLAIN_BITS} leaves a layer as it is."
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
    """Return full layer name -> scheme, with ``overrides`` applied in their order; layers left
    plain are not in it.

    schemes: of the blocks' layers before overrides. A pattern is a whole name with ``*`` for
    anything. Raises ``SlimError`` for patterns that no layer has, and for groups that do not divide
    a layer's inputs."""
    family, found = spec.family, dict(schemes)
    if lm_head or (embeddings and spec.tied):
        found[family.head] = HEAD_SCHEME
    if embeddings:
        found[family.embeddings] = HEAD_SCHEME
    for pattern, settings in overrides.items():
        names = [name for name in found if fnmatchcase(name, pattern)]
        if not names:
            raise SlimError(
                f"quant.overrides: '{pattern}' is not the name of any quantised layer of {spec.name}. "
                f"Names look like '{next(iter(schemes))}'; * stands for anything, such as '*.down_proj'."
            )
        for name in names:
            found[name] = replace(found[name], **settings)
    found = {name: scheme for name, scheme in found.items() if scheme.bits != PLAIN_BITS}
    if not found:
        raise SlimError("quant.overrides leave no layer to quantise. Use quant=none for that.")
    check_groups(spec, found)
    return found


def pinned_layers(names: Iterable[str], overrides: Mapping[str, Mapping]) -> set[str]:
    """Return the layers whose bits an override sets."""
    patterns = [pattern for pattern, settings in overrides.items() if "bits" in settings]
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def check_plain(spec: ModelSpec) -> None:
    """Raise ``SlimError`` if ``spec`` is quantised already or of an unknown family."""
    spec.family  # noqa: B018 - refuses families whose parts are unknown
    spec.require_plain("Quantize the model it was made from.")


def check_groups(spec: ModelSpec, schemes: Mapping[str, Scheme]) -> None:
    """Raise ``SlimError`` if a layer's groups do not divide its inputs."""
    inputs = {name: columns for name, (_, columns) in layer_shapes(spec).items()}
    inputs |= dict.fromkeys((spec.family.head, spec.family.embeddings), spec.hidden_size)
    bad = [name for name, scheme in schemes.items() if inputs[name] % scheme.group(inputs[name])]
    if bad:
        fits = [size for size in GROUP_SIZES if all(inputs[name] % size == 0 for name in schemes)]
        raise SlimError(
            f"quant.group_size={schemes[bad[0]].group_size} does not divide the {inputs[bad[0]]} inputs of {bad[0]} "
            f"in {spec.name}. Sizes that fit all layers: {', '.join(map(str, [*fits, WHOLE_ROW]))}."
        )

"""Whether a checkpoint's files and its ``config.json`` are of the same model: every tensor's name
and shape against the class that transformers builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import empty_model
from slim.core.errors import SlimError

if TYPE_CHECKING:
    from torch import nn

PLAIN = ("F64", "F32", "BF16", "F16")  # safetensors' names of the types of plain weights
NAMED = 3  # names in a message
BELONG = "The config and the weights are not of the same model."


def verify(checkpoint: Checkpoint) -> None:
    """Compare a checkpoint's tensors with the model's class, built without weights.

    Layers that the ``quantization_config`` packs are left to the loader of their format; families
    that slim does not know to transformers.

    Args:
        checkpoint: What to check.

    Raises:
        SlimError: Tensors are missing, have another shape, or belong to nothing in the model.
    """
    if not checkpoint.spec.known:
        return
    model = empty_model(checkpoint)
    packed = packed_modules(checkpoint, model)
    expected = model.state_dict()
    if checkpoint.spec.tied:  # the embedding is the head
        expected.pop(f"{checkpoint.spec.family.head}.weight", None)
    tensors = {}
    unused = []
    for name, entry in checkpoint.tensors.items():
        if is_inside(name, packed):
            continue
        tensors[name] = entry
        if name not in expected:
            unused.append(name)
    refuse_unused(checkpoint, unused)
    if checkpoint.spec.is_encoder:  # a head for masked tokens shares the embedding, and its bias
        for name in getattr(model, "_tied_weights_keys", None) or ():
            if name not in tensors:
                expected.pop(name, None)
    plain = [name for name in expected if not is_inside(name, packed)]
    refuse_missing_tensors(checkpoint, [name for name in plain if name not in tensors])
    for name in plain:
        _, dtype, stored_shape = tensors[name]
        if stored_shape != tuple(expected[name].shape):
            refuse_shape(checkpoint, name, stored_shape, tuple(expected[name].shape))
        if dtype not in PLAIN:
            raise SlimError(
                f"{name} in {checkpoint.folder} is stored as {dtype}, and nothing says how to read "
                f"it as a weight. slim reads {', '.join(PLAIN)}, and float8."
            )


def packed_modules(checkpoint: Checkpoint, model: nn.Module) -> set[str]:
    """Return the linear layers and embeddings that the files do not hold as plain weights.

    Args:
        checkpoint: A checkpoint.
        model: Its model, without weights.
    """
    from torch import nn

    if checkpoint.spec.quantization is None:
        return set()
    names = set()
    for name, part in model.named_modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            names.add(name)
    return names


def is_inside(name: str, modules: set[str]) -> bool:
    """Whether a tensor belongs to one of the modules: its name has one of theirs in front.

    Args:
        name: Of the tensor, such as ``model.layers.0.mlp.up_proj.weight``.
        modules: Names of modules.
    """
    prefix, dot, _ = name.rpartition(".")
    while dot:
        if prefix in modules:
            return True
        prefix, dot, _ = prefix.rpartition(".")
    return False


def refuse_unused(checkpoint: Checkpoint, names: list[str]) -> None:
    """Raise ``SlimError`` for tensors of the files that the model has no place for.

    Args:
        checkpoint: That they are in.
        names: Of the tensors; nothing happens without any.
    """
    if names:
        blocks = checkpoint.spec.blocks
        raise SlimError(
            f"{checkpoint.folder} holds {len(names)} tensors that its config.json does not mention "
            f"({listed(names)}; num_hidden_layers={blocks}): they would be ignored.\n{BELONG}"
        )


def refuse_missing_tensors(checkpoint: Checkpoint, names: list[str]) -> None:
    """Raise ``SlimError`` for weights of the model that the files do not hold.

    Args:
        checkpoint: That lacks them.
        names: Of the weights; nothing happens without any.
    """
    if names:
        raise SlimError(
            f"{checkpoint.folder} lacks {len(names)} weights its config asks for, "
            f"first '{names[0]}'."
        )


def refuse_shape(
    checkpoint: Checkpoint, name: str, stored: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    """Raise ``SlimError`` for a tensor of another shape than the model's.

    Args:
        checkpoint: That the tensor is in.
        name: Of the tensor.
        stored: Its shape in the file.
        wanted: The shape that the model has for it.
    """
    raise SlimError(
        f"{name} in {checkpoint.folder} is {shape(stored)}, "
        f"but config.json asks for {shape(wanted)}. {BELONG}"
    )


def listed(names: list[str]) -> str:
    """Return the first names, and that there are more."""
    shown = ", ".join(names[:NAMED])
    if len(names) > NAMED:
        return f"{shown}, ..."
    return shown


def shape(sizes: tuple[int, ...]) -> str:
    """Return a shape as people write it: ``64 x 128``."""
    return " x ".join(map(str, sizes)) or "a single number"

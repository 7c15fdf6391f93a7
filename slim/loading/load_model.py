"""Loading a checkpoint for use: plain or packed weights, an adapter applied."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.core.console import hide_library_bars
from slim.core.errors import SlimError
from slim.models.spec import resolve_dtype
from slim.quantization.formats import read_config

# modules that load a format's files: load(checkpoint, dtype, device, trainable) and
# use_fast_kernels(model); named, not imported, as each brings torch
PACKED = "slim.loading.packed"
LOADERS = {"bitsandbytes": "slim.loading.bitsandbytes"}


def load_model(
    folder: Path | str, dtype: str = "auto", device: str = "cpu", trainable: bool = False
):
    """Load a checkpoint for use, in evaluation mode; packed weights as ``QuantLinear`` layers, an
    adapter applied.

    dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU, the stored
        type elsewhere.
    trainable: keep packed weights in a layout that gradients can pass, for adapters on top of them.
    Raises ``SlimError`` where weights are missing from the file or have other shapes than the
    config says."""
    hide_library_bars()
    checkpoint = open_checkpoint(folder)
    model = _load_base(checkpoint, resolve_dtype(checkpoint.spec, dtype, device), device, trainable)
    if checkpoint.spec.adapter is not None:
        from slim.loading.adapters import attach_adapter

        attach_adapter(model, checkpoint)
    return model


def _load_base(checkpoint: Checkpoint, wanted: str, device: str, trainable: bool):
    """Load the weights of :func:`load_model` in the type ``wanted``."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = checkpoint.folder
    if checkpoint.spec.quantization is not None:
        return loader(checkpoint).load(checkpoint, wanted, device, trainable)
    check_shapes(checkpoint)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, wanted),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random values
        raise SlimError(
            f"{folder} lacks {len(missing)} weights its config asks for, first '{missing[0]}'."
        )
    return model.to(device).eval()


def loader(checkpoint: Checkpoint) -> ModuleType:
    """Return the module that loads a quantized checkpoint and knows its kernels.

    Raises:
        SlimError: slim does not read the format.
    """
    stored = read_config(checkpoint.spec.quantization, str(checkpoint.folder))
    return importlib.import_module(LOADERS.get(stored.format.name, PACKED))


def import_libraries(checkpoint: Checkpoint) -> None:
    """Import what loading the checkpoint imports, so that it is not measured as the model's own."""
    if checkpoint.spec.quantization is not None:
        loader(checkpoint)
        read_config(checkpoint.spec.quantization).format.import_library()


def use_fast_kernels(model, folder: Path | str) -> bool:
    """Let a loaded model run by kernels that only serve to measure speed.

    Args:
        model: What :func:`load_model` returned.
        folder: The checkpoint it came from.

    Returns:
        Whether the model was changed, so that nothing else should be done with it.
    """
    checkpoint = open_checkpoint(folder)
    if checkpoint.spec.quantization is None:
        return False
    return loader(checkpoint).use_fast_kernels(model)


def check_shapes(checkpoint: Checkpoint) -> None:
    """Raise ``SlimError`` if a block's linear layer has another shape in the file than the config
    says."""
    spec = checkpoint.spec
    for block in range(spec.blocks if spec.known else 0):
        for name, shape in spec.block_linears(block).items():
            full = f"{spec.family.blocks}.{block}.{name}.weight"
            found = checkpoint.tensors.get(full, ("", "", shape))[2]
            if found != shape:
                raise SlimError(
                    f"{full} in {checkpoint.folder} is {' x '.join(map(str, found))}, but config.json asks for "
                    f"{' x '.join(map(str, shape))}. The config and the weights are not of the same model."
                )

"""Loading a checkpoint for use: plain or packed weights, an adapter applied."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.meta_model import auto_class, empty_model, model_config
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.verify import refuse_missing_tensors, verify
from slim.core.console import hide_library_bars
from slim.loading.generation import load_generation_config, read_generation_config
from slim.models.spec import resolve_dtype
from slim.quantization.formats import read_config

# modules that load a format's files: load(checkpoint, dtype, device, trainable) and
# use_fast_kernels(model); named, not imported, as each brings torch
PACKED = "slim.loading.packed"
LOADERS = {"bitsandbytes": "slim.loading.bitsandbytes", "gguf": "slim.loading.gguf"}


def load_model(
    folder: Path | str, dtype: str = "auto", device: str = "cpu", trainable: bool = False
):
    """Load a checkpoint for use, in evaluation mode; packed weights as ``QuantLinear`` layers, an
    adapter applied.

    Args:
        folder: The checkpoint folder.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU, the
            stored type elsewhere.
        device: ``"cpu"`` or ``"cuda"``.
        trainable: Whether to keep packed weights in a layout that gradients can pass, for adapters
            on top of them.

    Raises:
        SlimError: Names or shapes of tensors are not those of the class that the config describes.
    """
    hide_library_bars()
    checkpoint = open_checkpoint(folder)
    model = _load_base(checkpoint, resolve_dtype(checkpoint.spec, dtype, device), device, trainable)
    if checkpoint.spec.adapter is not None:
        from slim.loading.adapters import attach_adapter

        attach_adapter(model, checkpoint)
    return model


def _load_base(checkpoint: Checkpoint, wanted: str, device: str, trainable: bool):
    """Load the weights of :func:`load_model` in the type ``wanted``."""
    verify(checkpoint)
    if checkpoint.spec.quantization is not None:
        return loader(checkpoint).load(checkpoint, wanted, device, trainable)
    if checkpoint.is_plain:
        return _from_folder(checkpoint, wanted).to(device).eval()
    return _from_tensors(checkpoint, wanted).to(device).eval()


def _from_folder(checkpoint: Checkpoint, wanted: str):
    """Load plain weights by transformers' own way through the folder."""
    import torch

    model_config(checkpoint)  # names the entry that transformers refuses
    read_generation_config(checkpoint)  # likewise
    model, info = auto_class(checkpoint.spec).from_pretrained(
        checkpoint.folder,
        dtype=getattr(torch, wanted),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random values
        refuse_missing_tensors(checkpoint, missing)
    return model


def _from_tensors(checkpoint: Checkpoint, wanted: str):
    """Load plain weights through slim's reader, where the files alone say something else."""
    import torch

    reader = TensorReader(checkpoint)
    state = {name: reader.read(name) for name in checkpoint.tensors}
    model, info = type(empty_model(checkpoint)).from_pretrained(
        None,
        config=model_config(checkpoint),
        state_dict=state,
        dtype=getattr(torch, wanted),
        output_loading_info=True,
    )
    refuse_missing_tensors(checkpoint, sorted(info["missing_keys"]))
    load_generation_config(model, checkpoint)
    return model


def loader(checkpoint: Checkpoint) -> ModuleType:
    """Return the module that loads a quantized checkpoint and knows its kernels.

    Args:
        checkpoint: The checkpoint.

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

"""Loading a checkpoint in GGUF's blocks (``quant.format=gguf``): weights are dequantized once, so
that every figure is that of the numbers in ``model.gguf``, rounded offsets included.

The model then runs as a plain one does. How fast the file is in llama.cpp is not measured here.
"""

from __future__ import annotations

import torch
from torch import nn

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import MetaModel
from slim.gguf.format import read_blocks
from slim.loading.packed import (
    load_generation_config,
    load_plain,
    packed_scheme,
    require_all,
    tie,
    use_fast_kernels,
)
from slim.quantization.formats import read_config

__all__ = ["load", "use_fast_kernels"]


def load(checkpoint: Checkpoint, dtype: str, device: str, trainable: bool) -> nn.Module:
    """Load a checkpoint in GGUF's blocks, in evaluation mode.

    Args:
        checkpoint: The folder.
        dtype: Type of all weights and activations, such as ``"bfloat16"``.
        device: Where to.
        trainable: Makes no difference: weights are plain.

    Raises:
        SlimError: Tensors are missing or do not fit the config.
    """
    stored = read_config(checkpoint.spec.quantization, str(checkpoint.folder))
    meta_model = MetaModel(checkpoint, device)
    model, wanted = meta_model.model, getattr(torch, dtype)
    tied_head = model.get_output_embeddings() if checkpoint.spec.tied else None
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if packed_scheme(stored, meta_model.reader, name, module is tied_head) is None:
            continue
        weight = read_blocks(meta_model.reader, name, *module.weight.shape, stored, wanted)
        weight = weight.to(device)
        module.weight = nn.Parameter(weight, requires_grad=False)
    load_plain(model, meta_model.reader, wanted, device)
    tie(model, checkpoint.spec.tied, device)
    require_all(model, meta_model.reader)
    model.config.dtype = wanted
    load_generation_config(model, checkpoint)
    return model.eval()

"""The check after every stage: what was written is opened and loaded once more, on a few tokens.

Two ways through the files must give the same logits: the loader that evaluation uses, with its
packed layers and kernels, and a plain model into which slim's reader puts every tensor, packed
layers as the numbers they stand for. A stage may also hand over what it meant
(``Context.expected``), which the loaded model must give. Where memory is short, only names and
shapes are compared."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.verify import verify
from slim.core.errors import SlimError
from slim.core.hardware import available_memory
from slim.core.lazy import LazyModule
from slim.quantization.formats import read_config
from slim.quantization.storage import packed_schemes, weight_bytes

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

TOKENS = 12  # looked at
TOLERANCE = 1e-2  # |difference| / |logits|: kernels sum in other orders, and in other types
MEMORY_SHARE = 0.5  # of the free memory, at most
UNPACKED_BY_LIBRARY = ("bitsandbytes",)  # formats whose files only their library reads


def check_result(folder: Path) -> None:
    """Load a stage's result as evaluation will, and compare it with what its files say.

    Args:
        folder: The checkpoint that a stage has written.

    Raises:
        SlimError: It cannot be loaded, its logits are not finite, or the two ways differ.
    """
    checkpoint = open_checkpoint(folder)
    verify(checkpoint)
    if not checkpoint.spec.known or not has_memory(checkpoint):
        return
    loaded = logits(load(folder), checkpoint)
    if not torch.isfinite(loaded).all():
        # the evaluation says which layer it is; a model may be damaged on purpose
        return
    if is_readable(checkpoint):
        require_equal(loaded, logits(read_plainly(checkpoint), checkpoint), folder)


def has_memory(checkpoint: Checkpoint) -> bool:
    """Whether a float32 copy of the model takes only a part of the free memory."""
    free = available_memory("cpu")
    return free is None or weight_bytes(checkpoint.spec, "float32") < MEMORY_SHARE * free


def load(folder: Path) -> nn.Module:
    """Load a checkpoint in float32, on the CPU."""
    from slim.loading.load_model import load_model

    return load_model(folder, "float32")


def probe(checkpoint: Checkpoint) -> torch.Tensor:
    """Return a few tokens spread over the vocabulary, int64 [1, TOKENS]."""
    step = max(1, checkpoint.spec.vocab_size // TOKENS)
    return (torch.arange(TOKENS) * step % checkpoint.spec.vocab_size)[None]


def logits(model: nn.Module, checkpoint: Checkpoint) -> torch.Tensor:
    """Return the logits of the probe, float32 [TOKENS, vocabulary]."""
    with torch.inference_mode():
        return model(probe(checkpoint), use_cache=False).logits[0].float()


def require_equal(first: torch.Tensor, second: torch.Tensor, folder: Path) -> None:
    """Raise ``SlimError`` for logits that differ by more than rounding."""
    difference = float((first - second).norm() / second.norm().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise SlimError(
            f"The result in {folder.name} does not compute what its files say: logits differ by "
            f"{difference:.2g} of their size. It is not kept. Please report this as a bug of slim."
        )


def is_readable(checkpoint: Checkpoint) -> bool:
    """Whether slim's reader can read all of it: not what only a library or PEFT can."""
    spec = checkpoint.spec
    if spec.adapter is not None:
        return False
    if spec.quantization is None:
        return True
    return read_config(spec.quantization, spec.name).format.name not in UNPACKED_BY_LIBRARY


def read_plainly(checkpoint: Checkpoint) -> nn.Module:
    """Return the checkpoint's model with every tensor read by slim's reader, float32.

    Args:
        checkpoint: A checkpoint of plain or packed weights.
    """
    from slim.checkpoints.meta_model import MetaModel  # loads torch

    spec = checkpoint.spec
    meta_model = MetaModel(checkpoint)
    model, reader, packed = meta_model.model, meta_model.reader, packed_schemes(spec)
    stored = read_config(spec.quantization, spec.name) if packed else None
    state = {}
    for name in model.state_dict():
        layer = name.removesuffix(".weight")
        if name in reader:
            state[name] = reader.read(name).float()
        elif layer in packed:
            rows, columns = spec.matrices()[layer]
            state[name] = stored.dense_weight(reader, layer, rows, columns)
    model.load_state_dict(state, strict=False, assign=True)
    if spec.tied:
        model.tie_weights()
    return model.eval()

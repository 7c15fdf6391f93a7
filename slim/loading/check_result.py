"""The check after every stage: what was written is opened and loaded once more, on a few tokens.

Two ways through the files must give the same logits: the loader that evaluation uses, with its
packed layers and kernels, and a plain model into which slim's reader puts every tensor, packed
layers as the numbers they stand for. A stage may also hand over what it meant
(``Context.expected``): what leaves the last block, which the loaded model must give. Where memory
is short, only names and shapes are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.stage import Expected
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


def check_result(folder: Path, expected: Callable[[], Expected] | None = None) -> None:
    """Load a stage's result as evaluation will, and compare it with what its files say and with
    what the stage meant.

    Args:
        folder: The checkpoint that a stage has written.
        expected: Gives what the stage meant; None: it does not say.

    Raises:
        SlimError: It cannot be loaded, the two ways differ, or it computes something else than was
            meant.
    """
    checkpoint = open_checkpoint(folder)
    verify(checkpoint)
    if not checkpoint.spec.known or not has_memory(checkpoint):
        return
    model = load(folder)
    loaded = logits(model, checkpoint)
    if expected is not None:
        require_meant(model, checkpoint, expected())
    del model
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
    """Return what the model gives for the probe: logits, float32 [TOKENS, vocabulary] or [classes],
    or hidden states, float32 [TOKENS, hidden]."""
    with torch.inference_mode():
        return run(model, probe(checkpoint))[0][0].float()


def run(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a model gives for tokens, int64 [1, length], without a cache."""
    settings = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    return model(tokens, return_dict=False, **settings)


def require_equal(first: torch.Tensor, second: torch.Tensor, folder: Path) -> None:
    """Raise ``SlimError`` for logits that differ by more than rounding."""
    difference = float((first - second).norm() / second.norm().clamp(min=1e-12))
    if not difference <= TOLERANCE:
        raise SlimError(
            f"The result in {folder.name} does not compute what its files say: logits differ by "
            f"{difference:.2g} of their size. It is not kept. Please report this as a bug of slim."
        )


def require_meant(model: nn.Module, checkpoint: Checkpoint, expected: Expected) -> None:
    """Raise ``SlimError`` for a model whose last block gives something else than a stage meant.

    Args:
        model: The result, as it was loaded.
        checkpoint: The result.
        expected: What the stage meant; nothing is compared where it is not finite.
    """
    if not torch.isfinite(expected.hidden).all():
        return
    caught = []
    last = model.get_submodule(checkpoint.spec.family.blocks)[-1]
    hook = last.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        with torch.inference_mode():
            run(model, expected.tokens)
    finally:
        hook.remove()
    # some families return a tuple whose first entry is the output
    output = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
    difference = output.reshape(expected.hidden.shape).float() - expected.hidden
    # token by token: the first one's numbers are often a thousand times those of the others
    share = difference.norm(dim=-1) / expected.hidden.norm(dim=-1).clamp(min=1e-12)
    if not share.max() <= expected.tolerance:
        raise SlimError(
            f"The result in {checkpoint.folder.name} does not compute what the stage meant: what "
            f"leaves its last block differs by {float(share.max()):.2g} of its size. It is not "
            "kept. Please report this as a bug of slim."
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

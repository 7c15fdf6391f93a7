"""What enters a model's first block, and how the model calls each of its blocks.

Only the model itself knows the arguments of its blocks (mask, positions, rotary angles; sliding
windows in some of them). So its own forward pass runs once per batch with the blocks replaced by a
recorder; single blocks can then be called with what was recorded. Sequential calibration, scoring
on a loaded model and the repair of removed blocks all begin here.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.checkpoints.meta_model import MetaModel
from slim.core.lazy import LazyModule
from slim.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

# the widest activation of a batch in a block, in float32, takes about this many bytes
BATCH_BYTES = 2**22

BlockCall = tuple[tuple, dict]  # positional and keyword arguments after the hidden states


class StopForward(Exception):
    """Ends a forward pass as soon as what it was run for is there."""


@dataclass
class CapturedInputs:
    """What enters block 0 for all calibration samples, and how the model calls its blocks.

    Attributes:
        dtype: type the model is stored in, such as ``"bfloat16"``.
        hidden: per batch, float32 [samples, length, hidden] on the CPU. Sequential calibration
            replaces it block by block by the input of the next one.
        calls: number of samples in a batch -> the arguments of every block besides the hidden
            states.
    """

    dtype: str = "float32"
    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: dict[int, list[BlockCall]] = field(default_factory=dict)


def capture_inputs(meta_model: MetaModel, tokens: torch.Tensor) -> CapturedInputs:
    """Run a model up to its first block on all calibration samples.

    Args:
        meta_model: the model; only its embeddings are loaded, and dropped again.
        tokens: int64 [samples, length].

    Returns:
        The inputs of block 0 and the arguments of all blocks.
    """
    captured = CapturedInputs(meta_model.spec.dtype)
    meta_model.load(meta_model.family.embedding_module)
    for batch in split_samples(tokens, meta_model.spec):
        hidden, calls = block_calls(
            meta_model.model.base_model, meta_model.blocks, batch.to(meta_model.device)
        )
        captured.hidden.append(hidden.to("cpu", torch.float32))
        # masks and positions depend on the shape of a batch alone
        captured.calls.setdefault(len(batch), calls)
    meta_model.drop(meta_model.family.embedding_module)
    return captured


def block_calls(
    base_model: nn.Module, blocks: Sequence[nn.Module], tokens: torch.Tensor
) -> tuple[torch.Tensor, list[BlockCall]]:
    """Record what a model's forward pass hands to its blocks, without running any of them.

    Args:
        base_model: the model without its head.
        blocks: its decoder blocks, in order.
        tokens: int64 [samples, length], on the model's device.

    Returns:
        The input of block 0, [samples, length, hidden], and the other arguments of every block.
    """
    inputs: list[torch.Tensor] = []
    calls: list[BlockCall] = []

    def record(hidden, *args, **kwargs):
        inputs.append(hidden)
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise StopForward
        return hidden

    with torch.no_grad(), replaced_forwards(dict.fromkeys(blocks, record)):
        # encoders have no cache to leave out
        settings = {"use_cache": False} if hasattr(base_model.config, "use_cache") else {}
        try:
            base_model(tokens, **settings)
        except StopForward as stop:
            # tensors in the frames would otherwise wait for the garbage collector
            traceback.clear_frames(stop.__traceback__)
    return inputs[0], calls


def run_block(block: nn.Module, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
    """Return a block's output, [samples, length, hidden].

    Args:
        block: a decoder block with its weights.
        hidden: its input, [samples, length, hidden].
        call: its other arguments, as recorded by :func:`block_calls` for a batch of this shape.
    """
    args, kwargs = call
    output = block(hidden, *args, **kwargs)
    # some families return a tuple whose first entry is the output
    return output[0] if isinstance(output, tuple) else output


def last_hidden(
    meta_model: MetaModel,
    tokens: torch.Tensor,
    blocks: Sequence[int],
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return what leaves the last of some blocks, one block in memory at a time.

    Args:
        meta_model: the model.
        tokens: int64 [1, length].
        blocks: numbers of the blocks that run, in their order.
        hidden: what enters the first of them, float32 [1, length, hidden]; None: the embeddings.

    Returns:
        float32 [length, hidden], on the CPU.
    """
    captured = capture_inputs(meta_model, tokens)
    if hidden is None:
        hidden = captured.hidden[0]
    hidden = hidden.to(meta_model.device)
    for index in blocks:
        name = f"{meta_model.family.blocks}.{index}"
        with torch.no_grad():
            hidden = run_block(meta_model.load(name), hidden, captured.calls[1][index])
        meta_model.drop(name)
    return hidden[0].cpu()


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Give modules another ``forward`` for a while; their attributes stay as they are.

    Args:
        forwards: module -> what is called instead of its ``forward``.
    """
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def split_samples(tokens: torch.Tensor, spec: ModelSpec) -> tuple[torch.Tensor, ...]:
    """Split samples into batches whose activations inside a block stay below ``BATCH_BYTES``.

    Args:
        tokens: int64 [samples, length].
        spec: the model that will run on them.
    """
    sample_bytes = 4 * widest_layer(spec) * tokens.shape[1]
    return tokens.split(max(1, BATCH_BYTES // sample_bytes))


def widest_layer(spec: ModelSpec) -> int:
    """Return the largest number of inputs or outputs of a linear layer in a block."""
    return max(max(shape) for shape in spec.block_linears().values())

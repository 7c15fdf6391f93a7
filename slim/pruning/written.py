"""Whether the file that a pruning has written holds what was meant: read back tensor by tensor and
compared with the source, whatever the size of the model."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from slim.calibration.capture import last_hidden
from slim.calibration.sequential import EXPECTED_TOKENS
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import MetaModel
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.stage import Expected
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.pruning.masks import linear_weights

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

TOLERANCE = 0.01  # float32 on both sides; kernels sum in another order


def check_blocks(
    source: Checkpoint, result: Checkpoint, kept: list[int], changed: Collection[str] = ()
) -> None:
    """Compare the blocks that stay, and what is outside them, with the source's.

    Args:
        source: The model before.
        result: The model without some blocks.
        kept: Numbers in the source of the result's blocks, in their order.
        changed: Names in the result of tensors that are meant to differ.

    Raises:
        SlimError: A tensor differs.
    """
    prefix = result.spec.family.blocks
    before, after = TensorReader(source), TensorReader(result)
    for name in result.tensors:
        if name in changed:
            continue
        origin = name
        if name.startswith(f"{prefix}."):
            number, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            origin = f"{prefix}.{kept[int(number)]}.{rest}"
        if origin not in before or not same(after.read(name), before.read(origin)):
            raise difference(name, result, f"'{origin}' of the source")
        before.release()
        after.release()


def check_zeros(source: Checkpoint, result: Checkpoint, zeros: int, others_stay: bool) -> None:
    """Compare a weight-pruned model with its source.

    Args:
        source: The model before.
        result: The model with zeros.
        zeros: How many the blocks' linear layers are meant to have.
        others_stay: Whether the weights that are not zero are the source's.

    Raises:
        SlimError: Something outside the linear layers differs, a weight is neither zero nor what
            it was, or there are more or fewer zeros.
    """
    pruned = set(linear_weights(source))
    before, after = TensorReader(source), TensorReader(result)
    counted = 0
    for name in result.tensors:
        weight = after.read(name)
        if name not in pruned:
            if not same(weight, before.read(name)):
                raise difference(name, result, "the source's")
        else:
            nonzero = weight != 0
            counted += weight.numel() - int(nonzero.sum())
            if others_stay and not torch.equal(weight[nonzero], before.read(name)[nonzero]):
                raise difference(name, result, "the source's")
        before.release()
        after.release()
    if counted != zeros:
        raise SlimError(
            f"The result in {result.folder.name} has {counted:,} zeros in its linear layers, and "
            f"{zeros:,} were meant. It is not kept. Please report this as a bug of slim."
        )


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal bit by bit, NaN included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def difference(name: str, result: Checkpoint, meant: str) -> SlimError:
    """Return the error for a tensor that is another than was meant.

    Args:
        name: Of the tensor.
        result: That it is in.
        meant: Which tensor it should equal.
    """
    return SlimError(
        f"{name} reads back from {result.folder.name} as other numbers than {meant}. The result is "
        "not kept. Please report this as a bug of slim."
    )


def expected_of_blocks(
    source: Checkpoint,
    blocks: list[int],
    device: str,
    tokens: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> Expected:
    """Return what a model computes with only some of its blocks, each called as in the source.

    Args:
        source: The model with all blocks.
        blocks: Those that run, in their order.
        device: Where they run.
        tokens: int64 [1, length]; None: some, spread over the vocabulary.
        hidden: What enters the first of the blocks, float32 [1, length, hidden]; None: the
            embeddings.
    """
    if tokens is None:
        step = max(1, source.spec.vocab_size // EXPECTED_TOKENS)
        tokens = (torch.arange(EXPECTED_TOKENS) * step % source.spec.vocab_size)[None]
    output = last_hidden(MetaModel(source, device), tokens, blocks, hidden)
    return Expected(tokens, output, TOLERANCE)

"""Repair of removed blocks: a linear map over the gap, folded into the projection in front of it.

Without blocks l to l+n-1, block l-1 hands its output straight to block l+n. With z the input of
block l-1's down projection and r the residual stream beside it, that output is r + z W^T; block l+n
was trained on x, the dense model's hidden state there. So W is refitted to give what the gap lacks:

    W' = argmin |r + z W'^T - x|^2 + damping |W' - W|^2 = W + (x - r - z W^T)^T Z (Z^T Z +
    damping)^-1

in sums over the calibration tokens. r and z are taken from the model with all earlier gaps already
closed, x from the dense one, so each gap also makes up for what the ones before it left. Nothing is
added to the model. The idea of folding a map into that projection is ReplaceMe's (Shopkhoev et al.,
arXiv:2505.02819), whose map starts at the projection's output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from slim.calibration.capture import CapturedInputs, capture_inputs
from slim.calibration.hessian import Hessian
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import MetaModel, stored_dtype
from slim.checkpoints.shards import SHARD_BYTES, ShardWriter
from slim.checkpoints.writer import copy_companions, write_config
from slim.pruning.least_squares import solve


@dataclass
class Gap:
    """A run of removed blocks.

    block: the kept one in front. error_cut, error_bridged: |x' - x| / |x| behind the gap, without and with the fit.
    """

    block: int
    removed: list[int]
    error_cut: float = 0.0
    error_bridged: float = 0.0


@dataclass
class Pending:
    """The block in front of a gap, until the gap's end is known.

    tensors: of the block. inputs: z of its last projection, one tensor per batch, on the CPU.
    """

    tensors: dict[str, torch.Tensor]
    inputs: list[torch.Tensor] = field(default_factory=list)


def find_gaps(removed: list[int]) -> list[Gap]:
    """Return the runs of successive blocks in ``removed`` (ascending) that have a block in front of
    them."""
    gaps: list[Gap] = []
    for block in removed:
        if gaps and block == gaps[-1].removed[-1] + 1:
            gaps[-1].removed.append(block)
        else:
            gaps.append(Gap(block - 1, [block]))
    return [gap for gap in gaps if gap.block >= 0]


class Bridging:
    """Writes a checkpoint without some blocks, gaps bridged; one block in memory at a time, hidden
    states on the CPU.

    removed: blocks, ascending. tokens: int64 [samples, length]. damping: in means of the Gram
    matrix's diagonal."""

    def __init__(
        self,
        source: Checkpoint,
        removed: list[int],
        tokens: torch.Tensor,
        damping: float,
        device: str,
    ):
        self.source, self.removed, self.damping, self.device = source, removed, damping, device
        self.meta_model = MetaModel(source, device)
        self.family = self.meta_model.family
        self.last = self.family.linear_groups[-1].linears[0]
        self.captured: CapturedInputs = capture_inputs(self.meta_model, tokens)
        self.pruned = list(self.captured.hidden)  # hidden states of the model without the blocks
        self.gaps = {gap.removed[-1]: gap for gap in find_gaps(removed)}
        self.in_front = {gap.block for gap in self.gaps.values()}
        self.pending: Pending | None = None

    def write(
        self,
        target: Path,
        shard_bytes: int = SHARD_BYTES,
        advance: Callable[[], object] = lambda: None,
    ) -> list[Gap]:
        """Write the checkpoint into ``target`` and return the gaps with their errors. ``advance``:
        after each block."""
        writer = ShardWriter(target, shard_bytes)
        prefix, depth = self.family.blocks, self.source.spec.blocks
        kept = [block for block in range(depth) if block not in self.removed]
        for name in self.source.tensors:
            if not name.startswith(prefix + "."):
                writer.add(name, self.meta_model.reader.read(name))
        for block in range(depth):
            for done, tensors in self._block(block):
                for name, tensor in tensors.items():
                    writer.add(f"{prefix}.{kept.index(done)}.{name}", tensor)
            advance()
        writer.close()
        write_config(self.source.spec.with_blocks(kept).config, target)
        copy_companions(self.source.folder, target)
        return list(self.gaps.values())

    def _block(self, index: int) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """Pass both hidden states through a block; return (block, tensors) of what is ready to be
        written."""
        name = f"{self.family.blocks}.{index}"
        block = self.meta_model.load(name)
        ready = []
        if index not in self.removed:
            tensors = dict(self.meta_model.reader.read_module(name))
            if index in self.in_front:
                self.pending = Pending(tensors)
            else:
                ready.append((index, tensors))
        if index <= max(self.gaps, default=-1):
            self._advance(block, index)
        if index in self.gaps:
            ready.append((self.gaps[index].block, self._close(self.gaps[index])))
        self.meta_model.drop(name)
        return ready

    def _advance(self, block: nn.Module, index: int) -> None:
        hook = None
        if index in self.in_front:
            keep = self.pending.inputs.append
            hook = block.get_submodule(self.last).register_forward_pre_hook(
                lambda _, args: keep(args[0].cpu())
            )
        if index not in self.removed:
            self.pruned = [self._run(block, index, hidden) for hidden in self.pruned]
        if hook is not None:
            hook.remove()
        self.captured.hidden = [self._run(block, index, hidden) for hidden in self.captured.hidden]

    def _run(self, block: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        args, kwargs = self.captured.calls[len(hidden)][index]
        with torch.no_grad():
            output = block(hidden.to(self.device), *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output).cpu()

    def _close(self, gap: Gap) -> dict[str, torch.Tensor]:
        """Fit the map over a gap, pass it to the hidden states, and return the tensors of the block
        in front."""
        inputs, tensors, self.pending = self.pending.inputs, self.pending.tensors, None
        weight = f"{self.last}.weight"
        hessian, cross = Hessian(inputs[0].shape[-1], self.device), 0
        for z, there, here in zip(inputs, self.captured.hidden, self.pruned, strict=True):
            z, missing = (
                z.to(self.device).flatten(0, 1),
                (there - here).to(self.device).flatten(0, 1),
            )
            hessian.add(z)
            cross = cross + z.T @ missing
        stored = stored_dtype(self.source.tensors[f"{self.family.blocks}.{gap.block}.{weight}"][1])
        old = tensors[weight].float().to(self.device)
        tensors[weight] = (old + solve(hessian.matrix(), cross, self.damping).T.float()).to(stored)
        change = tensors[weight].float() - old
        gap.error_cut = self._error()
        for batch, z in enumerate(inputs):
            self.pruned[batch] = self.pruned[batch] + (z.to(self.device) @ change.T).cpu()
        gap.error_bridged = self._error()
        return tensors

    def _error(self) -> float:
        """Return |x' - x| / |x| over all calibration tokens: x' of the pruned model, x of the dense
        one."""
        pairs = list(zip(self.pruned, self.captured.hidden, strict=True))
        difference = sum((here - there).double().square().sum() for here, there in pairs)
        return float((difference / sum(there.double().square().sum() for _, there in pairs)).sqrt())

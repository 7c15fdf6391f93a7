"""Repair of removed blocks: a linear map over the gap, folded into the projection before it.

Without blocks l to l+n-1, block l-1 hands its output straight to block l+n. With z the input of
block l-1's down projection and r the residual stream it is added to, that output is r + z W^T;
block l+n was trained on x, the dense model's hidden state there. So W is refitted to give what the
gap lacks:

    W' = argmin |r + z W'^T - x|^2 + damping |W' - W|^2
       = W + (x - r - z W^T)^T Z (Z^T Z + damping)^-1

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

from slim.calibration.capture import CapturedInputs, capture_inputs, run_block
from slim.calibration.hessian import Hessian
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import MetaModel, stored_dtype
from slim.checkpoints.shards import SHARD_BYTES, ShardWriter
from slim.checkpoints.writer import copy_companions, write_config
from slim.pruning.least_squares import solve


@dataclass
class Gap:
    """A run of removed blocks.

    Attributes:
        block: the kept block before it.
        removed: the blocks of the run, ascending.
        error_cut: |x' - x| / |x| after the gap without the fit, x' the hidden states of the pruned
            model and x those of the dense one.
        error_bridged: the same with the fit.
    """

    block: int
    removed: list[int]
    error_cut: float = 0.0
    error_bridged: float = 0.0


@dataclass
class Pending:
    """The block before a gap, until the gap's end is known.

    Attributes:
        tensors: of the block.
        inputs: z, the inputs of its last projection, one tensor per batch, on the CPU.
    """

    tensors: dict[str, torch.Tensor]
    inputs: list[torch.Tensor] = field(default_factory=list)


def find_gaps(removed: list[int]) -> list[Gap]:
    """Return the runs of successive blocks in ``removed`` (ascending) that a block comes before."""
    gaps: list[Gap] = []
    for block in removed:
        if gaps and block == gaps[-1].removed[-1] + 1:
            gaps[-1].removed.append(block)
        else:
            gaps.append(Gap(block - 1, [block]))
    return [gap for gap in gaps if gap.block >= 0]


class Reconstruction:
    """Writes a checkpoint without some blocks, gaps bridged; one block in memory at a time, hidden
    states on the CPU."""

    def __init__(
        self,
        source: Checkpoint,
        removed: list[int],
        tokens: torch.Tensor,
        damping: float,
        device: str,
    ):
        """Capture what enters the first block.

        Args:
            source: the model with all blocks.
            removed: blocks, ascending.
            tokens: int64 [samples, length].
            damping: ridge of the fits, in means of the Hessian's diagonal.
            device: torch device that blocks run on.
        """
        self.source = source
        self.removed = removed
        self.damping = damping
        self.device = device
        self.meta_model = MetaModel(source, device)
        self.family = self.meta_model.family
        self.last = self.family.linear_groups[-1].linears[0]
        # hidden states of the dense model, and of the one without the blocks
        self.dense: CapturedInputs = capture_inputs(self.meta_model, tokens)
        self.pruned = list(self.dense.hidden)
        self.gaps = {gap.removed[-1]: gap for gap in find_gaps(removed)}
        self.before_gaps = {gap.block for gap in self.gaps.values()}
        self.pending: Pending | None = None

    def write(
        self,
        target: Path,
        shard_bytes: int = SHARD_BYTES,
        advance: Callable[[], object] = lambda: None,
    ) -> list[Gap]:
        """Write the checkpoint.

        Args:
            target: folder.
            shard_bytes: size of a weight file, about.
            advance: called after each block of the source.

        Returns:
            The gaps with their errors.
        """
        writer = ShardWriter(target, shard_bytes)
        prefix = self.family.blocks
        kept = [block for block in range(self.source.spec.blocks) if block not in self.removed]
        for name in self.source.tensors:
            if not name.startswith(prefix + "."):
                writer.add(name, self.meta_model.reader.read(name))
        for block in range(self.source.spec.blocks):
            for finished, tensors in self._process(block):
                for name, tensor in tensors.items():
                    writer.add(f"{prefix}.{kept.index(finished)}.{name}", tensor)
            advance()
        writer.close()
        write_config(self.source.spec.with_blocks(kept).config, target)
        copy_companions(self.source.folder, target)
        return list(self.gaps.values())

    def hidden_after_gaps(self, length: int) -> tuple[torch.Tensor, int]:
        """Return what the written model makes of the first tokens, as far as blocks have run.

        Args:
            length: Number of tokens of the first sample.

        Returns:
            float32 [1, length, hidden], and the source's block that it enters next.
        """
        return self.pruned[0][:1, :length].clone(), max(self.gaps, default=-1) + 1

    def _process(self, index: int) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """Pass both hidden states through a block; return (block, tensors) of what is ready to be
        written."""
        name = f"{self.family.blocks}.{index}"
        block = self.meta_model.load(name)
        ready = []
        if index not in self.removed:
            tensors = dict(self.meta_model.reader.read_module(name))
            if index in self.before_gaps:  # to be refitted when the end of its gap is known
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
        """Replace the hidden states by the block's output: the dense model's always, the pruned
        one's if the block is kept."""
        hook = None
        if index in self.before_gaps:
            keep = self.pending.inputs.append
            hook = block.get_submodule(self.last).register_forward_pre_hook(
                lambda _, args: keep(args[0].cpu())
            )
        if index not in self.removed:
            self.pruned = [self._run(block, index, hidden) for hidden in self.pruned]
        if hook is not None:
            hook.remove()
        self.dense.hidden = [self._run(block, index, hidden) for hidden in self.dense.hidden]

    def _run(self, block: nn.Module, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return a block's output for a batch, on the CPU."""
        call = self.dense.calls[len(hidden)][index]
        with torch.no_grad():
            return run_block(block, hidden.to(self.device), call).cpu()

    def _close(self, gap: Gap) -> dict[str, torch.Tensor]:
        """Fit the map over a gap, pass it to the hidden states, and return the tensors of the block
        before it."""
        inputs = self.pending.inputs
        tensors = self.pending.tensors
        self.pending = None
        weight = f"{self.last}.weight"
        old = tensors[weight].float().to(self.device)
        stored = stored_dtype(self.source.tensors[f"{self.family.blocks}.{gap.block}.{weight}"][1])
        tensors[weight] = (old + self._fit(inputs)).to(stored)

        # what is stored counts, rounding included
        change = tensors[weight].float() - old
        gap.error_cut = self._error()
        for batch, z in enumerate(inputs):
            self.pruned[batch] = self.pruned[batch] + (z.to(self.device) @ change.T).cpu()
        gap.error_bridged = self._error()
        return tensors

    def _fit(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Return W' - W, float32 [hidden, in], for the projection with these inputs."""
        hessian = Hessian(inputs[0].shape[-1], self.device)
        cross = 0
        for z, dense, pruned in zip(inputs, self.dense.hidden, self.pruned, strict=True):
            z = z.to(self.device).flatten(0, 1)
            missing = (dense - pruned).to(self.device).flatten(0, 1)
            hessian.add(z)
            cross = cross + z.T @ missing
        return solve(hessian.matrix(), cross, self.damping).T.float()

    def _error(self) -> float:
        """Return |x' - x| / |x| over all calibration tokens: x' of the pruned model, x of the dense
        one."""
        difference = torch.zeros((), dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for pruned, dense in zip(self.pruned, self.dense.hidden, strict=True):
            difference += (pruned - dense).double().square().sum()
            total += dense.double().square().sum()
        return float((difference / total).sqrt())

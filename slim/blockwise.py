"""The walk through the blocks: one decoder block in memory at a time, whatever the depth of the model.

Every calibrated method needs the inputs of every linear layer. The walk reads a block from the source's safetensors,
runs the hidden states of all calibration samples through it, hands a visitor what it asked for, writes the block's
tensors to the output and drops it. Visitors are the methods (round to nearest, AWQ, ...).

Inside a block it goes segment by segment (q/k/v, o, gate/up, down: linear layers that share an input), so that each
segment sees the already changed ones before it. What a visitor gets per segment is the Gram matrix G = X^T X of the
input X [tokens, in]: the squared output error of a change D of the weights is tr(D G D^T), so no search needs another
forward. To stay near the cost of one forward per block, a pass stops as soon as the wanted input is there, and parts of
the block that are finished answer with their stored output.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slim.architecture import Family, ModelDescription, Segment
from slim.blockpass import BATCH_BYTES, KEEP_BYTES, BlockPass, Entrance, Gram, enter, widest_layer
from slim.checkpoint import Checkpoint, copy_companions, write_config
from slim.errors import SlimError
from slim.lazy import LazyModule
from slim.machine import map_large_tensors, trim_heap
from slim.resume import WalkProgress
from slim.shards import ShardWriter
from slim.skeleton import Skeleton, stored_dtype
from slim.stage import Context

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

ROW_WEIGHTS = 2**22  # weights of a layer that are worked on at once


@dataclass
class SegmentView:
    """One segment of one block, as a visitor sees it.

    block: its number. prefix: its name in the model, such as ``model.layers.3``.
    linears: name within the block -> float32 layer. A visitor changes ``weight`` in place to what the model will
        compute with; folded scales stay out of the walk (weights are given back as if the input had not been scaled).
    feeder: the module whose output channels are this input's channels (norm or linear layer), named ``fed_by``.
    feeds: int64 [in], for every input channel the channel of ``feeder`` it comes from.
    gram: float32 [in, in], X^T X over the calibration tokens, or None where the visitor needs none.
    tokens: number of rows of X.
    """

    block: int
    prefix: str
    segment: Segment
    linears: dict[str, nn.Linear]
    feeder: nn.Module
    feeds: torch.Tensor
    gram: torch.Tensor | None = None
    tokens: int = 0

    @property
    def fed_by(self) -> str:
        return self.segment.fed_by


class Visitor:
    """A method on the walk.

    needs_gram: whether it looks at G; without it no forward is run at all. sequential: whether each segment sees the
    already changed ones before it in its block; if not, all of a block's Gram matrices are taken beforehand.
    resumable: whether ``state`` is all it has to remember between two blocks.
    """

    needs_gram: bool = True
    sequential: bool = True
    resumable: bool = False

    def visit(self, view: SegmentView) -> dict[str, float]:
        """Change the weights of ``view.linears`` in place; return name within the block -> relative output error."""
        raise NotImplementedError

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return the finished block's tensors as they are to be stored, named within the block.

        Floating-point tensors that the source has too are stored in the source's type.
        """
        return module.state_dict()

    def held(self, name: str) -> torch.Tensor | None:
        """Return the weights a finished layer computes with, where the visitor can give them back.

        The walk then frees them while they are not run. ``block_tensors`` has to do without them. None: it keeps them.
        """
        return None

    def holds(self, name: str) -> bool:
        """Whether ``held`` gives a layer's weights back."""
        return False

    def rest_tensors(self, name: str, tensor: torch.Tensor, family: Family, tied: bool) -> dict[str, torch.Tensor]:
        """Return what is stored for a tensor outside the blocks (embedding, final norm, head). tied: head = embedding."""
        return {name: tensor}

    def state(self) -> dict:
        """Return what is to be remembered if the walk is interrupted, as plain JSON values."""
        return {}

    def resume(self, state: dict) -> None:
        """Take up a ``state``."""


@dataclass
class LayerError:
    """How much a layer's output changed: |X D^T| / |X W^T| over the calibration tokens (|D| / |W| without them)."""

    block: int
    layer: str
    error: float


def relative_error(difference: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor | None) -> float:
    """Return how much a layer's output changes, |X D^T| / |X W^T|, for a change D of its weights W, both [out, in].

    gram: G = X^T X, [in, in]; without one |D| / |W|.
    """
    return root_ratio(squared_size(difference, gram), squared_size(weight, gram))


def root_ratio(change: torch.Tensor, whole: torch.Tensor) -> float:
    """Return the root of ``change / whole``, squared sizes of a change and of what is changed; 0 where that is nothing."""
    return float((change / whole).clamp(min=0).sqrt()) if whole > 0 else 0.0


def squared_size(matrix: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
    """Return |X M^T|^2 for M [out, in] and G = X^T X, [in, in]; without one |M|^2."""
    parts = matrix.split(max(1, ROW_WEIGHTS // matrix.shape[1]))  # the product of all rows is as large as the layer
    return sum(((part if gram is None else part @ gram) * part).sum() for part in parts)


def exchange_weight(linear: nn.Linear, weight: torch.Tensor, gram: torch.Tensor | None) -> float:
    """Give a layer other weights, [out, in]; return its relative error. Overwrites the old ones, which saves a copy."""
    from torch import nn

    old = linear.weight.data
    whole = squared_size(old, gram)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return root_ratio(squared_size(old.sub_(weight), gram), whole)


class Walk:
    """One walk of a visitor through the blocks of ``source``, written to ``writer``.

    tokens: int64 [samples, length]; None for visitors without Gram matrices. device: where blocks are computed.
    keep_bytes: limit for inputs that are kept instead of computed twice; speed only, not the result.
    on_block: called with (block, its LayerErrors) when a block is done. title: of the progress bar.
    progress: where an interrupted walk is taken up and its progress is saved; None: nowhere.
    """

    def __init__(
        self,
        source: Checkpoint,
        visitor: Visitor,
        writer: ShardWriter | None,
        tokens: torch.Tensor | None = None,
        device: str = "cpu",
        keep_bytes: int = KEEP_BYTES,
        on_block=None,
        title: str = "Blocks",
        progress: WalkProgress | None = None,
    ):
        if visitor.needs_gram and tokens is None:
            raise ValueError("this visitor needs calibration tokens")
        self.source, self.visitor, self.writer, self.tokens = source, visitor, writer, tokens
        self.device, self.keep_bytes, self.on_block, self.title = device, keep_bytes, on_block, title
        self.progress = progress if visitor.resumable else None
        self.skeleton = Skeleton(source, device)
        self.family = self.skeleton.family
        self.entrance: Entrance | None = None
        self.errors: list[LayerError] = []

    def run(self) -> list[LayerError]:
        """Walk through all blocks and return the error of every layer. Raises ``SlimError`` for NaN or infinity."""
        from slim.progress import progress_bar

        map_large_tensors()
        if self.visitor.needs_gram:
            self.entrance = enter(self.skeleton, self.tokens)
        start = self.progress.resume(self) if self.progress else 0
        if start == 0:
            self._copy_rest()
        with progress_bar(self.title, len(self.skeleton.blocks)) as advance:
            advance(start)
            for index in range(start):
                self._report(index)
            for index in range(start, len(self.skeleton.blocks)):
                found = self._block(index)
                self.errors += found
                self._report(index)
                mean = sum(item.error for item in found) / max(1, len(found))
                advance(1, note=f"block {index}: relative error {mean:.4f}")
                if self.progress:
                    self.progress.save(self, index)
        return self.errors

    def _report(self, index: int) -> None:
        if self.on_block:
            self.on_block(index, [item for item in self.errors if item.block == index])

    def _copy_rest(self) -> None:
        """Write what is not in a block (embeddings, final norm, head) as the visitor wants it stored."""
        if self.writer is not None:
            for name in self.source.tensors:
                if not name.startswith(self.family.blocks + "."):
                    tensor, tied = self.skeleton.reader.read(name), self.source.description.tied
                    for stored, value in self.visitor.rest_tensors(name, tensor, self.family, tied).items():
                        self.writer.add(stored, value)
            self.skeleton.reader.release()

    def _block(self, index: int) -> list[LayerError]:
        prefix = f"{self.family.blocks}.{index}"
        block = self.skeleton.load(prefix)
        passes, grams = None, {}
        if self.entrance is not None:
            passes = BlockPass(block, index, self.entrance, self.family, self.device, self.keep_bytes)
            grams = {} if self.visitor.sequential else passes.grams()
        errors: dict[str, float] = {}
        for segment in self.family.segments:
            errors.update(self._segment(block, index, segment, passes, grams.pop(segment, None)))
        if passes is not None:
            passes.advance()
        self._write(index, prefix, block)
        self.skeleton.drop(prefix)
        return [LayerError(index, name, error) for name, error in errors.items()]

    def _segment(
        self, block: nn.Module, index: int, segment: Segment, passes: BlockPass | None, gram: Gram | None
    ) -> dict[str, float]:
        view = SegmentView(
            block=index,
            prefix=f"{self.family.blocks}.{index}",
            segment=segment,
            linears={name: block.get_submodule(name) for name in segment.linears},
            feeder=block.get_submodule(segment.fed_by),
            feeds=feeding_channels(self.skeleton.description, self.family, block, segment),
        )
        if passes is not None:
            gram = gram or passes.gram(segment)
            view.gram, view.tokens = gram.matrix(), gram.rows
            require_finite(view)
        done = [name for name in self._layers() if self.visitor.holds(name)]
        self._free(block, done)
        with torch.no_grad():
            errors = self.visitor.visit(view)
        view.gram = gram = None
        self._restore(block, [name for name in done if passes is not None and name in passes.running])
        if passes is not None and self.visitor.sequential:
            self._free(block, [name for name in passes.finish(segment) if self.visitor.holds(name)])
        return errors

    def _layers(self) -> list[str]:
        return [name for segment in self.family.segments for name in segment.linears]

    def _free(self, block: nn.Module, layers: list[str]) -> None:
        """Free the weights of layers that the visitor holds."""
        for name in layers:
            block.get_submodule(name).weight = None
        trim_heap()

    def _restore(self, block: nn.Module, layers: list[str]) -> None:
        """Take the weights of layers that will run again from the visitor."""
        trim_heap()
        for name in layers:
            block.get_submodule(name).weight = torch.nn.Parameter(self.visitor.held(name), requires_grad=False)

    def _write(self, index: int, prefix: str, block: nn.Module) -> None:
        tensors = self.visitor.block_tensors(index, block)  # also where nothing is written: the visitor is done with it
        if self.writer is None:
            return
        for name, tensor in tensors.items():
            full = f"{prefix}.{name}"
            if full in self.skeleton.reader and tensor.is_floating_point():
                tensor = tensor.to(stored_dtype(self.source.tensors[full][1]))
            self.writer.add(full, tensor)


def require_finite(view: SegmentView) -> None:
    """Raise ``SlimError`` naming the layer if its calibration inputs contain NaN or infinity."""
    if not torch.isfinite(view.gram.diagonal()).all():
        raise SlimError(
            f"The inputs of {view.prefix}.{view.segment.linears[0]} contain NaN or infinity. "
            "The model overflows on the calibration text: its weights are damaged or the text is not of its kind."
        )


def feeding_channels(description: ModelDescription, family: Family, block: nn.Module, segment: Segment) -> torch.Tensor:
    """Return for each input channel of a segment the output channel of ``fed_by`` it comes from, int64 [in].

    They are the same but where values feed the attention's output: under grouped-query attention several query heads
    read one value head. A fused layer feeds by some of its rows only.
    """
    first = block.get_submodule(segment.linears[0])
    channels = torch.arange(first.in_features, device=first.weight.device)
    if segment.fed_by.startswith(family.attention + "."):
        shared = description.heads // description.kv_heads
        head, within = channels // description.head_dim, channels % description.head_dim
        channels = head // shared * description.head_dim + within
    return channels + description.first_feeding_row(segment)


def walk_bytes(model: ModelDescription, samples: int, length: int) -> int:
    """Estimate the peak memory of a walk with Gram matrices, beside the block itself: activations and one matrix."""
    hidden = 4 * samples * length * model.hidden_size
    widest = max(columns for _, columns in model.block_linears().values())
    batch = 4 * max(BATCH_BYTES, 4 * length * widest_layer(model))
    return hidden + min(4 * samples * length * widest, KEEP_BYTES) + batch + 2 * 4 * widest**2


def rewrite(
    source: Checkpoint, target: Path, visitor: Visitor, config: dict, context: Context, tokens: torch.Tensor | None = None
) -> list[LayerError]:
    """Walk ``visitor`` through ``source`` and write the whole changed checkpoint to ``target``; return its errors.

    config: the result's ``config.json``. tokens: as for :class:`Walk`. The mean error of every block with errors is
    recorded as the curve ``layer_error``.
    """

    def report(block: int, errors: list[LayerError]) -> None:
        if errors:
            context.metric("layer_error", sum(item.error for item in errors) / len(errors), block)

    progress = WalkProgress(context.work, context.device) if context.work and visitor.resumable else None
    writer = ShardWriter(target, work=progress and progress.folder)
    errors = Walk(source, visitor, writer, tokens, context.device, on_block=report, progress=progress).run()
    writer.close()
    write_config(config, target)
    copy_companions(source.folder, target)
    return errors

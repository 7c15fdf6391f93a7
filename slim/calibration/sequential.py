"""The walk through the blocks: one decoder block in memory at a time, whatever the depth of the
model.

Every calibrated method needs the inputs of every linear layer. The walk reads a block from the
source's safetensors, runs the hidden states of all calibration samples through it, hands a visitor
what it asked for, writes the block's tensors to the output and drops it. Visitors are the methods
(round to nearest, AWQ, ...).

Inside a block it goes segment by segment (q/k/v, o, gate/up, down: linear layers that share an
input), so that each segment sees the already changed ones before it. What a visitor gets per
segment is the Gram matrix G = X^T X of the input X [tokens, in]: the squared output error of a
change D of the weights is tr(D G D^T), so no search needs another forward. To stay near the cost of
one forward per block, a pass stops as soon as the wanted input is there, and parts of the block
that are finished answer with their stored output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slim.calibration.block_runner import (
    BATCH_BYTES,
    CACHE_BYTES,
    BlockRunner,
    CapturedInputs,
    Hessian,
    capture_inputs,
    widest_layer,
)
from slim.calibration.errors import LayerError
from slim.calibration.resume import CalibrationProgress
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import MetaModel, stored_dtype
from slim.checkpoints.shards import ShardWriter
from slim.checkpoints.stage import Context
from slim.checkpoints.writer import copy_companions, write_config
from slim.core.errors import SlimError
from slim.core.hardware import map_large_tensors, trim_heap
from slim.core.lazy import LazyModule
from slim.models.spec import Family, LinearGroupSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")


@dataclass
class LinearGroup:
    """One segment of one block, as a visitor sees it.

    block: its number. prefix: its name in the model, such as ``model.layers.3``.
    linears: name within the block -> float32 layer. A visitor changes ``weight`` in place to what
        the model will compute with; folded scales stay out of the walk (weights are given back as
        if the input had not been scaled).
    scale_module: the module whose output channels are this input's channels (norm or linear layer),
        named ``scale_into``.
    channel_map: int64 [in], for every input channel the channel of ``scale_module`` it comes from.
    hessian: float32 [in, in], X^T X over the calibration tokens, or None where the visitor needs
        none.
    tokens: number of rows of X.
    """

    block: int
    prefix: str
    spec: LinearGroupSpec
    linears: dict[str, nn.Linear]
    scale_module: nn.Module
    channel_map: torch.Tensor
    hessian: torch.Tensor | None = None
    tokens: int = 0

    @property
    def scale_into(self) -> str:
        return self.spec.scale_into


class BlockMethod:
    """A method on the walk.

    needs_hessian: whether it looks at G; without it no forward is run at all. sequential: whether
    each segment sees the already changed ones before it in its block; if not, all of a block's Gram
    matrices are taken beforehand.
    resumable: whether ``state`` is all it has to remember between two blocks.
    """

    needs_hessian: bool = True
    sequential: bool = True
    resumable: bool = False

    def process(self, group: LinearGroup) -> dict[str, float]:
        """Change the weights of ``group.linears`` in place; return name within the block ->
        relative output error."""
        raise NotImplementedError

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return the finished block's tensors as they are to be stored, named within the block.

        Floating-point tensors that the source has too are stored in the source's type.
        """
        return module.state_dict()

    def finished_weight(self, name: str) -> torch.Tensor | None:
        """Return the weights a finished layer computes with, where the visitor can give them back.

        The walk then frees them while they are not run. ``block_tensors`` has to do without them.
        None: it keeps them."""
        return None

    def has_finished_weight(self, name: str) -> bool:
        """Whether ``finished_weight`` gives a layer's weights back."""
        return False

    def other_tensors(
        self, name: str, tensor: torch.Tensor, family: Family, tied: bool
    ) -> dict[str, torch.Tensor]:
        """Return what is stored for a tensor outside the blocks (embedding, final norm, head).
        tied: head = embedding."""
        return {name: tensor}

    def state(self) -> dict:
        """Return what is to be remembered if the walk is interrupted, as plain JSON values."""
        return {}

    def resume(self, state: dict) -> None:
        """Take up a ``state``."""


class SequentialCalibration:
    """One walk of a visitor through the blocks of ``source``, written to ``writer``.

    tokens: int64 [samples, length]; None for visitors without Gram matrices. device: where blocks
        are computed.
    cache_bytes: limit for inputs that are kept instead of computed twice; speed only, not the
        result.
    on_block: called with (block, its LayerErrors) when a block is done. title: of the progress bar.
    progress: where an interrupted walk is taken up and its progress is saved; None: nowhere.
    """

    def __init__(
        self,
        source: Checkpoint,
        method: BlockMethod,
        writer: ShardWriter | None,
        tokens: torch.Tensor | None = None,
        device: str = "cpu",
        cache_bytes: int = CACHE_BYTES,
        on_block=None,
        title: str = "Blocks",
        progress: CalibrationProgress | None = None,
    ):
        if method.needs_hessian and tokens is None:
            raise ValueError("this visitor needs calibration tokens")
        self.source, self.method, self.writer, self.tokens = source, method, writer, tokens
        self.device, self.cache_bytes, self.on_block, self.title = (
            device,
            cache_bytes,
            on_block,
            title,
        )
        self.progress = progress if method.resumable else None
        self.meta_model = MetaModel(source, device)
        self.family = self.meta_model.family
        self.captured: CapturedInputs | None = None
        self.errors: list[LayerError] = []

    def run(self) -> list[LayerError]:
        """Walk through all blocks and return the error of every layer. Raises ``SlimError`` for NaN
        or infinity."""
        from slim.core.console import progress_bar

        map_large_tensors()
        if self.method.needs_hessian:
            self.captured = capture_inputs(self.meta_model, self.tokens)
        start = self.progress.resume(self) if self.progress else 0
        if start == 0:
            self._copy_rest()
        with progress_bar(self.title, len(self.meta_model.blocks)) as advance:
            advance(start)
            for index in range(start):
                self._report(index)
            for index in range(start, len(self.meta_model.blocks)):
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
        """Write what is not in a block (embeddings, final norm, head) as the visitor wants it
        stored."""
        if self.writer is not None:
            for name in self.source.tensors:
                if not name.startswith(self.family.blocks + "."):
                    tensor, tied = self.meta_model.reader.read(name), self.source.spec.tied
                    for stored, value in self.method.other_tensors(
                        name, tensor, self.family, tied
                    ).items():
                        self.writer.add(stored, value)
            self.meta_model.reader.release()

    def _block(self, index: int) -> list[LayerError]:
        prefix = f"{self.family.blocks}.{index}"
        block = self.meta_model.load(prefix)
        runner, hessians = None, {}
        if self.captured is not None:
            runner = BlockRunner(
                block, index, self.captured, self.family, self.device, self.cache_bytes
            )
            hessians = {} if self.method.sequential else runner.hessians()
        errors: dict[str, float] = {}
        for group in self.family.linear_groups:
            errors.update(self._group(block, index, group, runner, hessians.pop(group, None)))
        if runner is not None:
            runner.advance()
        self._write(index, prefix, block)
        self.meta_model.drop(prefix)
        return [LayerError(index, name, error) for name, error in errors.items()]

    def _group(
        self,
        block: nn.Module,
        index: int,
        spec: LinearGroupSpec,
        runner: BlockRunner | None,
        hessian: Hessian | None,
    ) -> dict[str, float]:
        group = LinearGroup(
            block=index,
            prefix=f"{self.family.blocks}.{index}",
            spec=spec,
            linears={name: block.get_submodule(name) for name in spec.linears},
            scale_module=block.get_submodule(spec.scale_into),
            channel_map=input_channel_map(self.meta_model.spec, self.family, block, spec),
        )
        if runner is not None:
            hessian = hessian or runner.hessian(spec)
            group.hessian, group.tokens = hessian.matrix(), hessian.rows
            require_finite(group)
        done = [name for name in self._layers() if self.method.has_finished_weight(name)]
        self._free(block, done)
        with torch.no_grad():
            errors = self.method.process(group)
        group.hessian = hessian = None
        self._restore(
            block, [name for name in done if runner is not None and name in runner.running]
        )
        if runner is not None and self.method.sequential:
            self._free(
                block,
                [name for name in runner.finish(spec) if self.method.has_finished_weight(name)],
            )
        return errors

    def _layers(self) -> list[str]:
        return [name for group in self.family.linear_groups for name in group.linears]

    def _free(self, block: nn.Module, layers: list[str]) -> None:
        """Free the weights of layers that the visitor holds."""
        for name in layers:
            block.get_submodule(name).weight = None
        trim_heap()

    def _restore(self, block: nn.Module, layers: list[str]) -> None:
        """Take the weights of layers that will run again from the visitor."""
        trim_heap()
        for name in layers:
            block.get_submodule(name).weight = torch.nn.Parameter(
                self.method.finished_weight(name), requires_grad=False
            )

    def _write(self, index: int, prefix: str, block: nn.Module) -> None:
        # also where nothing is written: the visitor is done with it
        tensors = self.method.block_tensors(index, block)
        if self.writer is None:
            return
        for name, tensor in tensors.items():
            full = f"{prefix}.{name}"
            if full in self.meta_model.reader and tensor.is_floating_point():
                tensor = tensor.to(stored_dtype(self.source.tensors[full][1]))
            self.writer.add(full, tensor)


def require_finite(group: LinearGroup) -> None:
    """Raise ``SlimError`` naming the layer if its calibration inputs contain NaN or infinity."""
    if not torch.isfinite(group.hessian.diagonal()).all():
        raise SlimError(
            f"The inputs of {group.prefix}.{group.spec.linears[0]} contain NaN or infinity. "
            "The model overflows on the calibration text: its weights are damaged or the text is not of its kind."
        )


def input_channel_map(
    spec: ModelSpec, family: Family, block: nn.Module, group: LinearGroupSpec
) -> torch.Tensor:
    """Return for each input channel of a segment the output channel of ``scale_into`` it comes
    from, int64 [in].

    They are the same but where values feed the attention's output: under grouped-query attention
    several query heads read one value head. A fused layer feeds by some of its rows only."""
    first = block.get_submodule(group.linears[0])
    channels = torch.arange(first.in_features, device=first.weight.device)
    if group.scale_into.startswith(family.attention + "."):
        shared = spec.heads // spec.kv_heads
        head, within = channels // spec.head_dim, channels % spec.head_dim
        channels = head // shared * spec.head_dim + within
    return channels + spec.first_scaled_row(group)


def calibration_bytes(spec: ModelSpec, samples: int, length: int) -> int:
    """Estimate the peak memory of a walk with Gram matrices, beside the block itself: activations
    and one matrix."""
    hidden = 4 * samples * length * spec.hidden_size
    widest = max(columns for _, columns in spec.block_linears().values())
    batch = 4 * max(BATCH_BYTES, 4 * length * widest_layer(spec))
    return hidden + min(4 * samples * length * widest, CACHE_BYTES) + batch + 2 * 4 * widest**2


def transform_checkpoint(
    source: Checkpoint,
    target: Path,
    method: BlockMethod,
    config: dict,
    context: Context,
    tokens: torch.Tensor | None = None,
) -> list[LayerError]:
    """Walk ``method`` through ``source`` and write the whole changed checkpoint to ``target``;
    return its errors.

    config: the result's ``config.json``. tokens: as for :class:`SequentialCalibration`. The mean
    error of every block with errors is recorded as the curve ``layer_error``."""

    def report(block: int, errors: list[LayerError]) -> None:
        if errors:
            context.metric("layer_error", sum(item.error for item in errors) / len(errors), block)

    progress = (
        CalibrationProgress(context.work, context.device)
        if context.work and method.resumable
        else None
    )
    writer = ShardWriter(target, work=progress and progress.folder)
    errors = SequentialCalibration(
        source, method, writer, tokens, context.device, on_block=report, progress=progress
    ).run()
    writer.close()
    write_config(config, target)
    copy_companions(source.folder, target)
    return errors

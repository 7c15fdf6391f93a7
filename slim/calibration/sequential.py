"""Sequential calibration: one decoder block in memory at a time, whatever the depth of the model.

Every calibrated method needs the inputs of every linear layer, as the already changed layers before
it give them. :meth:`SequentialCalibration.run` is the loop that all methods share:

    capture     what enters block 0, for all calibration samples
    for every block, read from the source's safetensors:
        for every linear group (q/k/v, o, gate/up, down: layers that share an input X [tokens, in]):
            accumulate  H = X^T X
            solve       the method changes the group's weights
            propagate   the samples move past the changed layers
        write       the block's tensors to the output, and drop the block

The squared output error of a change D of the weights is tr(D H D^T), so a method's search needs no
further forward pass. To stay near the cost of one forward pass per block, a pass stops as soon as
the wanted input is there, and finished parts of a block are not computed again
(``block_runner.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slim.calibration.block_method import BlockMethod, LinearGroup
from slim.calibration.block_runner import CACHE_BYTES, BlockRunner
from slim.calibration.capture import BATCH_BYTES, CapturedInputs, capture_inputs, widest_layer
from slim.calibration.errors import LayerError
from slim.calibration.resume import CalibrationProgress, CalibrationState
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.meta_model import MetaModel, is_finite, stored_dtype
from slim.checkpoints.shards import ShardWriter
from slim.checkpoints.stage import Context, Expected
from slim.checkpoints.writer import copy_companions, write_config
from slim.core.errors import SlimError
from slim.core.hardware import map_large_tensors, trim_heap
from slim.core.lazy import LazyModule
from slim.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

EXPECTED_TOKENS = 12  # of the first sample, that the result is compared on
# products may take factors rounded to bfloat16 (``precision_of``), with 8 bits of mantissa
TOLERANCE = 0.05


class SequentialCalibration:
    """Applies a method to the blocks of a checkpoint, one after another."""

    def __init__(
        self,
        source: Checkpoint,
        method: BlockMethod,
        writer: ShardWriter | None,
        tokens: torch.Tensor | None = None,
        device: str = "cpu",
        cache_bytes: int = CACHE_BYTES,
        on_block: Callable[[int, list[LayerError]], None] | None = None,
        title: str = "Blocks",
        progress: CalibrationProgress | None = None,
    ):
        """Prepare to run; no weights are read yet.

        Args:
            source: the checkpoint that is read.
            method: what is done to its blocks.
            writer: where the result's tensors go; None: nothing is written.
            tokens: calibration samples, int64 [samples, length]; None for methods that need no
                Hessian.
            device: torch device the blocks are computed on.
            cache_bytes: limit for inputs that are cached instead of computed twice; affects speed
                only.
            on_block: called with a block's number and its errors when it is done.
            title: of the progress bar.
            progress: where progress is saved, and resumed if the method is resumable; None:
                nowhere.

        Raises:
            ValueError: if the method needs a Hessian and there are no tokens.
        """
        if method.needs_hessian and tokens is None:
            raise ValueError("this method needs calibration tokens")
        self.source = source
        self.method = method
        self.writer = writer
        self.tokens = tokens
        self.device = device
        self.cache_bytes = cache_bytes
        self.on_block = on_block
        self.title = title
        self.progress = progress if method.resumable else None
        self.meta_model = MetaModel(source, device)
        self.family = self.meta_model.family
        self.captured: CapturedInputs | None = None
        self.plain_captured: CapturedInputs | None = None  # the same through the plain model
        self.plain_model: MetaModel | None = None
        self.errors: list[LayerError] = []

    def run(self) -> list[LayerError]:
        """Process all blocks and return the error of every layer, in order.

        Raises:
            SlimError: if weights or inputs contain NaN or infinity; it names the layer.
        """
        from slim.core.console import progress_bar  # loads rich

        map_large_tensors()
        # Capture: the embeddings run once; from here on only hidden states are needed.
        if self.method.needs_hessian:
            self.captured = capture_inputs(self.meta_model, self.tokens)
        if self.method.propagates:
            self.plain_model = MetaModel(self.source, self.device)
            self.plain_captured = replace(self.captured, hidden=list(self.captured.hidden))
        start = self._resume()
        if start == 0:
            self._write_outside_blocks()

        depth = len(self.meta_model.blocks)
        with progress_bar(self.title, depth) as advance:
            # Blocks of an interrupted run are done; their errors are reported again for the curves.
            advance(start)
            for index in range(start):
                self._report(index)

            for index in range(start, depth):
                # Read: no other block is in memory.
                name = f"{self.family.blocks}.{index}"
                block = self.meta_model.load(name)
                runner = self._block_runner(block, index, self.captured)
                plain = self._plain_runner(name, index)
                errors: dict[str, float] = {}

                for spec in self.family.linear_groups:
                    group = LinearGroup.of_block(self.meta_model.spec, block, index, spec)

                    # Accumulate: the layers before this group already compute with their new
                    # weights.
                    if runner is not None:
                        self._accumulate(group, runner, plain)
                        group.require_finite()

                    # Solve: the method changes the group's weights in place.
                    with torch.no_grad(), self._finished_layers_freed(block, runner):
                        errors.update(self.method.process(group))
                        # as large as the largest layer: makes room for the weights that come back
                        group.hessian = group.drift = None

                    # Propagate: after attention's and MLP's last group the samples move past it.
                    if runner is not None:
                        self._free(block, runner.finish(spec))
                    if plain is not None:
                        plain.finish(spec)
                if runner is not None:
                    runner.advance()
                if plain is not None:
                    plain.advance()
                    self.plain_model.drop(name)

                # Write: what the method has made of the block goes to the output's current shard.
                self._write_block(index, block)
                self.meta_model.drop(name)
                for layer, error in errors.items():
                    self.errors.append(LayerError(index, layer, error))
                self._report(index)
                mean = sum(errors.values()) / max(1, len(errors))
                advance(1, note=f"block {index}: relative error {mean:.4f}")
                self._save(index)
        return self.errors

    def expected(self) -> Expected:
        """Return what the changed model makes of the first tokens: they have passed all blocks."""
        hidden = self.captured.hidden[0][0, :EXPECTED_TOKENS].clone()
        return Expected(self.tokens[:1, :EXPECTED_TOKENS].clone(), hidden, TOLERANCE)

    def _accumulate(
        self, group: LinearGroup, runner: BlockRunner, plain: BlockRunner | None
    ) -> None:
        """Give a group the Hessian of its inputs, and how they differ from the plain model's."""
        if plain is None:
            hessian = runner.hessian(group.spec)
            group.hessian, group.tokens = hessian.matrix(), hessian.rows
            return
        group.drift = runner.drift(group.spec, plain)
        group.hessian = group.drift.hessian()
        group.tokens = self.tokens.numel()

    def _plain_runner(self, name: str, index: int) -> BlockRunner | None:
        """Return what runs the samples through a block as the source has it, for methods that
        propagate: two blocks are then in memory."""
        if self.plain_captured is None:
            return None
        return self._block_runner(self.plain_model.load(name), index, self.plain_captured)

    def _block_runner(
        self, block: nn.Module, index: int, captured: CapturedInputs | None
    ) -> BlockRunner | None:
        """Return what runs the samples through a block; None where there are no samples."""
        if captured is None:
            return None
        return BlockRunner(
            block,
            index,
            captured,
            self.family,
            self.device,
            self.cache_bytes,
            self.method.sequential,
        )

    @contextmanager
    def _finished_layers_freed(
        self, block: nn.Module, runner: BlockRunner | None
    ) -> Iterator[None]:
        """Free the float32 weights that the method can give back while it works on other layers."""
        freed = []
        for spec in self.family.linear_groups:
            freed += [name for name in spec.linears if self.method.has_finished_weight(name)]
        self._free(block, freed)
        yield
        trim_heap()
        needed = [] if runner is None else runner.unfinished_layers()
        for name in freed:
            if name in needed:
                weight = self.method.finished_weight(name)
                block.get_submodule(name).weight = torch.nn.Parameter(weight, requires_grad=False)

    def _free(self, block: nn.Module, layers: list[str]) -> None:
        """Free the weights of those layers that the method can give back."""
        for name in layers:
            if self.method.has_finished_weight(name):
                block.get_submodule(name).weight = None
        trim_heap()

    def _write_block(self, index: int, block: nn.Module) -> None:
        # also where nothing is written: it tells the method that the block is done
        tensors = self.method.block_tensors(index, block)
        if self.writer is None:
            return
        for name, tensor in tensors.items():
            full = f"{self.family.blocks}.{index}.{name}"
            if full in self.meta_model.reader and tensor.is_floating_point():
                tensor = tensor.to(stored_dtype(self.source.tensors[full][1]))
            self.writer.add(full, tensor)

    def _write_outside_blocks(self) -> None:
        """Write the embedding, the final norm and the head as the method wants them stored."""
        if self.writer is None:
            return
        tied = self.source.spec.tied
        for name in self.source.tensors:
            if not name.startswith(self.family.blocks + "."):
                tensor = self.meta_model.reader.read(name)
                if not is_finite(tensor):
                    raise SlimError(
                        f"The weights {name} contain NaN or infinity: the model is damaged."
                    )
                stored = self.method.other_tensors(name, tensor, self.family, tied)
                for stored_name, value in stored.items():
                    self.writer.add(stored_name, value)
        self.meta_model.reader.release()

    def _report(self, index: int) -> None:
        if self.on_block:
            self.on_block(index, [item for item in self.errors if item.block == index])

    def _save(self, block: int) -> None:
        if self.progress:
            hidden = [] if self.captured is None else self.captured.hidden
            plain = [] if self.plain_captured is None else self.plain_captured.hidden
            state = CalibrationState(block, hidden, self.errors, self.method.state(), plain)
            self.progress.save(state, self.writer)

    def _resume(self) -> int:
        """Restore an interrupted run's state, if there is one; return the block to start with."""
        saved = self.progress.resume(self.writer) if self.progress else None
        if saved is None:
            return 0
        if self.captured is not None:
            self.captured.hidden = saved.hidden
        if self.plain_captured is not None:
            self.plain_captured.hidden = saved.plain
        self.errors = saved.errors
        self.method.resume(saved.method)
        return saved.block + 1


def calibration_bytes(spec: ModelSpec, samples: int, length: int) -> int:
    """Estimate the peak memory of collecting Hessians, besides the block itself, in bytes.

    Hidden states, cached inputs, the activations of a batch, and one Hessian with a copy.

    Args:
        spec: the model's sizes.
        samples: number of calibration samples.
        length: tokens per sample.
    """
    hidden = 4 * samples * length * spec.hidden_size
    widest = max(columns for _, columns in spec.block_linears().values())
    batch = 4 * max(BATCH_BYTES, 4 * length * widest_layer(spec))
    return hidden + min(4 * samples * length * widest, CACHE_BYTES) + batch + 2 * 4 * widest**2


def propagation_bytes(spec: ModelSpec, samples: int, length: int) -> int:
    """Estimate what propagation takes besides :func:`calibration_bytes`, in bytes.

    A plain block, its hidden states, and five more matrices of the size of a Hessian.

    Args:
        spec: the model's sizes.
        samples: number of calibration samples.
        length: tokens per sample.
    """
    widest = max(columns for _, columns in spec.block_linears().values())
    hidden = samples * length * spec.hidden_size
    return 4 * (spec.block_parameters() + hidden + 5 * widest**2)


def transform_checkpoint(
    source: Checkpoint,
    target: Path,
    method: BlockMethod,
    config: dict,
    context: Context,
    tokens: torch.Tensor | None = None,
) -> list[LayerError]:
    """Apply a method to all blocks and write the complete changed checkpoint.

    Args:
        source: the checkpoint that is read.
        target: existing, empty folder of the result.
        method: what is done to the blocks.
        config: the result's ``config.json``.
        context: device, folder for resuming, and where curves go: the mean error of every block
            with errors is recorded as ``layer_error``.
        tokens: calibration samples, int64 [samples, length], or None.

    Returns:
        The error of every layer, in order.
    """

    def report(block: int, errors: list[LayerError]) -> None:
        if errors:
            context.metric("layer_error", sum(item.error for item in errors) / len(errors), block)

    progress = None
    if context.resume_dir and method.resumable:
        progress = CalibrationProgress(context.resume_dir, context.device)
    writer = ShardWriter(target, work=progress and progress.folder)
    calibration = SequentialCalibration(
        source, method, writer, tokens, context.device, on_block=report, progress=progress
    )
    errors = calibration.run()
    writer.close()
    write_config(config, target)
    copy_companions(source.folder, target)
    if tokens is not None and calibration.captured is not None:
        expected = calibration.expected()
        context.expected = lambda: expected
    return errors

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

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slim.architecture import Family, ModelDescription, Segment
from slim.checkpoint import Checkpoint, ShardWriter, TensorReader, copy_companions, write_config
from slim.errors import SlimError
from slim.lazy import LazyModule
from slim.stage import Context

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

BATCH_TOKENS = 4096  # calibration tokens that go through a block at once
KEEP_BYTES = 2**29  # kept inputs of a segment may take this much; beyond it they are computed a second time
GRAM_TILE = 384  # columns of G computed at once; only tiles on and below the diagonal are


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
    """A method on the walk. ``needs_gram``: whether it looks at G; without it no forward is run at all."""

    needs_gram: bool = True

    def visit(self, view: SegmentView) -> dict[str, float]:
        """Change the weights of ``view.linears`` in place; return name within the block -> relative output error."""
        raise NotImplementedError

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return the finished block's tensors as they are to be stored, named within the block.

        Floating-point tensors that the source has too are stored in the source's type.
        """
        return module.state_dict()


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

    def size(matrix: torch.Tensor) -> torch.Tensor:
        return ((matrix if gram is None else matrix @ gram) * matrix).sum()

    whole = size(weight)
    return float((size(difference) / whole).clamp(min=0).sqrt()) if whole > 0 else 0.0


@dataclass
class Gram:
    """Sums X^T X over batches. Only the lower triangle of tiles is computed: about half the work for wide inputs."""

    features: int
    device: str = "cpu"
    rows: int = 0
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.features, self.features, dtype=torch.float32, device=self.device)

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs [..., features]."""
        x = inputs.reshape(-1, self.features).float()
        for start in range(0, self.features, GRAM_TILE):
            stop = min(start + GRAM_TILE, self.features)
            self.total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
        self.rows += len(x)

    def matrix(self) -> torch.Tensor:
        """Return the symmetric float32 matrix [features, features]."""
        for start in range(0, self.features, GRAM_TILE):
            stop = min(start + GRAM_TILE, self.features)
            self.total[start:stop, stop:] = self.total[stop:, start:stop].T
        return self.total


class Skeleton:
    """The model without weights: modules on torch's meta device, into which single parts are loaded."""

    def __init__(self, source: Checkpoint, device: str = "cpu"):
        self.description, self.device = source.description, device
        self.family: Family = self.description.family
        self.reader = TensorReader(source)
        self.model = empty_model(source)
        self.blocks = self.model.get_submodule(self.family.blocks)
        for module in self.model.modules():
            self._restore_buffers(module)

    def _restore_buffers(self, module: nn.Module) -> None:
        """Compute buffers that no file holds, such as rotary frequencies, as transformers itself does."""
        missing = [name for name in module._non_persistent_buffers_set if getattr(module, name).is_meta]
        for name in missing:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if missing:
            self.model._init_weights(module)
            for name in missing:
                setattr(module, name, getattr(module, name).to(self.device))

    def load(self, name: str) -> nn.Module:
        """Load the weights of one module as float32 and return it. Raises ``SlimError`` for bad or missing ones."""
        module = self.model.get_submodule(name)
        tensors = {}
        for key, tensor in self.reader.read_module(name).items():
            tensors[key] = tensor.to(self.device, torch.float32) if tensor.is_floating_point() else tensor
            if not torch.isfinite(tensors[key]).all():
                raise SlimError(f"The weights {name}.{key} contain NaN or infinity: the model is damaged.")
        try:
            missing = module.load_state_dict(tensors, strict=False, assign=True).missing_keys
        except RuntimeError as error:  # torch lists every tensor whose shape does not fit
            reason = str(error).splitlines()[1].strip()
            raise SlimError(f"The weights of {name} do not fit config.json: {reason}") from error
        if missing:
            raise SlimError(f"{self.description.name} has no tensor '{name}.{missing[0]}', which its config asks for.")
        return module

    def drop(self, name: str) -> None:
        """Free the weights of one module."""
        self.model.get_submodule(name).to("meta")


def empty_model(source: Checkpoint) -> nn.Module:
    """Return the checkpoint's model with all tensors on the meta device, in evaluation mode; no quantisation in it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


class _Stop(Exception):
    """Raised inside a forward as soon as what it was run for is there."""


@dataclass
class Entrance:
    """What enters block 0, and how the model calls its blocks.

    hidden: one float32 tensor [samples, length, hidden] per batch, on the CPU.
    calls: number of samples in a batch -> per block, the arguments the model calls it with beside the hidden states
        (mask, positions, rotary angles), as transformers' own code makes them for this family.
    """

    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: dict[int, list[tuple[tuple, dict]]] = field(default_factory=dict)


def enter(skeleton: Skeleton, tokens: torch.Tensor) -> Entrance:
    """Run embeddings and everything before block 0 on int64 tokens [samples, length], the blocks replaced."""
    entrance, blocks = Entrance(), skeleton.blocks
    calls: list[tuple[tuple, dict]] = []

    def record(hidden, *args, **kwargs):
        if not calls:
            entrance.hidden.append(hidden.to("cpu", torch.float32))
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _Stop
        return hidden

    skeleton.load(skeleton.family.embeddings)
    with torch.no_grad(), replaced_forwards(dict.fromkeys(blocks, record)):
        for batch in batches(tokens):
            calls.clear()
            with suppress(_Stop):
                skeleton.model.base_model(batch.to(skeleton.device), use_cache=False)
            entrance.calls.setdefault(len(batch), list(calls))
    skeleton.drop(skeleton.family.embeddings)
    return entrance


@contextmanager
def replaced_forwards(forwards: dict[nn.Module, Callable]) -> Iterator[None]:
    """Give modules another ``forward`` for a while; their attributes stay as they are."""
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None)


def batches(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split samples [samples, length] into batches of about ``BATCH_TOKENS`` tokens."""
    return tokens.split(max(1, BATCH_TOKENS // tokens.shape[1]))


class BlockPass:
    """The passes of all batches through one loaded block, segment by segment.

    A part is a child of the block that holds segments: attention or MLP. The input of a part's last segment is kept
    (below ``keep_bytes``), so the part's output costs one matrix product; where it was too large the part runs again.
    """

    def __init__(self, block: nn.Module, index: int, entrance: Entrance, family: Family, device: str, keep_bytes: int):
        self.block, self.index, self.entrance, self.family = block, index, entrance, family
        self.device, self.keep_bytes = device, keep_bytes
        self.parts = {segment.linears[0].split(".")[0]: segment.linears[0] for segment in family.segments}
        self.norms = {}
        for segment in reversed(family.segments):
            self.norms[segment.linears[0].split(".")[0]] = segment.fed_by
        self.outputs: dict[str, list[torch.Tensor]] = {}
        self.kept: list[torch.Tensor] = []

    def gram(self, segment: Segment) -> Gram:
        """Collect the Gram matrix of a segment's input, all segments before it being finished."""
        first = segment.linears[0]
        gram = Gram(self.block.get_submodule(first).in_features, self.device)
        self.kept = []
        for batch in range(len(self.entrance.hidden)):
            inputs = self._run(batch, before=first)
            gram.add(inputs)
            if first in self.parts.values() and self._may_keep(inputs):
                self.kept.append(inputs.to("cpu"))
        return gram

    def _may_keep(self, inputs: torch.Tensor) -> bool:
        return inputs.numel() * inputs.element_size() * len(self.entrance.hidden) <= self.keep_bytes

    def finish(self, segment: Segment) -> None:
        """Where ``segment`` is the last of its part, compute and store the part's output for every batch."""
        last = segment.linears[0]
        if last not in self.parts.values():
            return
        part = last.split(".")[0]
        outputs = []
        for batch in range(len(self.entrance.hidden)):
            if self.kept:
                output = self.block.get_submodule(last)(self.kept[batch].to(self.device))
                self.kept[batch] = torch.empty(0)
            else:
                output = self._run(batch, after=part)
            outputs.append(output.to("cpu"))
        self.kept, self.outputs[part] = [], outputs

    def advance(self) -> None:
        """Replace the hidden states by the block's output."""
        for batch in range(len(self.entrance.hidden)):
            self.entrance.hidden[batch] = self._run(batch).to("cpu")
            for outputs in self.outputs.values():
                outputs[batch] = torch.empty(0)

    def _run(self, batch: int, before: str | None = None, after: str | None = None) -> torch.Tensor:
        """Run the block on a batch: return the input of layer ``before``, the output of part ``after``, or its own."""
        hidden = self.entrance.hidden[batch]
        args, kwargs = self.entrance.calls[len(hidden)][self.index]
        caught = []

        def catch_input(module, inputs):
            caught.append(inputs[0])
            raise _Stop

        def catch_output(module, inputs, output):
            caught.append(output[0] if isinstance(output, tuple) else output)
            raise _Stop

        hook = None
        if before or after:
            module = self.block.get_submodule(before or after)
            hook = (
                module.register_forward_pre_hook(catch_input) if before else module.register_forward_hook(catch_output)
            )
        try:
            with torch.no_grad(), replaced_forwards(self._finished_parts(batch)):
                output = self.block(hidden.to(self.device), *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output
        except _Stop:
            return caught[0]
        finally:
            if hook:
                hook.remove()

    def _finished_parts(self, batch: int) -> dict[nn.Module, Callable]:
        """Let finished parts answer with their stored output; the norm that feeds only them has nothing to do."""
        forwards = {}
        for part, outputs in self.outputs.items():
            output = outputs[batch].to(self.device)
            answer = (output, None) if part == self.family.attention else output
            forwards[self.block.get_submodule(part)] = lambda *args, answer=answer, **kwargs: answer
            forwards[self.block.get_submodule(self.norms[part])] = lambda hidden: hidden
        return forwards


class Walk:
    """One walk of a visitor through the blocks of ``source``, written to ``writer``.

    tokens: int64 [samples, length]; None for visitors without Gram matrices. device: where blocks are computed.
    keep_bytes: limit for inputs that are kept instead of computed twice; speed only, not the result.
    on_block: called with (block, its LayerErrors) when a block is done.
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
    ):
        if visitor.needs_gram and tokens is None:
            raise ValueError("this visitor needs calibration tokens")
        self.source, self.visitor, self.writer, self.tokens = source, visitor, writer, tokens
        self.device, self.keep_bytes, self.on_block = device, keep_bytes, on_block
        self.skeleton = Skeleton(source, device)
        self.family = self.skeleton.family
        self.entrance: Entrance | None = None

    def run(self) -> list[LayerError]:
        """Walk through all blocks and return the error of every layer. Raises ``SlimError`` for NaN or infinity."""
        from slim.progress import progress_bar

        if self.visitor.needs_gram:
            self.entrance = enter(self.skeleton, self.tokens)
        self._copy_rest()
        errors: list[LayerError] = []
        with progress_bar("Blocks", len(self.skeleton.blocks)) as advance:
            for index in range(len(self.skeleton.blocks)):
                found = self._block(index)
                errors += found
                mean = sum(item.error for item in found) / max(1, len(found))
                advance(1, note=f"block {index}: relative error {mean:.4f}")
                if self.on_block:
                    self.on_block(index, found)
        return errors

    def _copy_rest(self) -> None:
        """Copy what is not in a block (embeddings, final norm, head) unchanged."""
        if self.writer is not None:
            for name in self.source.tensors:
                if not name.startswith(self.family.blocks + "."):
                    self.writer.add(name, self.skeleton.reader.read(name))

    def _block(self, index: int) -> list[LayerError]:
        prefix = f"{self.family.blocks}.{index}"
        block = self.skeleton.load(prefix)
        passes = None
        if self.entrance is not None:
            passes = BlockPass(block, index, self.entrance, self.family, self.device, self.keep_bytes)
        errors: dict[str, float] = {}
        for segment in self.family.segments:
            errors.update(self._segment(block, index, segment, passes))
        if passes is not None:
            passes.advance()
        self._write(index, prefix, block)
        self.skeleton.drop(prefix)
        return [LayerError(index, name, error) for name, error in errors.items()]

    def _segment(self, block: nn.Module, index: int, segment: Segment, passes: BlockPass | None) -> dict[str, float]:
        view = SegmentView(
            block=index,
            prefix=f"{self.family.blocks}.{index}",
            segment=segment,
            linears={name: block.get_submodule(name) for name in segment.linears},
            feeder=block.get_submodule(segment.fed_by),
            feeds=feeding_channels(self.skeleton.description, self.family, block, segment),
        )
        if passes is not None:
            gram = passes.gram(segment)
            view.gram, view.tokens = gram.matrix(), gram.rows
            require_finite(view)
        with torch.no_grad():
            errors = self.visitor.visit(view)
        if passes is not None:
            passes.finish(segment)
        return errors

    def _write(self, index: int, prefix: str, block: nn.Module) -> None:
        if self.writer is None:
            return
        for name, tensor in self.visitor.block_tensors(index, block).items():
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
    read one value head.
    """
    first = block.get_submodule(segment.linears[0])
    channels = torch.arange(first.in_features, device=first.weight.device)
    if segment.fed_by.startswith(family.attention + "."):
        shared = description.heads // description.kv_heads
        head, within = channels // description.head_dim, channels % description.head_dim
        channels = head // shared * description.head_dim + within
    return channels


def stored_dtype(name: str) -> torch.dtype:
    """Return the torch type for safetensors' name of it."""
    return {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]


def walk_bytes(model: ModelDescription, samples: int, length: int) -> int:
    """Estimate the peak memory of a walk with Gram matrices, beside the block itself: activations and one matrix."""
    hidden = 4 * samples * length * model.hidden_size
    widest = max(columns for _, columns in model.block_linears().values())
    kept = 4 * samples * length * widest
    batch = 4 * 6 * max(BATCH_TOKENS, length) * widest
    return 2 * hidden + (kept if kept <= KEEP_BYTES else 0) + batch + 3 * 4 * widest**2


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

    writer = ShardWriter(target)
    errors = Walk(source, visitor, writer, tokens, context.device, on_block=report).run()
    writer.close()
    write_config(config, target)
    copy_companions(source.folder, target)
    return errors

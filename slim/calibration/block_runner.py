"""The hidden states of the calibration samples on their way through one block after another.

Inside a block they go part by part (attention, MLP), so that each segment's input is computed from
the already changed layers before it at the cost of about one forward. Between the parts the
residual stream is what is kept: a finished part then answers zeros, which add nothing to it. Beside
the hidden states nothing of their size exists, but for the input of a part's last layer where that
is small."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.checkpoints.meta_model import MetaModel
from slim.core.lazy import LazyModule
from slim.models.spec import Family, LinearGroupSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

# the widest activation of a batch in a block, in float32, takes about this much
BATCH_BYTES = 2**22
# kept inputs of a part's last layer may take this much; beyond it they are computed a second time
CACHE_BYTES = 2**27
HESSIAN_TILE = 384  # columns of G computed at once; only tiles on and below the diagonal are


@dataclass
class Hessian:
    """Sums X^T X over batches. Only the lower triangle of tiles is computed: about half the work
    for wide inputs."""

    features: int
    device: str = "cpu"
    rows: int = 0
    total: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total = torch.zeros(
            self.features, self.features, dtype=torch.float32, device=self.device
        )

    def add(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs [..., features]."""
        x = inputs.reshape(-1, self.features).float()
        for start in range(0, self.features, HESSIAN_TILE):
            stop = min(start + HESSIAN_TILE, self.features)
            self.total[start:, start:stop].addmm_(x[:, start:].T, x[:, start:stop])
        self.rows += len(x)

    def matrix(self) -> torch.Tensor:
        """Return the symmetric float32 matrix [features, features]."""
        for start in range(0, self.features, HESSIAN_TILE):
            stop = min(start + HESSIAN_TILE, self.features)
            self.total[start:stop, stop:] = self.total[stop:, start:stop].T
        return self.total


@contextmanager
def precision_of(dtype: str) -> Iterator[None]:
    """Let products of float32 matrices take their factors in the precision of ``dtype``, where the
    machine is faster so.

    A model stored in bfloat16 is later run in it, so its calibration inputs need no more: 8 bits of
    mantissa, sums in float32. On a GPU, TF32's 11 bits serve float16 too. A model stored in float32
    is run in float32."""
    cpu, gpu = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = cpu.fp32_precision, gpu.fp32_precision
    try:
        if dtype == "bfloat16":
            cpu.fp32_precision = "bf16"
        if dtype in ("bfloat16", "float16"):
            gpu.fp32_precision = "tf32"
        yield
    finally:
        cpu.fp32_precision, gpu.fp32_precision = before


class _Stop(Exception):
    """Raised inside a forward as soon as what it was run for is there."""


@dataclass
class CapturedInputs:
    """What enters block 0, and how the model calls its blocks.

    hidden: one float32 tensor [samples, length, hidden] per batch, on the CPU.
    dtype: the type the model is stored in, such as ``"bfloat16"``.
    calls: number of samples in a batch -> per block, the arguments the model calls it with beside
        the hidden states (mask, positions, rotary angles), as transformers' own code makes them for
        this family.
    """

    dtype: str = "float32"
    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: dict[int, list[tuple[tuple, dict]]] = field(default_factory=dict)


def capture_inputs(meta_model: MetaModel, tokens: torch.Tensor) -> CapturedInputs:
    """Run embeddings and everything before block 0 on int64 tokens [samples, length], the blocks
    replaced."""
    captured, blocks = CapturedInputs(meta_model.spec.dtype), meta_model.blocks
    calls: list[tuple[tuple, dict]] = []

    def record(hidden, *args, **kwargs):
        if not calls:
            captured.hidden.append(hidden.to("cpu", torch.float32))
        calls.append((args, kwargs))
        if len(calls) == len(blocks):
            raise _Stop
        return hidden

    meta_model.load(meta_model.family.embeddings)
    with torch.no_grad(), replaced_forwards(dict.fromkeys(blocks, record)):
        for batch in batches(tokens, meta_model.spec):
            calls.clear()
            try:
                meta_model.model.base_model(batch.to(meta_model.device), use_cache=False)
            except _Stop as stop:
                traceback.clear_frames(stop.__traceback__)
            captured.calls.setdefault(len(batch), list(calls))
    meta_model.drop(meta_model.family.embeddings)
    return captured


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


def batches(tokens: torch.Tensor, spec: ModelSpec) -> tuple[torch.Tensor, ...]:
    """Split samples [samples, length] into batches whose activations in a block stay small
    (``BATCH_BYTES``)."""
    return tokens.split(max(1, BATCH_BYTES // (4 * widest_layer(spec) * tokens.shape[1])))


def widest_layer(spec: ModelSpec) -> int:
    """Return the largest number of inputs or outputs of a linear layer in a block."""
    return max(max(shape) for shape in spec.block_linears().values())


class BlockRunner:
    """The passes of all batches through one loaded block, segment by segment.

    ``captured.hidden`` is what enters the part at hand; ``finish`` of a part's last segment moves
    it on. The input of that segment is kept below ``cache_bytes``, so that moving on costs one
    matrix product; otherwise the part runs again."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        captured: CapturedInputs,
        family: Family,
        device: str,
        cache_bytes: int,
    ):
        self.block, self.index, self.captured, self.family = block, index, captured, family
        self.device, self.cache_bytes = device, cache_bytes
        self.last: dict[str, str] = {}  # part -> its last segment's first layer
        self.norms: dict[str, str] = {}  # part -> the norm its first segment is fed by
        for group in family.linear_groups:
            part = part_of(group)
            self.last[part] = group.linears[0]
            self.norms.setdefault(part, group.scale_into)
        self.finished: list[str] = []
        self.kept: list[torch.Tensor] = []

    @property
    def running(self) -> list[str]:
        """The linear layers of parts that are not finished."""
        unfinished = [
            group for group in self.family.linear_groups if part_of(group) not in self.finished
        ]
        return [name for group in unfinished for name in group.linears]

    def hessian(self, group: LinearGroupSpec) -> Hessian:
        """Collect the Gram matrix of a segment's input, all segments before it being finished."""
        first = group.linears[0]
        hessian, self.kept = self._new_hessian(first), []
        with precision_of(self.captured.dtype):
            for batch in range(len(self.captured.hidden)):
                inputs = self._run(batch, {}, before=first)
                hessian.add(inputs)
                if first in self.last.values() and self._may_keep(inputs):
                    self.kept.append(inputs.to("cpu"))
        return hessian

    def hessians(self) -> dict[LinearGroupSpec, Hessian]:
        """Collect the Gram matrices of all segments at once, from the block as it is."""
        hessians = {
            group: self._new_hessian(group.linears[0]) for group in self.family.linear_groups
        }
        hooks = [
            self.block.get_submodule(group.linears[0]).register_forward_pre_hook(
                lambda module, inputs, hessian=hessian: hessian.add(inputs[0])
            )
            for group, hessian in hessians.items()
        ]
        try:
            with precision_of(self.captured.dtype):
                for batch in range(len(self.captured.hidden)):
                    self._run(batch, {})
        finally:
            for hook in hooks:
                hook.remove()
        return hessians

    def _new_hessian(self, layer: str) -> Hessian:
        return Hessian(self.block.get_submodule(layer).in_features, self.device)

    def _may_keep(self, inputs: torch.Tensor) -> bool:
        return inputs.nbytes * len(self.captured.hidden) <= self.cache_bytes

    def finish(self, group: LinearGroupSpec) -> list[str]:
        """Where ``group`` is the last of its part, move the hidden states behind that part.

        Returns the linear layers that are not run any more.
        """
        part = part_of(group)
        if self.last[part] != group.linears[0]:
            return []
        following = [other for other in self.last if other not in (*self.finished, part)]
        stop = self.norms[following[0]] if following else None
        with precision_of(self.captured.dtype):
            for batch in range(len(self.captured.hidden)):
                answers = {}
                if self.kept:
                    answers[part] = self.block.get_submodule(self.last[part])(
                        self.kept[batch].to(self.device)
                    )
                    self.kept[batch] = torch.empty(0)
                self.captured.hidden[batch] = self._run(batch, answers, before=stop).to("cpu")
        self.kept = []
        self.finished.append(part)
        return [
            name
            for other in self.family.linear_groups
            if part_of(other) == part
            for name in other.linears
        ]

    def advance(self) -> None:
        """Move the hidden states behind the block where its segments were not finished one by
        one."""
        if not self.finished:
            with precision_of(self.captured.dtype):
                for batch in range(len(self.captured.hidden)):
                    self.captured.hidden[batch] = self._run(batch, {}).to("cpu")

    def _run(
        self, batch: int, answers: dict[str, torch.Tensor], before: str | None = None
    ) -> torch.Tensor:
        """Run the block on a batch and return the input of module ``before``, or the block's
        output.

        answers: part -> output that it gives without being computed.
        """
        hidden = self.captured.hidden[batch]
        args, kwargs = self.captured.calls[len(hidden)][self.index]
        hidden, caught = hidden.to(self.device), []

        def catch(module, inputs):
            caught.append(inputs[0])
            raise _Stop

        answers = {**{part: torch.zeros_like(hidden) for part in self.finished}, **answers}
        hook = self.block.get_submodule(before).register_forward_pre_hook(catch) if before else None
        try:
            with torch.no_grad(), replaced_forwards(self._answering(answers)):
                output = self.block(hidden, *args, **kwargs)
            return output[0] if isinstance(output, tuple) else output
        except _Stop as stop:
            # else what they hold waits for the garbage collector
            traceback.clear_frames(stop.__traceback__)
            return caught[0]
        finally:
            if hook:
                hook.remove()

    def _answering(self, answers: dict[str, torch.Tensor]) -> dict[nn.Module, Callable]:
        """Let parts answer with given outputs; the norm that feeds only them has nothing to do."""
        forwards = {}
        for part, output in answers.items():
            answer = (output, None) if part == self.family.attention else output
            forwards[self.block.get_submodule(part)] = lambda *args, answer=answer, **kwargs: answer
            forwards[self.block.get_submodule(self.norms[part])] = lambda hidden: hidden
        return forwards


def part_of(group: LinearGroupSpec) -> str:
    """Return the child of the block that holds a segment: attention or MLP."""
    return group.linears[0].split(".")[0]

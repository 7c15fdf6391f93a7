"""Forward passes of the calibration samples through one decoder block, one linear group at a time.

A decoder's block computes h + attention(norm(h)) and then h + mlp(norm(h)). Its parts, attention
and MLP, are run one after the other, so that the input of each linear group comes from the already
changed layers before it, at the cost of about one forward pass per block. Between the parts only
the residual stream is kept: a finished part then outputs zeros, which add nothing to it. So nothing
of the size of the hidden states exists besides them, except for the inputs of a part's last layer
where those are small.

An encoder's block may normalise after it has added (BERT), so that no such stream passes by its
parts. It is run from its beginning for every linear group, and once more when all are done.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from slim.calibration.capture import CapturedInputs, StopForward, replaced_forwards, run_block
from slim.calibration.hessian import Hessian, precision_of
from slim.calibration.propagation import Drift
from slim.core.lazy import LazyModule
from slim.models.spec import Family, LinearGroupSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")

# cached inputs of a part's last layer may take this many bytes; beyond it they are computed twice
CACHE_BYTES = 2**27


class BlockRunner:
    """Runs all batches through one loaded block and moves ``captured.hidden`` through it.

    For every linear group in order: :meth:`hessian`, then the caller changes the group's weights,
    then :meth:`finish`. After the last group :meth:`advance`.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        captured: CapturedInputs,
        family: Family,
        device: str,
        cache_bytes: int = CACHE_BYTES,
        sequential: bool = True,
    ):
        """Prepare to run a block.

        Args:
            block: the decoder block, with float32 weights on ``device``.
            index: its number in the model.
            captured: what enters it; ``captured.hidden`` is replaced as parts are finished.
            family: names the block's linear groups.
            device: torch device the block runs on.
            cache_bytes: limit for cached inputs of a part's last layer; affects speed only.
            sequential: whether a group sees the changed layers before it in the block. If not, all
                Hessians are collected at once from the block as it is.
        """
        self.block = block
        self.index = index
        self.captured = captured
        self.family = family
        self.device = device
        self.cache_bytes = cache_bytes
        self.sequential = sequential
        self.in_parts = sequential and not family.is_encoder
        self.last_layer: dict[str, str] = {}  # part -> first layer of its last linear group
        self.norm: dict[str, str] = {}  # part -> the norm in front of it
        for group in family.linear_groups:
            part = part_of(group)
            self.last_layer[part] = group.linears[0]
            self.norm.setdefault(part, group.scale_into)
        self.finished_parts: list[str] = []
        self.cached_inputs: list[torch.Tensor] = []  # per batch, of the current part's last layer
        self.collected: dict[LinearGroupSpec, Hessian] = {}

    def unfinished_layers(self) -> list[str]:
        """Return the linear layers that will be run again, by name within the block."""
        names: list[str] = []
        for group in self.family.linear_groups:
            if part_of(group) not in self.finished_parts:
                names += group.linears
        return names

    def hessian(self, group: LinearGroupSpec) -> Hessian:
        """Collect H = X^T X of a linear group's input; the groups before it must be finished."""
        if not self.sequential:
            if not self.collected:
                self.collected = self._collect_all()
            return self.collected.pop(group)
        hessian = self._new_hessian(group.linears[0])
        with precision_of(self.captured.dtype):
            for inputs in self.inputs(group):
                hessian.add(inputs)
        return hessian

    def drift(self, group: LinearGroupSpec, plain: BlockRunner) -> Drift:
        """Collect H = X^^T X^ of a linear group's input and C = X^T X^ with the plain model's.

        Args:
            group: the groups before it must be finished, in ``plain`` too.
            plain: runs the same samples through the block as the source has it.
        """
        features = self.block.get_submodule(group.linears[0]).in_features
        drift = Drift.empty(features, self.device)
        adds = self.in_parts and not self.family.norms_outputs
        adds = adds and group.linears[0] in self.last_layer.values()
        batches = zip(plain.inputs(group), self.inputs(group), strict=True)
        first = 0
        with precision_of(self.captured.dtype):
            for batch, (unchanged, changed) in enumerate(batches):
                residual = None
                if adds:
                    residual = plain.captured.hidden[batch] - self.captured.hidden[batch]
                    residual = residual.to(self.device)
                drift.add(unchanged, changed, residual, first)
                first += len(changed)
        return drift

    def inputs(self, group: LinearGroupSpec) -> Iterator[torch.Tensor]:
        """Yield a linear group's input, batch by batch, [samples, length, in]."""
        layer = group.linears[0]
        self.cached_inputs = []
        for batch in range(len(self.captured.hidden)):
            inputs = self._run(batch, {}, until=layer)
            if self.in_parts and layer in self.last_layer.values() and self._fits_cache(inputs):
                self.cached_inputs.append(inputs.to("cpu"))
            yield inputs

    def finish(self, group: LinearGroupSpec) -> list[str]:
        """After a part's last linear group, move the hidden states past that part.

        Args:
            group: the group whose weights have just been changed.

        Returns:
            The linear layers, by name within the block, that are not run any more.
        """
        part = part_of(group)
        if not self.in_parts or self.last_layer[part] != group.linears[0]:
            return []
        # Stop in front of the next part's norm: what enters it is the residual stream.
        remaining = [name for name in self.last_layer if name not in (*self.finished_parts, part)]
        until = self.norm[remaining[0]] if remaining else None
        with precision_of(self.captured.dtype):
            for batch in range(len(self.captured.hidden)):
                # With the last layer's inputs at hand the part costs one matrix product.
                cached_outputs = {}
                if self.cached_inputs:
                    layer = self.block.get_submodule(self.last_layer[part])
                    cached_outputs[part] = layer(self.cached_inputs[batch].to(self.device))
                    self.cached_inputs[batch] = torch.empty(0)
                self.captured.hidden[batch] = self._run(batch, cached_outputs, until).to("cpu")
        self.cached_inputs = []
        self.finished_parts.append(part)
        return self._layers_of(part)

    def advance(self) -> None:
        """Move the hidden states past the block, unless :meth:`finish` has done so part by part."""
        if self.finished_parts:
            return
        with precision_of(self.captured.dtype):
            for batch in range(len(self.captured.hidden)):
                self.captured.hidden[batch] = self._run(batch, {}).to("cpu")

    def _collect_all(self) -> dict[LinearGroupSpec, Hessian]:
        """Collect the Hessians of all groups in one forward pass of the block as it is."""
        hessians = {}
        hooks = []
        for group in self.family.linear_groups:
            layer = group.linears[0]
            hessians[group] = self._new_hessian(layer)
            hook = partial(_add_inputs, hessians[group])
            hooks.append(self.block.get_submodule(layer).register_forward_pre_hook(hook))
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

    def _fits_cache(self, inputs: torch.Tensor) -> bool:
        return inputs.nbytes * len(self.captured.hidden) <= self.cache_bytes

    def _layers_of(self, part: str) -> list[str]:
        names: list[str] = []
        for group in self.family.linear_groups:
            if part_of(group) == part:
                names += group.linears
        return names

    def _run(
        self, batch: int, cached_outputs: dict[str, torch.Tensor], until: str | None = None
    ) -> torch.Tensor:
        """Run the block on a batch; return the input of module ``until``, or the block's output.

        Parts in ``cached_outputs`` give that output without being computed, finished ones zeros.
        """
        hidden = self.captured.hidden[batch]
        call = self.captured.calls[len(hidden)][self.index]
        hidden = hidden.to(self.device)
        outputs = {part: torch.zeros_like(hidden) for part in self.finished_parts}
        outputs.update(cached_outputs)
        caught: list[torch.Tensor] = []

        def catch(module, inputs):
            caught.append(inputs[0])
            raise StopForward

        hook = None
        if until is not None:
            hook = self.block.get_submodule(until).register_forward_pre_hook(catch)
        try:
            with torch.no_grad(), replaced_forwards(self._constant_parts(outputs)):
                return run_block(self.block, hidden, call)
        except StopForward as stop:
            # tensors in the frames would otherwise wait for the garbage collector
            traceback.clear_frames(stop.__traceback__)
            return caught[0]
        finally:
            if hook is not None:
                hook.remove()

    def _constant_parts(self, outputs: dict[str, torch.Tensor]) -> dict[nn.Module, Callable]:
        """Return forwards that let parts return given outputs; the norms before them do nothing."""
        forwards: dict[nn.Module, Callable] = {}
        for part, output in outputs.items():
            # attention returns its weights as well
            result = (output, None) if part == self.family.attention else output
            forwards[self.block.get_submodule(part)] = partial(_constant, result)
            forwards[self.block.get_submodule(self.norm[part])] = _unchanged
        return forwards


def part_of(group: LinearGroupSpec) -> str:
    """Return the child of the block that holds a linear group: attention or MLP."""
    return group.linears[0].split(".")[0]


def _add_inputs(hessian: Hessian, module: nn.Module, inputs: tuple) -> None:
    """Forward hook that adds a layer's input to ``hessian``."""
    hessian.add(inputs[0])


def _constant(result, *args, **kwargs):
    return result


def _unchanged(hidden):
    return hidden

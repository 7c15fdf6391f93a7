"""What a method sees of a linear group, and what sequential calibration asks of a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.calibration.propagation import Drift
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.models.spec import Family, LinearGroupSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = LazyModule("torch")


@dataclass
class LinearGroup:
    """The linear layers of one block that share an input, such as q/k/v.

    Attributes:
        block: number of the block.
        prefix: the block's name in the model, such as ``model.layers.3``.
        spec: names of the layers and of the module in front of them.
        linears: name within the block -> float32 layer. A method changes ``weight`` in place to
            what the model will compute with. Scales that a method folds elsewhere stay out of it:
            weights are given back as if the input had not been scaled.
        scale_module: the module named ``scale_into``, a norm or a linear layer, whose output
            channels are this group's input channels.
        channel_map: int64 [in], for every input channel the channel of ``scale_module`` it comes
            from.
        hessian: H = X^T X over the calibration tokens, float32 [in, in]; None where the method
            needs none.
        tokens: number of rows of X.
        drift: how X differs from the plain model's; None unless the method ``propagates``.
    """

    block: int
    prefix: str
    spec: LinearGroupSpec
    linears: dict[str, nn.Linear]
    scale_module: nn.Module
    channel_map: torch.Tensor
    hessian: torch.Tensor | None = None
    tokens: int = 0
    drift: Drift | None = None

    @classmethod
    def of_block(
        cls, model: ModelSpec, block: nn.Module, index: int, spec: LinearGroupSpec
    ) -> LinearGroup:
        """Take a linear group of a loaded block, without its Hessian.

        Args:
            model: the model's sizes and family.
            block: the decoder block, with float32 weights.
            index: its number.
            spec: which group.
        """
        return cls(
            block=index,
            prefix=f"{model.family.blocks}.{index}",
            spec=spec,
            linears={name: block.get_submodule(name) for name in spec.linears},
            scale_module=block.get_submodule(spec.scale_into),
            channel_map=input_channel_map(model, model.family, block, spec),
        )

    @property
    def scale_into(self) -> str:
        """The name within the block of the module that 1/s is folded into."""
        return self.spec.scale_into

    def require_finite(self) -> None:
        """Raise ``SlimError`` naming the layer if its inputs contain NaN or infinity."""
        if not torch.isfinite(self.hessian.diagonal()).all():
            raise SlimError(
                f"The inputs of {self.prefix}.{self.spec.linears[0]} contain NaN or infinity: the "
                "weights are damaged, or the calibration text is nothing like what the model was "
                "trained on.\nCheck the model with quant=none, or choose another calibration text."
            )


class BlockMethod:
    """A method that sequential calibration applies to one block after another.

    Attributes:
        needs_hessian: whether it looks at H; without it no forward pass is run at all.
        sequential: whether each linear group sees the already changed ones before it in its block;
            if not, all Hessians of a block are collected beforehand.
        resumable: whether :meth:`state` is all it has to remember between two blocks.
        propagates: whether it is told how the inputs differ from the plain model's.
    """

    needs_hessian: bool = True
    sequential: bool = True
    resumable: bool = False
    propagates: bool = False

    def process(self, group: LinearGroup) -> dict[str, float]:
        """Change the weights of ``group.linears`` in place.

        Returns:
            Name within the block -> relative output error.
        """
        raise NotImplementedError

    def block_tensors(self, block: int, module: nn.Module) -> dict[str, torch.Tensor]:
        """Return a finished block's tensors as they are to be stored, by name within the block.

        Floating-point tensors that the source has too are stored in the source's type.

        Args:
            block: its number.
            module: the block; layers with a ``finished_weight`` may have no weight any more.
        """
        return module.state_dict()

    def has_finished_weight(self, name: str) -> bool:
        """Whether ``finished_weight`` can return the weights of layer ``name`` of the block."""
        return False

    def finished_weight(self, name: str) -> torch.Tensor | None:
        """Return a finished layer's weights, float32 [out, in], from a smaller form of them.

        Their float32 copy is freed while the layer is not run, and :meth:`block_tensors` has to do
        without it. None: the layer keeps its weights.

        Args:
            name: the layer within the block.
        """
        return None

    def other_tensors(
        self, name: str, tensor: torch.Tensor, family: Family, tied: bool
    ) -> dict[str, torch.Tensor]:
        """Return what is stored for a tensor outside the blocks (embedding, final norm, head).

        Args:
            name: its full name.
            tensor: as stored in the source, of any shape.
            family: names the embedding and the head.
            tied: whether the head shares the embedding's weights.
        """
        return {name: tensor}

    def state(self) -> dict:
        """Return what has to be remembered if the run is interrupted, as plain JSON values."""
        return {}

    def resume(self, state: dict) -> None:
        """Restore what :meth:`state` returned."""


def input_channel_map(
    spec: ModelSpec, family: Family, block: nn.Module, group: LinearGroupSpec
) -> torch.Tensor:
    """Return for each input channel of a linear group the channel of ``scale_into`` it comes from.

    They are the same except where values feed the attention's output: under grouped-query attention
    several query heads read one value head. In a fused layer only some of the rows are the group's
    inputs.

    Args:
        spec: the model's sizes.
        family: its names.
        block: the decoder block.
        group: the linear group.

    Returns:
        int64 [in].
    """
    first = block.get_submodule(group.linears[0])
    channels = torch.arange(first.in_features, device=first.weight.device)
    if group.scale_into.startswith(family.attention + "."):
        query_heads_per_value = spec.heads // spec.kv_heads
        head = channels // spec.head_dim
        within = channels % spec.head_dim
        channels = head // query_heads_per_value * spec.head_dim + within
    return channels + spec.first_scaled_row(group)

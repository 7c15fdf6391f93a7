"""Training nothing but the scales of a quantised model, from end to end; its codes stay.

The result has the same format, size and speed, and no adapter. It is the last step of EfficientQAT
(Chen et al., arXiv:2407.11062, E2E-QP), there on text alone. With a teacher the model learns what
the plain one predicts. A scale s becomes s e^g, so that a learning rate is a relative change
whatever the weights' size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.shards import ShardWriter
from slim.checkpoints.writer import copy_companions, write_config
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.loading.load_model import load_model
from slim.quantization.formats import read_config
from slim.quantization.scheme import GROUP_SIZES
from slim.quantization.storage import weight_bytes
from slim.training.tuner import Tuner

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint
    from slim.models.spec import ModelSpec
    from slim.quantization.kernels.linear import QuantLinear
    from slim.training import task
else:
    torch = LazyModule("torch")

RATE = 5e-3  # highest learning rate: with Adam about the relative change of a scale in a step


@dataclass
class Scales(Tuner):
    """The scales of packed weights are trained, in float32."""

    cache_name: ClassVar[str] = "Scales"
    after_quantizer: ClassVar[bool] = True

    def rate(self, spec: ModelSpec) -> float:
        return self.learning_rate or RATE

    def check_weights(self, spec: ModelSpec) -> None:
        if spec.quantization is None:
            raise SlimError(
                f"tuner=scales trains the scales of a quantised model, and {spec.name} is plain. "
                "Choose a quantizer: quant=gptq."
            )
        form = read_config(spec.quantization, spec.name).format
        if form.scales is None:
            raise SlimError(
                f"tuner=scales does not train the format {form.name}. "
                "Use quant.format=compressed-tensors, gptq or awq."
            )
        if self.trainer.sharded:
            raise SlimError(
                f"trainer.strategy={self.trainer.strategy} splits weights over devices, and "
                "quantised ones cannot be split. Use trainer=ddp."
            )

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        scales = 0
        for rows, columns in spec.block_linears().values():
            scales += spec.blocks * rows * -(-columns // min(GROUP_SIZES))
        return weight_bytes(spec) + self.bytes_per_trained * scales + self.activation_bytes(spec)

    def prepare(self, source: Path, device: str, spec: ModelSpec):
        model = load_model(source, "float32", device, trainable=True).requires_grad_(False)
        for _, layer in packed_layers(model):
            layer.train_scale()
        return model

    def finish(self, model, learned: task.Task) -> tuple[torch.nn.Module, dict]:
        form = read_config(learned.checkpoint.spec.quantization).format
        dtype = getattr(torch, form.scale_dtype(learned.checkpoint.spec.dtype))
        moved = count = 0
        for _, layer in packed_layers(model):
            moved += float(layer.growth.detach().abs().sum())
            count += layer.growth.numel()
            layer.settle_scale(dtype)
        return model, {"trained_scales": count, "scale_change_mean": moved / count}

    def save(
        self, model, better: bool, checkpoint: Checkpoint, base: Checkpoint, target: Path
    ) -> None:
        if not better:
            super().save(model, better, checkpoint, base, target)
            return
        writer = ShardWriter(target)
        for name, tensor in with_new_scales(model, checkpoint):
            writer.add(name, tensor)
        writer.close()
        write_config(checkpoint.spec.config, target)
        copy_companions(checkpoint.folder, target)


def packed_layers(model) -> Iterator[tuple[str, QuantLinear]]:
    """Yield (name, layer) of the packed linear layers of a model's blocks."""
    from slim.quantization.kernels.linear import QuantLinear

    tables = {id(getattr(module, "table", None)) for module in model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear) and id(module) not in tables:
            yield name, module


def with_new_scales(model, checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint, one at a time, with the scales of a model.

    Args:
        model: what was trained, its scales as they are stored.
        checkpoint: what it was loaded from.
    """
    from slim.checkpoints.reader import TensorReader

    form = read_config(checkpoint.spec.quantization).format
    scales = {f"{name}.{form.scales}": layer.scale for name, layer in packed_layers(model)}
    reader = TensorReader(checkpoint)
    for name in checkpoint.tensors:
        stored = reader.read(name)
        if name in scales:
            scale = scales[name].detach().cpu()
            by_input = form.scales_by_input
            stored = (scale.T if by_input else scale).to(stored.dtype).contiguous()
        yield name, stored
        reader.release()

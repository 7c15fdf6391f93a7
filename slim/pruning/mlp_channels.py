"""Width pruning of an encoder: the MLP loses channels, as many in every block, so that the result
is a stock model that any program loads.

A channel c of the MLP is row c of the layer into it (of a gated one two rows) and column c of the
layer out of it. Its score is the product of both norms,

    s_c = |W_in[c]| |W_out[:, c]|,

the largest change of the block's output that removing it can cause for an input of length 1 and an
activation that does not stretch. The channels with the smallest scores go, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.checkpoints.shards import ShardWriter
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import copy_companions, write_config
from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.models.accounting import before_and_after
from slim.models.spec import ModelSpec
from slim.pruning.calibrated import LIBRARY_BYTES, shard_bytes

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

INTO = {"up_proj": 1, "gate_up_proj": 2}  # role of the layer into the MLP -> rows of a channel
OUT_OF = "down_proj"


@dataclass
class MlpChannels(Stage):
    """``pruner=mlp_channels``.

    Attributes:
        ratio: Share of the channels that goes, above 0 and below 1.
        multiple: The channels that stay are a multiple of it, which quantization's groups need.
    """

    cache_name: ClassVar[str] = "MlpChannels"

    ratio: float = 0.25
    multiple: int = 32

    kind: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        require_number("pruner.ratio", self.ratio, 1e-6, 1 - 1e-6)
        require_number("pruner.multiple", self.multiple, 1, integer=True)

    def channels(self, spec: ModelSpec) -> int:
        """Return how many channels stay.

        Args:
            spec: The model.
        """
        wanted = spec.intermediate_size * (1 - self.ratio)
        return round(wanted / self.multiple) * self.multiple

    def check(self, spec: ModelSpec) -> None:
        spec.family  # noqa: B018 - refuses families whose parts are unknown
        if not spec.is_encoder:
            raise SlimError(
                f"pruner=mlp_channels prunes encoders, and {spec.name} is a decoder. Use "
                "pruner=width_l2 or another of the width pruners."
            )
        spec.require_plain("Prune first, quantize afterwards.")
        kept = self.channels(spec)
        if not 0 < kept < spec.intermediate_size:
            raise SlimError(
                f"pruner.ratio={self.ratio} leaves {kept} of the {spec.intermediate_size} channels "
                f"of {spec.name}, in multiples of {self.multiple}. Use another pruner.ratio, or a "
                "smaller pruner.multiple."
            )

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_config(**{spec.key("intermediate_size"): self.channels(spec)})

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return LIBRARY_BYTES + shard_bytes(spec) + 4 * spec.block_parameters()

    def run(self, source: Path, target: Path, context: Context) -> dict:
        checkpoint = open_checkpoint(source)
        self.check(checkpoint.spec)
        result = self.output_spec(checkpoint.spec)
        reader, writer = TensorReader(checkpoint), ShardWriter(target)
        shares = []
        cuts: dict[str, tuple[int, torch.Tensor]] = {}
        for block in track(range(checkpoint.spec.blocks), "MLP channels"):
            scores = channel_scores(reader, checkpoint.spec, block)
            kept = scores.topk(self.channels(checkpoint.spec)).indices.sort().values
            shares.append(float(scores[kept].sum() / scores.sum()))
            cuts.update(cut_tensors(checkpoint, block, kept))
        for name in checkpoint.tensors:
            tensor = reader.read(name)
            if name in cuts:
                dimension, chosen = cuts[name]
                tensor = tensor.index_select(dimension, chosen).contiguous()
            writer.add(name, tensor)
        writer.close()
        write_config(result.config, target)
        copy_companions(checkpoint.folder, target)
        return {
            "channels": self.channels(checkpoint.spec),
            "score_kept": sum(shares) / len(shares),
            **before_and_after(checkpoint.spec, result),
        }


def mlp_layers(spec: ModelSpec) -> tuple[str, str, int]:
    """Return the layers into and out of the MLP, within a block, and the rows of a channel.

    Args:
        spec: An encoder.
    """
    roles = {spec.family.role(name): name for name in spec.block_linears()}
    into = next(role for role in INTO if role in roles)
    return roles[into], roles[OUT_OF], INTO[into]


def channel_scores(reader: TensorReader, spec: ModelSpec, block: int) -> torch.Tensor:
    """Return the score of every channel, float32 [channels].

    Args:
        reader: On the checkpoint.
        spec: The encoder.
        block: Its number.
    """
    into, out, rows = mlp_layers(spec)
    prefix = f"{spec.family.blocks}.{block}"
    first = reader.read(f"{prefix}.{into}.weight").float()
    second = reader.read(f"{prefix}.{out}.weight").float()
    channels = second.shape[1]
    squares = first.square().sum(1).view(rows, channels).sum(0)
    return squares.sqrt() * second.norm(dim=0)


def cut_tensors(
    checkpoint: Checkpoint, block: int, kept: torch.Tensor
) -> Iterator[tuple[str, tuple[int, torch.Tensor]]]:
    """Yield name -> dimension and indices of what stays, for the tensors of a block that are cut.

    Args:
        checkpoint: The encoder.
        block: Its number.
        kept: int64, numbers of the channels that stay, ascending.
    """
    spec = checkpoint.spec
    into, out, rows = mlp_layers(spec)
    prefix = f"{spec.family.blocks}.{block}"
    channels = spec.intermediate_size
    chosen = torch.cat([kept + row * channels for row in range(rows)])
    yield f"{prefix}.{into}.weight", (0, chosen)
    if f"{prefix}.{into}.bias" in checkpoint.tensors:
        yield f"{prefix}.{into}.bias", (0, chosen)
    yield f"{prefix}.{out}.weight", (1, kept)

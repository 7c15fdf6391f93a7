"""Tuning: train a checkpoint further, by low-rank adapters that are then merged, or all of its
weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.writer import write_blocks
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_flag, require_number
from slim.loading.load_model import load_model
from slim.models.spec import ADAPTER
from slim.quantization.assign import layer_shapes
from slim.quantization.formats import read_config
from slim.quantization.storage import weight_bytes
from slim.training.targets import find_ranks, find_targets, require_small
from slim.training.tuner import Tuner

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint
    from slim.loading import adapters as adapter_checkpoint
    from slim.models.spec import ModelSpec
    from slim.training import adapters, stored, task
else:
    adapter_checkpoint = LazyModule("slim.loading.adapters")
    adapters, stored = LazyModule("slim.training.adapters"), LazyModule("slim.training.stored")


@dataclass
class Lora(Tuner):
    """Low-rank adapters on linear layers of the blocks, merged afterwards (Hu et al.,
    arXiv:2106.09685).

    r: rank. alpha: the adapters' output is scaled by alpha / r. dropout: of the adapters' input.
    targets: projections with adapters, such as ``[q_proj, v_proj]``, or patterns (``targets.py``);
        null for all linear layers of the blocks.
    rank_pattern: pattern of layers -> their rank; others have r. rslora: scale by alpha /
        sqrt(rank).
    dora: train the length of every row of the weights apart from its direction.
    merge: fold the adapters into the weights; False leaves them beside the weights, which stay as
    they are."""

    cache_name: ClassVar[str] = "Lora"

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    rslora: bool = False
    dora: bool = False
    merge: bool = True

    width_rate: ClassVar[float] = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self.setting("r"), self.r, 1, 4096, integer=True)
        require_number(self.setting("alpha"), self.alpha, 1e-6)
        require_number(self.setting("dropout"), self.dropout, 0, 0.99)
        for name in ("rslora", "dora", "merge"):
            require_flag(self.setting(name), getattr(self, name))
        if self.targets is not None:
            self.targets = [
                str(target)
                for target in ([self.targets] if isinstance(self.targets, str) else self.targets)
            ]
            if not self.targets:
                raise SlimError(
                    f"{self.group}.targets=[] leaves nothing to train. Use null for all linear layers."
                )
        self.rank_pattern = {
            str(pattern): rank for pattern, rank in (self.rank_pattern or {}).items()
        }
        for pattern, rank in self.rank_pattern.items():
            require_number(
                f"{self.setting('rank_pattern')}: {pattern}", rank, 1, 4096, integer=True
            )

    def packages(self) -> tuple[str, ...]:
        return ("peft",)

    def check(self, spec: ModelSpec) -> None:
        super().check(spec)
        require_small(spec, self.ranks(spec), self.group)

    def check_weights(self, spec: ModelSpec) -> None:
        if spec.quantization is None:
            return
        if self.merge:
            raise SlimError(
                f"{spec.name} is quantised, and merged adapters would make its weights plain again. "
                f"Use {self.group}.merge=false to keep them beside it. Or: Tune first and quantise the result."
            )
        self.refuse_splitting()
        stored = read_config(spec.quantization, spec.name)  # refuses formats slim does not read
        stored.format.require_library()
        if self.dora and not stored.format.trains_dora:
            need = "needs plain weights or those of bitsandbytes"
            raise SlimError(f"{self.group}.dora=true {need}. Use {self.group}.dora=false.")

    def refuse_splitting(self) -> None:
        """Raise ``SlimError`` where packed weights would have to be split over devices."""
        if self.trainer.sharded:
            raise SlimError(
                f"trainer.strategy={self.trainer.strategy} splits weights over devices, and quantised ones cannot be split. "
                "Use trainer=ddp or trainer=deepspeed_zero2."
            )

    def ranks(self, spec: ModelSpec) -> dict[str, int]:
        """Return full name -> rank of the layers with adapters. Raises ``SlimError`` for names that
        do not exist."""
        adapted = find_targets(spec, self.targets, self.setting("targets"))
        return find_ranks(spec, adapted, self.r, self.rank_pattern, self.group)

    def target_names(self, spec: ModelSpec) -> list[str]:
        """Return the layers with adapters as PEFT takes them: names within a block, or whole ones
        where blocks differ."""
        adapted, linears = self.ranks(spec), list(spec.block_linears())
        within = [name for name in linears if any(whole.endswith(f".{name}") for whole in adapted)]
        return within if len(adapted) == spec.blocks * len(within) else list(adapted)

    def adapter_parameters(self, spec: ModelSpec) -> int:
        """Count the adapters' parameters: r (in + out) per linear layer, with DoRA out more."""
        shapes = layer_shapes(spec)
        return sum(
            rank * sum(shapes[name]) + self.dora * shapes[name][0]
            for name, rank in self.ranks(spec).items()
        )

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        if self.merge:
            return spec
        return spec.with_config(**{ADAPTER: {"parameters": self.adapter_parameters(spec)}})

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        plain = "float32" if device == "cpu" and spec.quantization is None else None
        # merging makes one layer's product
        trained = self.bytes_per_trained * self.adapter_parameters(spec)
        return weight_bytes(spec, plain) + trained + self.activation_bytes(spec)

    def prepare(self, source: Path, device: str, spec: ModelSpec):
        model = load_model(source, device=device, trainable=True)
        return adapters.add_adapters(
            model,
            self.r,
            self.alpha,
            self.dropout,
            self.target_names(spec),
            self.rslora,
            self.dora,
            self.rank_pattern,
        )

    def finish(self, model, learnt: task.Task) -> tuple[torch.nn.Module, dict]:
        probe = learnt.held_out[0]["tokens"][:1].to(learnt.device)
        if not self.merge:
            return model, {"adapter_effect": adapters.adapter_effect(model, probe)}
        plain, facts = self.merged(model, probe, learnt)
        tell_merged(facts)
        return plain, facts | stored.finalize(plain, learnt.checkpoint)

    def merged(self, model, probe: torch.Tensor, learnt: task.Task) -> tuple[torch.nn.Module, dict]:
        """Return the plain model with the adapters of ``model`` folded in, and by how much its
        outputs differ."""
        return adapters.merge_adapters(model, probe)

    def inherited(self, checkpoint: Checkpoint) -> dict:
        # an adapter on top fills the zeros
        return super().inherited(checkpoint) if self.merge else {}

    def save(
        self, model, better: bool, checkpoint: Checkpoint, base: Checkpoint, target: Path
    ) -> None:
        if self.merge or not better:
            super().save(model, better, checkpoint if self.merge else base, base, target)
            return
        write_blocks(base, target, list(range(base.spec.blocks)))
        adapter_checkpoint.save_adapter(model, target)


def tell_merged(facts: dict) -> None:
    """Print what merging changed."""
    from slim.core.console import say

    say(
        f"Adapters merged: outputs differ from the trained model's by at most {facts['merge_error']:.2g} (logits); "
        f"the adapters' own effect is {facts['adapter_effect']:.2g}.",
    )


@dataclass
class Full(Tuner):
    """All weights are trained, in float32."""

    cache_name: ClassVar[str] = "Full"

    width_rate: ClassVar[float] = 0.1

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return self.bytes_per_trained * spec.parameters() + self.activation_bytes(spec)

    def prepare(self, source: Path, device: str, spec: ModelSpec):
        return load_model(source, "float32", device).requires_grad_(True)

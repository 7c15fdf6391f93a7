"""Tuning: train a checkpoint further, by low-rank adapters that are then merged, or all of its
weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.writer import write_blocks
from slim.core.console import say
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
    adapters = LazyModule("slim.training.adapters")
    stored = LazyModule("slim.training.stored")


@dataclass
class Lora(Tuner):
    """Low-rank adapters on linear layers of the blocks, merged afterwards (Hu et al.,
    arXiv:2106.09685).

    Attributes:
        r: Rank, 1 to 4096.
        alpha: The adapters' output is scaled by alpha / r.
        dropout: Of the adapters' input, 0 to 0.99.
        targets: Layers with adapters, such as ``[q_proj, v_proj]``, or patterns (``targets.py``);
            None for all linear layers of the blocks.
        rank_pattern: Pattern of layers -> their rank; others have ``r``.
        rslora: Scale by alpha / sqrt(rank).
        dora: Train the length of every row of the weights apart from its direction.
        merge: Fold the adapters into the weights; False leaves them next to the weights, which stay
            as they are.
    """

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
        self._check_targets()
        self._check_rank_pattern()

    def _check_targets(self) -> None:
        if self.targets is None:
            return
        targets = [self.targets] if isinstance(self.targets, str) else self.targets
        self.targets = [str(target) for target in targets]
        if not self.targets:
            raise SlimError(
                f"{self.group}.targets=[] leaves nothing to train. Use null for all linear layers."
            )

    def _check_rank_pattern(self) -> None:
        ranks = self.rank_pattern or {}
        self.rank_pattern = {str(pattern): rank for pattern, rank in ranks.items()}
        for pattern, rank in self.rank_pattern.items():
            setting = f"{self.setting('rank_pattern')}: {pattern}"
            require_number(setting, rank, 1, 4096, integer=True)

    def packages(self) -> tuple[str, ...]:
        return ("peft",)

    def check(self, spec: ModelSpec) -> None:
        if spec.is_encoder:
            raise SlimError(
                f"{spec.name} is an encoder, whose new head needs training too, and adapters leave "
                "it as it is.\nUse tuner=encoder (all weights), and for distillation "
                "teacher=encoder."
            )
        super().check(spec)
        require_small(spec, self.ranks(spec), self.group)

    def check_weights(self, spec: ModelSpec) -> None:
        if spec.quantization is None:
            return
        if self.merge:
            raise SlimError(
                f"{spec.name} is quantised, and merged adapters would make its weights plain again."
                f"\nUse {self.group}.merge=false to keep them next to it. "
                "Or: Tune first and quantise the result."
            )
        self.refuse_splitting()
        stored = read_config(spec.quantization, spec.name)  # refuses formats slim does not read
        stored.format.require_library()
        if self.dora and not stored.format.trains_dora:
            raise SlimError(
                f"{self.group}.dora=true needs plain weights or those of bitsandbytes. "
                f"Use {self.group}.dora=false."
            )

    def refuse_splitting(self) -> None:
        """Check that packed weights would not have to be split over devices.

        Raises:
            SlimError: They would.
        """
        if self.trainer.sharded:
            raise SlimError(
                f"trainer.strategy={self.trainer.strategy} splits weights over devices, and "
                "quantised ones cannot be split. Use trainer=ddp or trainer=deepspeed_zero2."
            )

    def ranks(self, spec: ModelSpec) -> dict[str, int]:
        """Return full name -> rank of the layers with adapters.

        Args:
            spec: The model to train.

        Raises:
            SlimError: ``targets`` or ``rank_pattern`` name what does not exist.
        """
        adapted = find_targets(spec, self.targets, self.setting("targets"))
        return find_ranks(spec, adapted, self.r, self.rank_pattern, self.group)

    def target_names(self, spec: ModelSpec) -> list[str]:
        """Return the layers with adapters as PEFT takes them: names within a block, or whole ones
        where blocks differ.

        Args:
            spec: The model to train.
        """
        adapted = self.ranks(spec)
        endings = {f".{name}": name for name in spec.block_linears()}
        within = [
            name
            for ending, name in endings.items()
            if any(full_name.endswith(ending) for full_name in adapted)
        ]
        if len(adapted) == spec.blocks * len(within):
            return within
        return list(adapted)

    def adapter_parameters(self, spec: ModelSpec) -> int:
        """Count the adapters' parameters: r (in + out) per linear layer, with DoRA out more.

        Args:
            spec: The model to train.
        """
        shapes = layer_shapes(spec)
        total = 0
        for name, rank in self.ranks(spec).items():
            out_features, in_features = shapes[name]
            total += rank * (out_features + in_features)
            if self.dora:
                total += out_features
        return total

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        if self.merge:
            return spec
        return spec.with_config(**{ADAPTER: {"parameters": self.adapter_parameters(spec)}})

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        plain = "float32" if device == "cpu" and spec.quantization is None else None
        # Merging makes the product of one layer at a time, which is little.
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

    def finish(self, model, learned: task.Task) -> tuple[torch.nn.Module, dict]:
        probe = learned.held_out[0]["tokens"][:1].to(learned.device)
        if not self.merge:
            return model, {"adapter_effect": adapters.adapter_effect(model, probe)}
        plain, metadata = self.merged(model, probe, learned)
        tell_merged(metadata)
        return plain, metadata | stored.finalize(plain, learned.checkpoint)

    def merged(
        self, model, probe: torch.Tensor, learned: task.Task
    ) -> tuple[torch.nn.Module, dict]:
        """Fold the adapters in.

        Args:
            model: The trained model, wrapped by PEFT.
            probe: int64 [rows, length], tokens to compare outputs on.
            learned: The task.

        Returns:
            The plain model, and by how much its outputs differ, see
            :func:`slim.training.adapters.merge_adapters`.
        """
        return adapters.merge_adapters(model, probe)

    def save(
        self, model, better: bool, checkpoint: Checkpoint, base: Checkpoint, target: Path
    ) -> None:
        if self.merge or not better:
            untouched = checkpoint if self.merge else base
            super().save(model, better, untouched, base, target)
            return
        write_blocks(base, target, list(range(base.spec.blocks)))
        adapter_checkpoint.save_adapter(model, target)


def tell_merged(metadata: dict) -> None:
    """Print what merging changed.

    Args:
        metadata: What :func:`slim.training.adapters.merge_adapters` gave.
    """
    say(
        "Adapters merged: outputs differ from the trained model's by at most "
        f"{metadata['merge_error']:.2g} (logits); "
        f"the adapters' own effect is {metadata['adapter_effect']:.2g}."
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

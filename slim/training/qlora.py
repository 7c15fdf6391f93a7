"""QLoRA: adapters trained on a base that is held in 4 or 8 bits (Dettmers et al.,
arXiv:2305.14314).

The base is quantised by bitsandbytes first, block by block, as ``quant=nf4`` or ``quant=int8``
would, so the plain model is never in memory while training. Afterwards there are two honest
results:

- ``merge=true``: dequantised base + s B A, a plain model. The adapters were trained on the
  quantised base; added to the original weights, or quantised again together with these, they would
  give models that nobody trained.
- ``merge=false``: the quantised base with the adapters next to it.

The quantised base is worse than the source. So a merged result has to beat the *source* to be kept.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.core import processes
from slim.core.io import atomic_path
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_flag
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.formats.bitsandbytes import require_library
from slim.quantization.methods import bitsandbytes as bnb
from slim.quantization.storage import weight_bytes
from slim.training.tune import Lora

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint
    from slim.training import adapters, fit, task
else:
    adapters = LazyModule("slim.training.adapters")

QUANTS = ("nf4", "int8")
BASE = "base"  # folder of the quantised base in the work folder


@dataclass
class QLora(Lora):
    """Low-rank adapters on a quantised base.

    Attributes:
        base_quant: How the base is held: ``nf4`` or ``int8``.
        double_quant: With nf4, quantise the scales too.
    """

    cache_name: ClassVar[str] = "QLora"

    base_quant: str = "nf4"
    double_quant: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self.setting("base_quant"), self.base_quant, QUANTS)
        require_flag(self.setting("double_quant"), self.double_quant)

    @property
    def quantizer(self) -> bnb.BitsAndBytes:
        """The stage that quantises the base."""
        if self.base_quant == "nf4":
            return bnb.NF4(self.double_quant)
        return bnb.Int8()

    def check_weights(self, spec: ModelSpec) -> None:
        spec.require_plain(
            "tuner=qlora quantizes by itself: use tuner=lora tuner.merge=false on this model."
        )
        self.refuse_splitting()
        require_library()
        self.quantizer.check(spec)

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        if self.merge:
            return spec
        return super().output_spec(self.quantizer.output_spec(spec))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        packed_spec = self.quantizer.output_spec(spec)
        training = super().peak_bytes(packed_spec, device)
        merging = 0
        if self.merge:  # the packed base and the plain model are there together
            dense = weight_bytes(spec, "float32" if device == "cpu" else None)
            merging = weight_bytes(packed_spec) + dense
        return max(self.quantizer.peak_bytes(spec, device), training, merging)

    # The work

    def trained_on(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """Quantise the source into the work folder, once for all processes and for a training that
        is resumed.

        Args:
            checkpoint: The source.
            context: Has the work folder.

        Returns:
            The quantised base.
        """
        folder = context.resume_dir / BASE
        if processes.is_main_process() and not folder.is_dir():
            with atomic_path(folder) as partial:
                partial.mkdir()
                self.quantizer.run(checkpoint.folder, partial, Context(context.device))
        processes.broadcast_flag(True)  # the others wait for it
        return open_checkpoint(folder)

    def run(self, source: Path, target: Path, context: Context) -> dict:
        if context.resume_dir is not None:
            return super().run(source, target, context)
        with tempfile.TemporaryDirectory() as work:
            return super().run(source, target, replace(context, resume_dir=Path(work)))

    def merged(
        self, model, probe: torch.Tensor, learned: task.Task
    ) -> tuple[torch.nn.Module, dict]:
        dense = load_model(learned.checkpoint.folder, device=learned.device)
        return adapters.merge_adapters(model, probe, dense)

    def untouched_loss(self, outcome: fit.Outcome, learned: task.Task) -> float:
        if not self.merge:
            return outcome.before
        return self.measure(load_model(learned.checkpoint.folder, device=learned.device), learned)

"""Base of the stages that quantise: settings they share, checks before any work, the walk, and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.architecture import DTYPE_BYTES, ModelDescription
from slim.checkpoint import REPORT, SHARD_BYTES, Checkpoint, open_checkpoint
from slim.quantization.scheme import Scheme, check_model, check_scheme_settings, to_config
from slim.stage import Context, Stage

if TYPE_CHECKING:
    from slim.blockwise import LayerError
    from slim.quantization.visitor import QuantVisitor


@dataclass
class Quantization(Stage):
    """Settings of every method.

    bits: per weight: 2, 3, 4 or 8. group_size: weights that share a scale: 32, 64, 128, 256, or -1 for a whole row.
    symmetric: whether the grid is symmetric around 0 (no zero points: smaller, understood by more engines, less exact).
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    kind: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        check_scheme_settings(self.bits, self.group_size, self.symmetric)

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.bits, self.group_size, self.symmetric)

    def check(self, model: ModelDescription) -> None:
        check_model(model, self.scheme)

    def expect(self, model: ModelDescription) -> ModelDescription:
        return model.with_config(quantization_config=to_config(self.scheme, [model.family.head]))

    def peak_bytes(self, model: ModelDescription, device: str) -> int:
        """One block in float32 and packed, its working copies, and the shard being written; no activations."""
        block = 4 * model.block_parameters()
        largest = max(rows * columns for rows, columns in model.block_linears().values())
        embeddings = model.vocab_size * model.hidden_size * DTYPE_BYTES.get(model.dtype, 4)
        shard = min(max(SHARD_BYTES, embeddings) + embeddings, self.expect(model).weight_bytes())
        return 2 * block + 6 * 4 * largest + shard

    def visitor(self, model: ModelDescription) -> QuantVisitor:
        """Return the method as a visitor of the walk."""
        raise NotImplementedError

    def tokens(self, source: Checkpoint):
        """Return calibration tokens, int64 [samples, length], or None for methods without calibration."""
        return None

    def run(self, source: Path, target: Path, context: Context) -> dict:
        from slim.blockwise import rewrite

        checkpoint = open_checkpoint(source)
        model = checkpoint.description
        self.check(model)
        tokens = self.tokens(checkpoint)
        errors = rewrite(checkpoint, target, self.visitor(model), self.expect(model).config, context, tokens)
        return self._facts(target, model, errors)

    def _facts(self, target: Path, model: ModelDescription, errors: list[LayerError]) -> dict:
        """Write the table and picture of layer errors and return the facts for the manifest."""
        from slim.quantization.report import plot_layer_errors

        table = [{"block": item.block, "layer": item.layer, "error": item.error} for item in errors]
        (target / REPORT).mkdir(exist_ok=True)
        (target / REPORT / "layer_errors.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        plot_layer_errors(target / REPORT / "layer_errors.png", errors)
        return {
            "bits": self.bits,
            "bits_per_weight": round(bits_per_weight(self.expect(model)), 4),
            "layer_error_mean": sum(item.error for item in errors) / len(errors),
            "layer_error_max": max(item.error for item in errors),
        }


def bits_per_weight(model: ModelDescription) -> float:
    """Return stored bits per quantised weight, scales and zero points included."""
    weights = sum(rows * columns for rows, columns in model.block_linears().values())
    return 8 * model._packed_block_bytes(DTYPE_BYTES.get(model.dtype, 4)) / weights

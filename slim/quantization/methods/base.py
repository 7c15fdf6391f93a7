"""Base of the stages that quantise: settings they share, checks before any work, the walk, and the
report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import REPORT, Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.core.errors import SlimError
from slim.core.settings import require_choice, require_flag, require_number
from slim.models.spec import DTYPE_BYTES, ModelSpec
from slim.quantization.assign import (
    PLAIN_BITS,
    assign,
    check_overrides,
    check_plain,
    layer_shapes,
    pinned_layers,
)
from slim.quantization.formats import get_format
from slim.quantization.scheme import BITS, GROUP_SIZES, WHOLE_ROW, Scheme
from slim.quantization.storage import packed_bits, weight_bytes

if TYPE_CHECKING:
    import torch

    from slim.calibration.errors import LayerError
    from slim.quantization.methods.block_method import QuantizationMethod

AUTO = "auto"


@dataclass
class Quantization(Stage):
    """Settings of every method.

    bits: per weight: 2, 3, 4 or 8, or ``"auto"``: chosen per layer under ``average_bits`` (of the
        codes, over the layers whose bits no override sets) or ``budget_gb`` (of all weight files,
        in 10^9 bytes).
    group_size: weights that share a scale: 32, 64, 128, 256, or -1 for a whole row.
    symmetric: whether the grid is symmetric around 0 (no zero points: smaller, understood by more
        engines, less exact).
    overrides: layer name with ``*`` -> {bits, group_size, symmetric} of its own; bits 16 leave it
        as it is.
    lm_head, embeddings: whether these are quantised too: 8 bits, symmetric, a scale per row, unless
        overrides say else.
    format: ``compressed-tensors``, ``gptq`` or ``awq``.
    """

    bits: int | str = 4
    group_size: int = 128
    symmetric: bool = False
    average_bits: float | None = None
    budget_gb: float | None = None
    overrides: dict | None = None
    lm_head: bool = False
    embeddings: bool = False
    format: str = "compressed-tensors"

    kind: ClassVar[str] = "quantize"
    ordered: ClassVar[bool] = False  # whether columns are grouped in activation order
    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("quant.bits", self.bits, (*BITS, AUTO))
        require_choice("quant.group_size", self.group_size, (*GROUP_SIZES, WHOLE_ROW))
        for name in ("symmetric", "lm_head", "embeddings"):
            require_flag(f"quant.{name}", getattr(self, name))
        self.overrides = self.overrides or {}
        check_overrides(self.overrides)
        get_format(self.format)
        self._check_budget()

    def _check_budget(self) -> None:
        limits = [name for name in ("average_bits", "budget_gb") if getattr(self, name) is not None]
        if self.bits != AUTO and limits:
            raise SlimError(
                f"quant.{limits[0]} belongs to quant.bits=auto; with quant.bits={self.bits} leave it out."
            )
        if self.bits == AUTO and len(limits) != 1:
            raise SlimError(
                "quant.bits=auto needs one of quant.average_bits=3.25 (say) and quant.budget_gb=2.5 (say)."
            )
        if self.average_bits is not None:
            require_number("quant.average_bits", self.average_bits, min(BITS), max(BITS))
        if self.budget_gb is not None:
            require_number("quant.budget_gb", self.budget_gb, 1e-6)

    def schemes(
        self, spec: ModelSpec, bits: Mapping[str, int] | int | None = None
    ) -> dict[str, Scheme]:
        """Return full layer name -> scheme. bits: of the blocks' layers, all or by name; None:
        those of the settings.

        With ``bits=auto`` the default is what the budget allows at most, the same for all layers:
        an upper bound."""
        shapes = layer_shapes(spec)
        if bits is None:
            bits = self.bits
        if bits == AUTO:
            average = self.allowed_bits(spec)
            bits = min(width for width in BITS if width >= min(average, max(BITS)))
        widths = bits if isinstance(bits, Mapping) else dict.fromkeys(shapes, bits)
        blocks = {name: Scheme(widths[name], self.group_size, self.symmetric) for name in shapes}
        return assign(spec, blocks, self.overrides, self.lm_head, self.embeddings)

    def allowed_bits(self, spec: ModelSpec) -> float:
        """Return the bits per weight of the blocks' layers that the budget allows. Raises
        ``SlimError`` for too few."""
        if self.average_bits is not None:
            return self.average_bits
        least, most = (
            weight_bytes(self.described(spec, self.schemes(spec, bits)))
            for bits in (min(BITS), max(BITS))
        )
        average = min(BITS) + (max(BITS) - min(BITS)) * (1e9 * self.budget_gb - least) / max(
            1, most - least
        )
        if average < min(BITS):
            raise SlimError(
                f"quant.budget_gb={self.budget_gb:g} is too little: {spec.name} takes {least / 1e9:.3g} GB with all "
                f"layers at {min(BITS)} bits (embeddings, head, scales included)."
            )
        return min(average, max(BITS))

    def check(self, spec: ModelSpec) -> None:
        check_plain(spec)
        get_format(self.format).check(self.schemes(spec), self.ordered, layer_shapes(spec))

    def described(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> ModelSpec:
        """Describe ``spec`` once it is quantised to ``schemes``."""
        family = spec.family
        linears = [*layer_shapes(spec), family.head]
        config = get_format(self.format).config(
            schemes, linears, self.ordered, **self.format_settings()
        )
        untied = (
            {"tie_word_embeddings": False}
            if family.head in schemes and family.embeddings not in schemes
            else {}
        )
        return spec.with_config(quantization_config=config, **(untied if spec.tied else {}))

    def format_settings(self) -> dict:
        """Return settings of the method that some formats record, under the formats' names."""
        return {}

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        return self.described(spec, self.schemes(spec))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        """One block in float32 and packed, working copies of some rows, and the embedding; no
        activations."""
        largest = max(rows * columns for rows, columns in spec.block_linears().values())
        embeddings = spec.vocab_size * spec.hidden_size * (4 + DTYPE_BYTES.get(spec.dtype, 4))
        return 5 * spec.block_parameters() + 3 * 4 * largest + embeddings

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> QuantizationMethod:
        """Return the method as a visitor of the walk."""
        raise NotImplementedError

    def tokens(self, source: Checkpoint) -> torch.Tensor | None:
        """Return calibration tokens, int64 [samples, length], or None for methods without
        calibration."""
        return None

    def run(self, source: Path, target: Path, context: Context) -> dict:
        from slim.calibration.sequential import transform_checkpoint
        from slim.core.console import warn

        checkpoint = open_checkpoint(source)
        spec = checkpoint.spec
        self.check(spec)
        tokens = self.tokens(checkpoint)
        schemes = self.schemes(spec)
        if self.bits == AUTO:
            schemes = self.schemes(spec, self._allocate(checkpoint, tokens, target, context))
        method = self.method(spec, schemes)
        result = self.described(spec, schemes)
        errors = transform_checkpoint(checkpoint, target, method, result.config, context, tokens)
        for note in method.notes:
            warn(note)
        return {
            **self._facts(target, result, schemes, errors),
            **({"notes": method.notes} if method.notes else {}),
        }

    def _allocate(
        self, source: Checkpoint, tokens: torch.Tensor | None, target: Path, context: Context
    ) -> dict[str, int]:
        """Measure what every width costs in every layer, choose, and report the choice."""
        import torch

        from slim.calibration.resume import CalibrationProgress
        from slim.calibration.sequential import SequentialCalibration
        from slim.quantization.methods.allocate import Sensitivity, allocate
        from slim.quantization.report import write_allocation

        spec = source.spec
        scale_dtype = getattr(torch, get_format(self.format).scale_dtype(spec.dtype))
        method = Sensitivity(
            Scheme(4, self.group_size, self.symmetric), scale_dtype, tokens is not None
        )
        progress = (
            CalibrationProgress(context.work / "sensitivity", context.device)
            if context.work
            else None
        )
        walk = SequentialCalibration(
            source, method, None, tokens, context.device, title="Sensitivity", progress=progress
        )
        walk.run()
        schemes, pinned = self.schemes(spec), pinned_layers(layer_shapes(spec), self.overrides)
        free = {name: found for name, found in method.errors.items() if name not in pinned}
        sizes = {
            name: rows * columns
            for name, (rows, columns) in layer_shapes(spec).items()
            if name in free
        }
        bits = allocate(free, sizes, self.allowed_bits(spec))
        bits.update(
            {name: schemes[name].bits if name in schemes else PLAIN_BITS for name in pinned}
        )
        write_allocation(target / REPORT, spec, method.errors, bits)
        return bits

    def _facts(
        self,
        target: Path,
        result: ModelSpec,
        schemes: Mapping[str, Scheme],
        errors: list[LayerError],
    ) -> dict:
        """Write the table and picture of layer errors and return the facts for the manifest."""
        from slim.quantization.report import plot_layer_errors

        table = [{"block": item.block, "layer": item.layer, "error": item.error} for item in errors]
        (target / REPORT).mkdir(exist_ok=True)
        (target / REPORT / "layer_errors.json").write_text(
            json.dumps(table, indent=1) + "\n", encoding="utf-8"
        )
        plot_layer_errors(target / REPORT / "layer_errors.png", errors)
        sizes = {
            name: rows * columns
            for name, (rows, columns) in layer_shapes(result).items()
            if name in schemes
        }
        return {
            "bits": round(
                sum(schemes[name].bits * size for name, size in sizes.items())
                / sum(sizes.values()),
                4,
            ),
            "bits_per_weight": round(packed_bits(result), 4),
            "layer_error_mean": sum(item.error for item in errors) / len(errors),
            "layer_error_max": max(item.error for item in errors),
        }

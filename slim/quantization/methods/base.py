"""Base of the stages that quantise: shared settings, checks before any work, run, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import REPORT, Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.core.errors import SlimError
from slim.core.settings import dataclass_cache_key, require_choice, require_flag, require_number
from slim.models.spec import DTYPE_BYTES, ModelSpec
from slim.quantization.assign import (
    PLAIN_BITS,
    assign,
    check_overrides,
    check_plain,
    fused_groups,
    layer_shapes,
    pinned_layers,
    split_groups,
)
from slim.quantization.formats import get_format
from slim.quantization.ranges import fitting_schemes
from slim.quantization.scheme import BITS, GROUP_SIZES, WHOLE_ROW, Scheme
from slim.quantization.storage import packed_bits, weight_bytes
from slim.quantization.written import check_written

if TYPE_CHECKING:
    import torch

    from slim.calibration.errors import LayerError
    from slim.quantization.methods.block_method import QuantizationMethod

AUTO = "auto"


@dataclass
class Quantization(Stage):
    """Settings of every method.

    Attributes:
        bits: per weight: 2, 3, 4 or 8, or ``"auto"``: chosen per layer under ``average_bits`` or
            ``budget_gb``.
        group_size: weights that share a scale: 32, 64, 128, 256, or -1 for a whole row.
        symmetric: whether the grid is symmetric around 0 (no zero points: smaller, understood by
            more engines, less exact).
        average_bits: with ``bits=auto``, the most bits per weight on average, 2 to 8, of the codes,
            over the layers whose bits no override sets.
        budget_gb: with ``bits=auto``, the most that all weight files may take, in 10^9 bytes.
        fused: with ``bits=auto``, whether layers that engines keep in one matrix (queries, keys and
            values; gate and up projections) get the same bits.
        overrides: layer name with ``*`` for anything -> {bits, group_size, symmetric} of its own;
            bits 16 leave the layer as it is.
        lm_head: whether the head is quantised too: 8 bits, symmetric, a scale per row, unless
            overrides say otherwise.
        embeddings: whether the embedding is, likewise.
        format: of the files: ``compressed-tensors``, ``gptq``, ``awq`` or ``gguf``.
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
    fused: bool = True

    kind: ClassVar[str] = "quantize"
    ordered: ClassVar[bool] = False  # whether columns are grouped in activation order
    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_choice("quant.bits", self.bits, (*BITS, AUTO))
        require_choice("quant.group_size", self.group_size, (*GROUP_SIZES, WHOLE_ROW))
        for name in ("symmetric", "lm_head", "embeddings", "fused"):
            require_flag(f"quant.{name}", getattr(self, name))
        self.overrides = self.overrides or {}
        check_overrides(self.overrides)
        get_format(self.format)
        self._check_budget()

    @property
    def input_multiple(self) -> int:
        return max(1, self.group_size)  # -1 is a whole row, which always fits

    def cache_key(self) -> dict:
        key = dataclass_cache_key(self)
        # only bits=auto asks for it; results from before it was a setting chose layer by layer
        if self.bits != AUTO or not self.fused:
            del key["fused"]
        return key

    def _check_budget(self) -> None:
        limits = [name for name in ("average_bits", "budget_gb") if getattr(self, name) is not None]
        if self.bits != AUTO and limits:
            raise SlimError(
                f"quant.{limits[0]} belongs to quant.bits=auto; with quant.bits={self.bits} "
                "leave it out."
            )
        if self.bits == AUTO and len(limits) != 1:
            raise SlimError(
                "quant.bits=auto needs either quant.average_bits or quant.budget_gb, such as "
                "quant.average_bits=3.25 or quant.budget_gb=2.5."
            )
        if self.average_bits is not None:
            require_number("quant.average_bits", self.average_bits, min(BITS), max(BITS))
        if self.budget_gb is not None:
            require_number("quant.budget_gb", self.budget_gb, 1e-6)

    def schemes(
        self, spec: ModelSpec, bits: Mapping[str, int] | int | None = None
    ) -> dict[str, Scheme]:
        """Return full layer name -> scheme.

        Args:
            spec: the model.
            bits: of the blocks' layers, of all or by full name. None: those of the settings; with
                ``bits=auto`` then what the budget allows at most, the same for all layers: an upper
                bound.
        """
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
        """Return the bits per weight of the blocks' layers that the budget allows.

        Raises:
            SlimError: if they are fewer than the fewest there are.
        """
        if self.average_bits is not None:
            return self.average_bits
        fewest, most = min(BITS), max(BITS)
        smallest = weight_bytes(self.described(spec, self.schemes(spec, fewest)))
        largest = weight_bytes(self.described(spec, self.schemes(spec, most)))
        # file size is linear in the bits per weight
        average = fewest + (most - fewest) * (1e9 * self.budget_gb - smallest) / max(
            1, largest - smallest
        )
        if average < fewest:
            raise SlimError(
                f"quant.budget_gb={self.budget_gb:g} is too little: {spec.name} takes "
                f"{smallest / 1e9:.3g} GB with all layers at {fewest} bits (embeddings, head, "
                "scales included)."
            )
        return min(average, most)

    def check(self, spec: ModelSpec) -> None:
        check_plain(spec)
        form = get_format(self.format)
        form.check_model(spec)
        form.check(self.schemes(spec), self.ordered, layer_shapes(spec))

    def described(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> ModelSpec:
        """Describe a model once it is quantised.

        Args:
            spec: the model before.
            schemes: full layer name -> scheme.
        """
        family = spec.family
        linears = [*layer_shapes(spec), *spec.outer_linears]
        config = get_format(self.format).config(
            schemes, linears, self.ordered, **self.format_settings()
        )
        changes = {"quantization_config": config}
        if spec.tied and family.head in schemes and family.embeddings not in schemes:
            # the quantised head gets weights of its own, next to the plain embedding
            changes["tie_word_embeddings"] = False
        return spec.with_config(**changes)

    def format_settings(self) -> dict:
        """Return settings of the method that some formats record, under the formats' names."""
        return {}

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        return self.described(spec, self.schemes(spec))

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        # one block in float32 and packed, working copies of some rows, the embedding; no
        # activations
        largest = max(rows * columns for rows, columns in spec.block_linears().values())
        embeddings = spec.vocab_size * spec.hidden_size * (4 + DTYPE_BYTES.get(spec.dtype, 4))
        return 5 * spec.block_parameters() + 3 * 4 * largest + embeddings

    def method(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> QuantizationMethod:
        """Return what sequential calibration applies to every block.

        Args:
            spec: the model.
            schemes: full layer name -> scheme.
        """
        raise NotImplementedError

    def tokens(self, source: Checkpoint) -> torch.Tensor | None:
        """Return calibration tokens, int64 [samples, length]; None where none are needed."""
        return None

    def run(self, source: Path, target: Path, context: Context) -> dict:
        from slim.calibration.sequential import transform_checkpoint  # loads torch
        from slim.core.console import warn

        checkpoint = open_checkpoint(source)
        spec = checkpoint.spec
        self.check(spec)
        get_format(self.format).begin(checkpoint)
        tokens = self.tokens(checkpoint)
        bits = None
        if self.bits == AUTO:
            bits = self._allocate(checkpoint, tokens, target, context)
        schemes = self.schemes(spec, bits)
        schemes, left_plain = fitting_schemes(checkpoint, schemes, get_format(self.format))
        method = self.method(spec, schemes)
        method.notes += left_plain
        split = self._fused_notes(spec, schemes)
        for note in split:
            warn(note)  # before hours of work that may be for an engine
        result = self.described(spec, schemes)
        errors = transform_checkpoint(checkpoint, target, method, result.config, context, tokens)
        if spec.family.embeddings in schemes:
            # the calibration saw the plain embedding, and the result has another
            context.expected = None
        check_written(target, method.meant)
        metadata = self._metadata(target, result, schemes, errors) | method.propagation()
        notes = [*method.notes, *get_format(self.format).finish(target)]
        if split or notes:
            metadata["notes"] = split + notes
        for note in notes:
            warn(note)
        return metadata

    def _fused_notes(self, spec: ModelSpec, schemes: Mapping[str, Scheme]) -> list[str]:
        """Say where overrides part layers that engines fuse; llama.cpp, which reads GGUF, does not
        fuse any."""
        note = split_groups(spec, schemes)
        if note is None or self.format == "gguf":
            return []
        return [note]

    def _allocate(
        self, source: Checkpoint, tokens: torch.Tensor | None, target: Path, context: Context
    ) -> dict[str, int]:
        """Measure what every width costs in every layer, choose, and report the choice."""
        import torch

        from slim.calibration.resume import CalibrationProgress
        from slim.calibration.sequential import SequentialCalibration
        from slim.quantization.methods.allocate import Sensitivity, allocate_together
        from slim.quantization.report import write_allocation

        # Measure: a pass of its own over the blocks, which changes nothing.
        spec = source.spec
        scale_dtype = getattr(torch, get_format(self.format).scale_dtype(spec.dtype))
        scheme = Scheme(4, self.group_size, self.symmetric)
        method = Sensitivity(scheme, scale_dtype, tokens is not None)
        progress = None
        if context.resume_dir:
            progress = CalibrationProgress(context.resume_dir / "sensitivity", context.device)
        SequentialCalibration(
            source, method, None, tokens, context.device, title="Sensitivity", progress=progress
        ).run()

        # Choose: layers whose bits an override sets take no part.
        schemes = self.schemes(spec)
        pinned = pinned_layers(layer_shapes(spec), self.overrides)
        errors, sizes = {}, {}
        for name, (rows, columns) in layer_shapes(spec).items():
            if name not in pinned:
                errors[name] = method.errors[name]
                sizes[name] = rows * columns
        groups = fused_groups(spec) if self.fused else []
        bits = allocate_together(errors, sizes, self.allowed_bits(spec), groups)
        for name in pinned:
            bits[name] = schemes[name].bits if name in schemes else PLAIN_BITS
        write_allocation(target / REPORT, spec, method.errors, bits)
        return bits

    def _metadata(
        self,
        target: Path,
        result: ModelSpec,
        schemes: Mapping[str, Scheme],
        errors: list[LayerError],
    ) -> dict:
        """Write the table and picture of layer errors and return the metadata for the manifest."""
        from slim.quantization.report import write_layer_errors  # loads matplotlib

        layer_errors = write_layer_errors(target / REPORT, errors)
        code_bits = weights = 0
        for name, (rows, columns) in layer_shapes(result).items():
            if name in schemes:
                code_bits += schemes[name].bits * rows * columns
                weights += rows * columns
        return {
            "bits": round(code_bits / weights, 4),
            "bits_per_weight": round(packed_bits(result), 4),
            **layer_errors,
        }

"""Quantization by bitsandbytes: LLM.int8() (``quant=int8``) and NF4 (``quant=nf4``). Settings and
sizes; needs no torch.

int8 (Dettmers et al., arXiv:2208.07339, section 3): a row of weights has one scale, and so has,
when the model runs, every token's input; columns of the input with an entry of at least
``threshold`` are multiplied in 16 bits:

    c = round(127 w / max |w|),    w^ = c max |w| / 127

nf4 (QLoRA, Dettmers et al., arXiv:2305.14314, section 3): 64 weights in a row share a scale m = max
|w|; w / m goes to the nearest of 16 numbers between -1 and 1 that a normal distribution uses
equally often. Double quantization stores m less its mean over the layer in 8 bits, 256 of them
sharing a scale.

Both look at weights only. What is written is what transformers writes for a model it quantized
while loading it (``BitsAndBytesConfig``), tensor for tensor, so transformers, PEFT and others load
it. ``bitsandbytes_packing.py`` holds what needs the library."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import REPORT, Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.core.console import warn
from slim.core.errors import SlimError
from slim.core.settings import require_choice, require_flag, require_number
from slim.models.spec import DTYPE_BYTES, ModelSpec
from slim.quantization.assign import check_plain, layer_shapes
from slim.quantization.formats.bitsandbytes import BLOCK, DEFAULTS, KERNEL_ROWS, require_library
from slim.quantization.ranges import layers_beyond_float16
from slim.quantization.storage import packed_bits

if TYPE_CHECKING:
    from slim.quantization.methods.bitsandbytes_packing import BitsAndBytesMethod

DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class BitsAndBytes(Stage):
    """What both methods share: checks, the pass over the blocks, the report. They have settings of
    their own.

    Attributes:
        bits: Per weight, of the codes.
        divisors: What must divide a layer's outputs and inputs.
        through_float16: Whether the library turns weights into float16 first.
    """

    kind: ClassVar[str] = "quantize"
    bits: ClassVar[int]
    divisors: ClassVar[tuple[int, int]] = (1, 1)
    through_float16: ClassVar[bool] = False

    def library_settings(self, spec: ModelSpec) -> dict:
        """Return the entries of the ``quantization_config`` that are not the library's defaults.

        Args:
            spec: The model that is quantized.
        """
        raise NotImplementedError

    def method(self, spec: ModelSpec, plain: Collection[str] = ()) -> BitsAndBytesMethod:
        """Return what is done to the blocks.

        Args:
            spec: The model that is quantized.
            plain: Full names of layers that stay as they are.
        """
        raise NotImplementedError

    def check(self, spec: ModelSpec) -> None:
        require_library()
        check_plain(spec)
        outputs, inputs = self.divisors
        for name, (rows, columns) in layer_shapes(spec).items():
            if rows % outputs or columns % inputs:
                raise SlimError(
                    f"quant={type(self).__name__.lower()} takes layers whose inputs are divisible "
                    f"by {inputs} and whose outputs are divisible by {outputs}; {name} in "
                    f"{spec.name} has {columns} and {rows}.\n"
                    "Use quant=rtn or quant=hqq with quant.group_size=-1."
                )

    def output_spec(self, spec: ModelSpec) -> ModelSpec:
        return self.described(spec, ())

    def described(self, spec: ModelSpec, plain: Iterable[str]) -> ModelSpec:
        """Describe a model once it is quantized.

        Args:
            spec: The model before.
            plain: Full names of layers that stay as they are, besides the head.
        """
        skipped = [*spec.outer_linears, *plain]
        settings = {**self.library_settings(spec), "llm_int8_skip_modules": skipped}
        return spec.with_config(quantization_config={**DEFAULTS, **settings})

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        """One block in float32 and packed, the library's copies of one layer, and a tensor that is
        copied as it is."""
        largest = max(rows * columns for rows, columns in spec.block_linears().values())
        embeddings = spec.vocab_size * spec.hidden_size * DTYPE_BYTES.get(spec.dtype, 4)
        return 5 * spec.block_parameters() + 8 * 4 * largest + 2 * embeddings

    def run(self, source: Path, target: Path, context: Context) -> dict:
        # these load torch and matplotlib
        from slim.calibration.sequential import transform_checkpoint
        from slim.quantization.report import plot_layer_errors

        checkpoint = open_checkpoint(source)
        spec = checkpoint.spec
        self.check(spec)
        plain = self._beyond_range(checkpoint)
        result = self.described(spec, plain)
        method = self.method(spec, plain)
        errors = transform_checkpoint(checkpoint, target, method, result.config, context)
        table = [{"block": item.block, "layer": item.layer, "error": item.error} for item in errors]
        (target / REPORT).mkdir(exist_ok=True)
        (target / REPORT / "layer_errors.json").write_text(
            json.dumps(table, indent=1) + "\n", encoding="utf-8"
        )
        plot_layer_errors(target / REPORT / "layer_errors.png", errors)
        notes = {}
        if plain:
            notes["notes"] = list(plain.values())
        return {
            **notes,
            "bits": self.bits,
            "bits_per_weight": round(packed_bits(result), 4),
            "layer_error_mean": sum(item.error for item in errors) / len(errors),
            "layer_error_max": max(item.error for item in errors),
        }

    def _beyond_range(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Return the layers that the library could not hold, with a sentence for each, printed.

        Raises:
            SlimError: No layer is left.
        """
        if not self.through_float16:
            return {}
        layers = layer_shapes(checkpoint.spec)
        notes = {}
        for layer, largest in layers_beyond_float16(checkpoint, layers).items():
            notes[layer] = (
                f"{layer} stays unquantized: it has weights up to {largest:.3g}, and bitsandbytes "
                "takes them through float16, which ends at 65504."
            )
        for note in notes.values():
            warn(note)
        if len(notes) == len(layers):
            raise SlimError("So it is with all layers. Use quant=rtn quant.bits=8.")
        return notes


@dataclass
class Int8(BitsAndBytes):
    """Settings of LLM.int8().

    Attributes:
        threshold: Input columns with an entry of at least this magnitude are multiplied in 16 bits;
            0: none are. It changes how the model runs, not what is stored.
    """

    cache_name: ClassVar[str] = "Int8"

    threshold: float = 6.0

    version: ClassVar[int] = 1
    bits: ClassVar[int] = 8
    through_float16: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_number("quant.threshold", self.threshold, 0)
        self.threshold = float(self.threshold)  # transformers refuses a whole number

    def library_settings(self, spec: ModelSpec) -> dict:
        return {"_load_in_8bit": True, "load_in_8bit": True, "llm_int8_threshold": self.threshold}

    def method(self, spec: ModelSpec, plain: Collection[str] = ()) -> BitsAndBytesMethod:
        from slim.quantization.methods.bitsandbytes_packing import BitsAndBytesMethod, pack_int8

        return BitsAndBytesMethod(pack_int8, spec.dtype, plain)


@dataclass
class NF4(BitsAndBytes):
    """Settings of NF4.

    Attributes:
        double_quant: Whether scales are quantized too: 0.37 bits per weight less, a little less
            exact.
        compute_dtype: Type in which other programs multiply, ``"bfloat16"``, ``"float16"``,
            ``"float32"``, or ``"auto"``: the model's own. slim multiplies in the type it loads a
            model in.
    """

    cache_name: ClassVar[str] = "NF4"

    double_quant: bool = True
    compute_dtype: str = "auto"

    version: ClassVar[int] = 1
    bits: ClassVar[int] = 4
    divisors: ClassVar[tuple[int, int]] = (KERNEL_ROWS, BLOCK)

    def __post_init__(self) -> None:
        require_flag("quant.double_quant", self.double_quant)
        require_choice("quant.compute_dtype", self.compute_dtype, DTYPES)

    def library_settings(self, spec: ModelSpec) -> dict:
        compute_dtype = self.compute_dtype
        if compute_dtype == "auto":
            compute_dtype = spec.dtype
        return {
            "_load_in_4bit": True,
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": compute_dtype,
        }

    def method(self, spec: ModelSpec, plain: Collection[str] = ()) -> BitsAndBytesMethod:
        from functools import partial

        from slim.quantization.methods.bitsandbytes_packing import BitsAndBytesMethod, pack_nf4

        pack = partial(pack_nf4, double_quant=self.double_quant)
        return BitsAndBytesMethod(pack, spec.dtype, plain)

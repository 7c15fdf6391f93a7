"""Which type each matrix of a file gets under llama.cpp's names: ``Q4_K_M`` is mostly Q4_K, with
more bits where they are worth most.

The rules, and what stands in for a type whose blocks do not divide a row, are those of llama.cpp's
``src/llama-quant.cpp`` (https://github.com/ggml-org/llama.cpp), so that a file of a name has the
size that users of llama.cpp expect.
"""

from __future__ import annotations

from dataclasses import dataclass

from slim.gguf.architecture import DECI
from slim.gguf.blocks import PLAIN_TYPES, fits
from slim.gguf.metadata import architecture_of, stored_names
from slim.models.spec import ModelSpec

# name -> (type of most matrices, number in general.file_type)
MIXES = {
    "Q2_K": ("Q2_K", 10),
    "Q2_K_S": ("Q2_K", 21),
    "Q3_K_S": ("Q3_K", 11),
    "Q3_K_M": ("Q3_K", 12),
    "Q3_K_L": ("Q3_K", 13),
    "Q4_K_S": ("Q4_K", 14),
    "Q4_K_M": ("Q4_K", 15),
    "Q5_K_S": ("Q5_K", 16),
    "Q5_K_M": ("Q5_K", 17),
    "Q6_K": ("Q6_K", 18),
}
# types of super-blocks -> what llama.cpp takes where 256 does not divide a row
STAND_INS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
PLAIN_STAND_IN = "F16"  # where 32 does not divide it either
SHARED_VALUES = 4  # query heads per value head from which on values get more bits in Q2_K
LARGE = 80  # blocks of the Llama models of 70 billion parameters


def fitting_type(name: str, columns: int, plain: str = PLAIN_STAND_IN) -> str:
    """Return a type, or what stands in for it where its blocks do not divide a row.

    Args:
        name: The type.
        columns: Weights in a row.
        plain: What is taken where no blocks divide it.
    """
    if fits(name, columns):
        return name
    stand_in = STAND_INS.get(name, name)
    return stand_in if fits(stand_in, columns) else plain


def mixed_types(spec: ModelSpec, mix: str) -> dict[str, str]:
    """Return the type of every matrix of a model, before stand-ins.

    Args:
        spec: The model.
        mix: One of ``MIXES``.

    Returns:
        Full layer name -> type.
    """
    chooser, types = _Chooser(spec, mix), {}
    matrices = spec.matrices()
    for module, name in stored_names(spec):
        if module in matrices:
            types[module] = chooser.choose(name)
    return types


@dataclass
class _Chooser:
    """Goes through the matrices in the order of the file.

    Attributes:
        spec: The model.
        mix: The name of the mix.
    """

    spec: ModelSpec
    mix: str

    def __post_init__(self) -> None:
        self.usual, _ = MIXES[self.mix]
        # counted as llama.cpp does: among the matrices of a kind, not by block
        self.values = self.downs = 0

    def choose(self, name: str) -> str:
        """Return the type of the next matrix, by its name in the file without ``.weight``."""
        part = name.rpartition(".")[2]
        if part == "output" or (part == "token_embd" and self.spec.tied):
            return "Q6_K"
        if part in ("attn_v", "attn_qkv"):
            return self._value_type()
        if part == "ffn_down":
            return self._down_type()
        if part == "attn_output":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.mix, self.usual)
        return self.usual

    def _value_type(self) -> str:
        index, mix = self.values, self.mix
        self.values += 1
        first = self.spec.at(0)
        shared = first.heads // first.kv_heads >= SHARED_VALUES
        chosen = self.usual
        if mix == "Q2_K":
            chosen = "Q4_K" if shared else "Q3_K"
        elif mix == "Q2_K_S" and shared:
            chosen = "Q4_K"
        elif mix == "Q3_K_M":
            chosen = "Q5_K" if index < 2 else "Q4_K"
        elif mix == "Q3_K_L":
            chosen = "Q5_K"
        elif mix in ("Q4_K_M", "Q5_K_M") and self._more_bits(index):
            chosen = "Q6_K"
        elif mix == "Q4_K_S" and index < 4:
            chosen = "Q5_K"
        if chosen in ("Q3_K", "Q4_K") and self._is_large():
            chosen = "Q5_K"
        return chosen

    def _down_type(self) -> str:
        index, mix, blocks = self.downs, self.mix, self.spec.blocks
        self.downs += 1
        if mix == "Q2_K":
            return "Q3_K"
        if mix == "Q2_K_S" and index < blocks // 8:
            return "Q4_K"
        if mix == "Q3_K_M":
            return "Q5_K" if index < blocks // 16 else "Q4_K"
        if mix == "Q3_K_L":
            return "Q5_K"
        if mix in ("Q4_K_M", "Q5_K_M") and self._more_bits(index):
            return "Q6_K"
        if mix == "Q4_K_S" and index < blocks // 8:
            return "Q5_K"
        return self.usual

    def _more_bits(self, index: int) -> bool:
        """Whether the M mixes give a matrix more bits: in the first and last eighth of the blocks,
        and in every third between."""
        count = self.spec.blocks
        return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2

    def _is_large(self) -> bool:
        spec, (name, _) = self.spec, architecture_of(self.spec)
        grouped = spec.heads != spec.kv_heads
        return spec.blocks == LARGE and (name == DECI or (name == "llama" and grouped))


def plain_type(dtype: str) -> str:
    """Return GGUF's name of a type of plain weights, such as BF16 for ``"bfloat16"``."""
    names = {value: name for name, value in PLAIN_TYPES.items()}
    return names.get(dtype, "F32")

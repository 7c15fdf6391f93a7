"""What slim must know of a model family: where blocks, projections, norms and heads are, and how large.

Everything here is read from ``config.json`` alone, without torch and without weights, so that a plan or a wrong setting
is answered at once. Another decoder-only family needs one entry in ``FAMILIES``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from slim.errors import SlimError

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int8": 1}


@dataclass(frozen=True)
class Segment:
    """Linear layers of a block that share one input.

    linears: names relative to the block.
    fed_by: the module whose output channels are this input's channels, into which a scale per channel can be folded: a
        norm, or the linear layer before it (for ``o_proj`` the value projection, for ``down_proj`` the up projection).
    """

    linears: tuple[str, ...]
    fed_by: str


LLAMA_SEGMENTS = (
    Segment(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    Segment(("self_attn.o_proj",), "self_attn.v_proj"),
    Segment(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    Segment(("mlp.down_proj",), "mlp.up_proj"),
)


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder-only model, as in its transformers implementation.

    qkv_bias: whether q, k and v have biases by construction (elsewhere ``attention_bias`` of the config decides).
    qk_norm: whether queries and keys are normalised per head.
    """

    model_type: str
    segments: tuple[Segment, ...] = LLAMA_SEGMENTS
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: str = "mlp"
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral"),
        Family("qwen2", qkv_bias=True),
        Family("qwen3", qk_norm=True),
    )
}


@dataclass(frozen=True)
class ModelDescription:
    """A checkpoint as far as ``config.json`` tells: sizes, counts, how its weights are stored.

    config: the parsed ``config.json``.
    name: how to call the model in messages.
    """

    config: dict
    name: str = "the model"

    def __post_init__(self) -> None:
        missing = [
            key
            for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
            if not isinstance(self.config.get(key), int)
        ]
        if missing:
            raise SlimError(f"config.json of {self.name} lacks {', '.join(missing)}: not a decoder-only language model.")

    @property
    def family(self) -> Family:
        """The family's description. Raises ``SlimError`` for a family without one."""
        model_type = self.config.get("model_type", "")
        if model_type not in FAMILIES:
            raise SlimError(
                f"slim does not know the model family '{model_type}' of {self.name}. Known: {', '.join(FAMILIES)}. "
                "To describe another, add a Family(...) entry with its module names to slim/architecture.py."
            )
        return FAMILIES[model_type]

    @property
    def known(self) -> bool:
        """Whether there is a description of the family."""
        return self.config.get("model_type") in FAMILIES

    @property
    def blocks(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def hidden_size(self) -> int:
        return self.config["hidden_size"]

    @property
    def intermediate_size(self) -> int:
        return self.config["intermediate_size"]

    @property
    def vocab_size(self) -> int:
        return self.config["vocab_size"]

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return self.config.get("num_key_value_heads") or self.heads

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.hidden_size // self.heads

    @property
    def context_length(self) -> int:
        """Longest input in tokens that the model was built for."""
        return self.config.get("max_position_embeddings") or 2048

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weights."""
        return bool(self.config.get("tie_word_embeddings", False))

    @property
    def dtype(self) -> str:
        """Type in which weights that are not quantised are stored, such as ``"bfloat16"``."""
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32").removeprefix("torch.")

    @property
    def quantization(self) -> dict | None:
        """The ``quantization_config``, or None for plain weights."""
        return self.config.get("quantization_config")

    @property
    def differing(self) -> dict[int, dict]:
        """Where blocks differ in size: block -> entries that replace the config's own there (``per_layer_config``)."""
        return {int(block): entries for block, entries in (self.config.get("per_layer_config") or {}).items()}

    def at(self, block: int) -> ModelDescription:
        """Return the description of a model whose blocks are all like ``block``; itself where blocks do not differ."""
        if not self.config.get("per_layer_config"):
            return self
        plain = {key: value for key, value in self.config.items() if key != "per_layer_config"}
        return dataclasses.replace(self, config={**plain, **self.differing.get(block, {})})

    def block_linears(self, block: int | None = None) -> dict[str, tuple[int, int]]:
        """Return name within a block -> (out_features, in_features) for every linear layer of ``block``.

        Without a number those of every block, or, where blocks differ, the largest rows and columns of each layer.
        """
        if block is not None:
            return self.at(block)._linears()
        every = [self.at(index)._linears() for index in ([*range(self.blocks)] if self.differing else [0])]
        return {
            name: (max(sizes[name][0] for sizes in every), max(sizes[name][1] for sizes in every)) for name in every[0]
        }

    def _linears(self) -> dict[str, tuple[int, int]]:
        hidden, width = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (width, hidden),
            "up_proj": (width, hidden),
            "down_proj": (hidden, width),
        }
        return {name: sizes[name.split(".")[-1]] for segment in self.family.segments for name in segment.linears}

    def block_parameters(self, block: int | None = None) -> int:
        """Count the parameters of ``block``: linear layers, biases, norms. Without a number as ``block_linears``."""
        linears = self.block_linears(block)
        count = sum(rows * columns for rows, columns in linears.values()) + 2 * self.hidden_size
        for name, (rows, _) in linears.items():
            part = name.split(".")[-1]
            if part in ("q_proj", "k_proj", "v_proj"):
                count += rows * bool(self.family.qkv_bias or self.config.get("attention_bias"))
            elif part == "o_proj":
                count += rows * bool(self.config.get("attention_bias") and not self.family.qkv_bias)
            else:
                count += rows * bool(self.config.get("mlp_bias"))
        return count + 2 * self.head_dim * self.family.qk_norm

    def parameters(self) -> int:
        """Count all parameters, a shared embedding once, packed weights as the weights they stand for."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return embeddings + self.hidden_size + sum(self.block_parameters(block) for block in range(self.blocks))

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Estimate the bytes of all weights as stored; with ``dtype``, as plain weights of that type."""
        plain = DTYPE_BYTES.get(dtype or self.dtype, 4)
        if dtype is not None or self.quantization is None:
            return self.parameters() * plain
        blocks = [self.at(block) for block in range(self.blocks)]
        quantised = sum(rows * columns for block in blocks for rows, columns in block.block_linears().values())
        return (self.parameters() - quantised) * plain + sum(block._packed_block_bytes(plain) for block in blocks)

    def _packed_block_bytes(self, scale_bytes: int) -> int:
        """Bytes of one block's packed linear layers: codes, one scale per group, and zero points where asymmetric."""
        weights = next(iter(self.quantization["config_groups"].values()))["weights"]
        bits, group = weights["num_bits"], weights.get("group_size")
        total = 0
        for rows, columns in self.block_linears().values():
            groups = math.ceil(columns / group) if group and group > 0 else 1  # without: one scale for the whole row
            zeros = 0 if weights["symmetric"] else 4 * math.ceil(rows * bits / 32) * groups
            total += 4 * rows * math.ceil(columns * bits / 32) + rows * groups * scale_bytes + zeros
        return total

    def with_config(self, **changes) -> ModelDescription:
        """Return a copy with some entries of the config replaced."""
        return dataclasses.replace(self, config={**self.config, **changes})

    def with_blocks(self, kept: list[int]) -> ModelDescription:
        """Return the description after keeping only the blocks ``kept``; lists with one entry per block are cut too."""
        per_block = {
            key: [value[index] for index in kept]
            for key, value in self.config.items()
            if isinstance(value, list) and len(value) == self.blocks and not key.endswith("token_id")
        }
        if "per_layer_config" in self.config:
            per_block["per_layer_config"] = {
                str(new): self.differing[old] for new, old in enumerate(kept) if old in self.differing
            }
        return self.with_config(num_hidden_layers=len(kept), **per_block)

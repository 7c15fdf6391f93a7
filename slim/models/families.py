"""The model families slim knows: names and order of the parts of a decoder block, and where
families differ.

A family is one :class:`Family` entry in ``FAMILIES``; ``docs/extending/family.md`` says how to
add one. Only what slim must know to take blocks apart is here. Everything a family
computes in its own way (rotary angles, masks, soft caps, scaled embeddings) stays transformers' own
code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# what a block attends to: the whole text, or a window
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LinearGroupSpec:
    """Linear layers of a block that share one input.

    Attributes:
        linears: Names relative to the block.
        scale_into: The module whose output channels are this input's channels, into which a scale
            per channel can be folded: a norm, or the linear layer before it (for ``o_proj`` the
            value projection, for ``down_proj`` the up projection).
        scale_into_part: Where ``scale_into`` is a fused layer, the one of its parts (``FUSED``)
            whose output it is; None elsewhere.
        offset: What the norm ``scale_into`` adds to its stored weight before it multiplies by it (1
            in Gemma).
    """

    linears: tuple[str, ...]
    scale_into: str
    scale_into_part: str | None = None
    offset: float = 0.0


# Linear layers that hold several projections: their rows, one projection below the other, in this
# order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

LLAMA_SEGMENTS = (
    LinearGroupSpec(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"
    ),
    LinearGroupSpec(("self_attn.o_proj",), "self_attn.v_proj"),
    LinearGroupSpec(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    LinearGroupSpec(("mlp.down_proj",), "mlp.up_proj"),
)
GEMMA_SEGMENTS = (
    LinearGroupSpec(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", offset=1.0
    ),
    LinearGroupSpec(("self_attn.o_proj",), "self_attn.v_proj"),
    LinearGroupSpec(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm", offset=1.0),
    LinearGroupSpec(("mlp.down_proj",), "mlp.up_proj"),
)
PHI3_SEGMENTS = (
    LinearGroupSpec(("self_attn.qkv_proj",), "input_layernorm"),
    LinearGroupSpec(("self_attn.o_proj",), "self_attn.qkv_proj", scale_into_part="v_proj"),
    LinearGroupSpec(("mlp.gate_up_proj",), "post_attention_layernorm"),
    LinearGroupSpec(("mlp.down_proj",), "mlp.gate_up_proj", scale_into_part="up_proj"),
)
# A block's norms. In Gemma the outputs of attention and MLP go through one, too, before they join
# the residual stream.
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*LLAMA_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def windows_behind(config: dict) -> list[str] | None:
    """Return what the blocks of a Qwen model attend to: a window from ``max_window_layers`` on.

    Args:
        config: The parsed ``config.json``.

    Returns:
        One word per block; None where the window is not used.
    """
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return None
    depth = config["num_hidden_layers"]
    full = min(depth, config.get("max_window_layers", 28))
    return [FULL] * full + [SLIDING] * (depth - full)


def one_full_in(count: int) -> Callable[[dict], list[str]]:
    """Return the pattern of Gemma: of every so many blocks the last sees all.

    Args:
        count: The period, where ``sliding_window_pattern`` does not say another.

    Returns:
        Function from the parsed ``config.json`` to one word per block.
    """

    def pattern(config: dict) -> list[str]:
        period = config.get("sliding_window_pattern") or count
        types = [SLIDING] * config["num_hidden_layers"]
        types[period - 1 :: period] = [FULL] * len(types[period - 1 :: period])
        return types

    return pattern


@dataclass(frozen=True)
class Family:
    """Names of the parts of a decoder-only model, as in its transformers implementation.

    Attributes:
        model_type: Its name in ``config.json``.
        linear_groups: The linear layers in the order in which they compute.
        norms: Those of a block, as wide as the model.
        blocks: Where the list of blocks is.
        embeddings: The token embedding.
        final_norm: The norm after the last block.
        head: The projection to the vocabulary.
        attention: The attention within a block.
        mlp: The MLP within a block.
        qkv_bias: Whether the query, key and value projections have biases: always, never, or as an
            entry of the config says.
        o_bias: The same of the output projection.
        mlp_bias: The same of the MLP's linear layers.
        qk_norm: Whether queries and keys are normalised per head.
        layer_types: config -> what each block attends to (None: all alike), where ``config.json``
            does not list it.
        defaults: What the family's configuration class assumes for entries that ``config.json``
            may leave out.
    """

    model_type: str
    linear_groups: tuple[LinearGroupSpec, ...] = LLAMA_SEGMENTS
    norms: tuple[str, ...] = LLAMA_NORMS
    blocks: str = "model.layers"
    embeddings: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    mlp: str = "mlp"
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    layer_types: Callable[[dict], list[str] | None] = lambda config: None
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_encoder(self) -> bool:
        """Whether it is an encoder (``encoders.py``), which reads a whole text at once."""
        return False

    @property
    def embedding_module(self) -> str:
        """The module that makes the first block's input of the tokens."""
        return self.embeddings

    def role(self, linear: str) -> str:
        """Return the projection that a linear layer is, such as ``q_proj``.

        Args:
            linear: Its name within the block.
        """
        return linear.split(".")[-1]

    def key(self, entry: str) -> str:
        """Return the family's name of an entry of ``config.json``.

        Args:
            entry: As most families call it, such as ``hidden_size``.
        """
        return entry

    @property
    def fused(self) -> tuple[str, ...]:
        """Names of the linear layers that hold several projections."""
        names: list[str] = []
        for group in self.linear_groups:
            names += [name for name in group.linears if self.role(name) in FUSED]
        return tuple(names)

    @property
    def norms_outputs(self) -> bool:
        """Whether norms stand between the outputs of attention and MLP and the residual stream."""
        return not set(self.norms) <= {group.scale_into for group in self.linear_groups}

    def offset(self, tensor: str) -> float:
        """Return what the model adds to a stored weight before it multiplies by it.

        Args:
            tensor: Full name of a tensor.

        Returns:
            0, except for the norms of Gemma.
        """
        if not tensor.endswith("norm.weight"):
            return 0.0
        return self.linear_groups[0].offset


ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
GEMMA = dict(linear_groups=GEMMA_SEGMENTS, norms=GEMMA_NORMS, **ATTENTION_BIAS)
GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 4}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", **ATTENTION_BIAS, mlp_bias="mlp_bias"),
        Family("mistral", defaults={"num_key_value_heads": 8}),
        Family(
            "qwen2", qkv_bias=True, layer_types=windows_behind,
            defaults={"num_key_value_heads": 32},
        ),
        Family(
            "qwen3", **ATTENTION_BIAS, qk_norm=True, layer_types=windows_behind,
            defaults={"num_key_value_heads": 32, "head_dim": 128},
        ),
        Family("gemma2", **GEMMA, layer_types=one_full_in(2), defaults=GEMMA_DEFAULTS),
        Family(
            "gemma3_text", **GEMMA, qk_norm=True, layer_types=one_full_in(6),
            defaults=GEMMA_DEFAULTS,
        ),
        Family("phi3", linear_groups=PHI3_SEGMENTS),
    )
}  # fmt: skip

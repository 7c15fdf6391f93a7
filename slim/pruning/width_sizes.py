"""How many heads and channels stay, and the config of a model that has them.

By LLM-Pruner's counting (arXiv:2305.11627, its code), with C = kv_heads * head_dim channels of the
key projection and ff channels of the MLP:

    n = C - int(C (1 - ratio))
    key/value groups dropped = n // head_dim
    MLP channels kept = int(ff (1 - ratio))

A key/value group is a key/value head with all query heads that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slim.core.errors import SlimError
from slim.models.spec import ModelSpec

LLM_PRUNER = "llm_pruner"
# Families whose configuration takes one number of heads for all blocks, and one that divides the
# hidden size.
EVEN_HEADS = ("llama", "gemma2", "gemma3_text")
# entry of a config -> the attribute of ModelSpec that says what a config without it means
SIZES = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "intermediate_size": "intermediate_size",
}
# What Llama's configuration assumes for entries that a config.json may leave out, where Mistral's
# assumes otherwise.
LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Width:
    """Sizes of a block.

    Attributes:
        kv_heads: key/value heads.
        heads: query heads.
        channels: MLP channels.
    """

    kv_heads: int
    heads: int
    channels: int

    def entries(self) -> dict[str, int]:
        """Return the sizes by their names in a config."""
        return {
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.channels,
        }


def width_of(spec: ModelSpec, block: int) -> Width:
    """Return the sizes of a block as they are."""
    shape = spec.at(block)
    return Width(shape.kv_heads, shape.heads, shape.intermediate_size)


def pruned_width(spec: ModelSpec, block: int, ratio: float, rounding: int | str) -> Width:
    """Return the sizes of a block after removing a share of its heads and channels.

    Args:
        spec: the model before pruning.
        block: number of the block.
        ratio: the share, between 0 and 1.
        rounding: ``"llm_pruner"``: as above. A number: MLP channels to the nearest multiple of it,
            and as many of the key/value groups as leave the attention's output a multiple of it
            (where it was one), never more than above.
    """
    shape = spec.at(block)
    repeats = shape.heads // shape.kv_heads
    keys = shape.kv_heads * shape.head_dim
    dropped = (keys - int(keys * (1 - ratio))) // shape.head_dim
    channels = int(shape.intermediate_size * (1 - ratio))
    if rounding != LLM_PRUNER:
        nearest = (channels + rounding // 2) // rounding * rounding
        channels = min(shape.intermediate_size, max(rounding, nearest))
        group = repeats * shape.head_dim
        divisible = shape.kv_heads * group % rounding == 0
        while dropped and divisible and (shape.kv_heads - dropped) * group % rounding:
            dropped -= 1
    kept = shape.kv_heads - dropped
    return Width(kept, kept * repeats, channels)


def with_widths(spec: ModelSpec, widths: Mapping[int, Width]) -> ModelSpec:
    """Return a model's description with some blocks at other sizes.

    Alike in all blocks it is a stock config, otherwise ``per_layer_config``. Llama's and Gemma's
    configurations refuse heads that do not divide the hidden size or differ by block; Mistral's
    without a sliding window computes the same as Llama's and takes them.

    Args:
        spec: the model before pruning.
        widths: block -> its new sizes; other blocks keep theirs.

    Raises:
        SlimError: when no configuration can hold the result.
    """
    entries = []
    for block in range(spec.blocks):
        width = widths.get(block) or width_of(spec, block)
        entries.append(width.entries())
    config = {key: value for key, value in spec.config.items() if key != "per_layer_config"}
    config["head_dim"] = spec.head_dim
    if not _differs_otherwise(spec) and all(entry == entries[0] for entry in entries):
        config.update(entries[0])
    else:
        for key, attribute in SIZES.items():
            config[key] = spec.config.get(key) or getattr(spec, attribute)
        config["per_layer_config"] = differing_entries(spec, config, entries)
    if config["model_type"] in EVEN_HEADS and not has_even_heads(config):
        config = as_mistral(config, spec.name)
    return ModelSpec(config, spec.name)


def _differs_otherwise(spec: ModelSpec) -> bool:
    """Whether blocks differ in more than their sizes."""
    return any(set(differing) - set(SIZES) for differing in spec.differing.values())


def differing_entries(spec: ModelSpec, config: dict, entries: list[dict]) -> dict[str, dict]:
    """Return ``per_layer_config``: for every block what differs from ``config``.

    Args:
        spec: the model before pruning, whose blocks may differ already.
        config: of the whole model.
        entries: of every block, its new sizes.
    """
    differing = {}
    for block, entry in enumerate(entries):
        complete = {**spec.differing.get(block, {}), **entry}
        changed = {key: value for key, value in complete.items() if config.get(key) != value}
        if changed:
            differing[str(block)] = changed
    return differing


def has_even_heads(config: dict) -> bool:
    """Whether there is one number of heads for all blocks, and it divides the hidden size."""
    for entry in config.get("per_layer_config", {}).values():
        if "num_attention_heads" in entry:
            return False
    return config["hidden_size"] % config["num_attention_heads"] == 0


def as_mistral(config: dict, name: str) -> dict:
    """Return a Llama config as that of the Mistral model that computes the same.

    Args:
        config: of the result.
        name: of the model, for messages.

    Raises:
        SlimError: when there is none.
    """
    if config["model_type"] != "llama":
        raise SlimError(
            f"The configuration of {config['model_type']} takes one number of heads for all blocks "
            f"of {name}, which divides its hidden size {config['hidden_size']}. "
            "Use pruner.uniform=true with a pruner.ratio that leaves such a number."
        )
    biased = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if biased:
        raise SlimError(
            f"{name} has {biased[0]}, and no stock model with biases takes the heads that would be "
            "left. Use pruner.uniform=true with a pruner.ratio whose heads divide the hidden size."
        )
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp", "architectures", "model_type")
    kept = {key: value for key, value in config.items() if key not in dropped}
    changed = {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }
    return {**LLAMA_DEFAULTS, **kept, **changed}

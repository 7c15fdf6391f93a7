"""From a GGUF file's metadata to ``config.json``, and from its names of tensors to those of
transformers' models.

What the keys mean: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What is stored in
another way than in the model it was made from, and what is not stored at all, follows llama.cpp:
``convert_hf_to_gguf.py`` and ``src/llama-model.cpp`` (https://github.com/ggml-org/llama.cpp). Four
things differ:

- Llama's and Mistral's queries and keys have their rows in another order (:func:`restore_rows`).
- Gemma's norms hold w + 1, where transformers stores w.
- Llama 3's stretched rotary frequencies are stored as a tensor of factors, without the settings
  they came from (``slim/gguf/rotary.py``).
- Where a model has no ``output.weight``, its head shares the embedding's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slim.core.errors import SlimError, did_you_mean
from slim.gguf.rotary import FACTORS, LONG, SHORT, rotary_settings, shortest
from slim.models.families import FAMILIES, FULL, SLIDING, Family
from slim.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

    from slim.gguf.reader import GgufModel

# Parts of a block: name in the file -> name in transformers' model.
LLAMA_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
GEMMA_PARTS = {
    **LLAMA_PARTS,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI3_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
# Not weights: they become settings (slim/gguf/rotary.py). Early files also list the frequencies,
# which the settings give.
READ_ELSEWHERE = (FACTORS, LONG, SHORT, ".attn_rot_embd.weight")


@dataclass(frozen=True)
class Architecture:
    """How a family is written in GGUF.

    Args:
        family: ``model_type`` in ``slim.models.families``.
        class_name: transformers' class of the model.
        parts: Of a block, name in the file -> name in transformers' model.
        permuted: Parts whose rows stand in the order of llama.cpp's rotary embedding.
        norm_offset: What the file adds to the norms' weights.
        activation: Entry of ``config.json`` for the activation, and its value.
    """

    family: str
    class_name: str
    parts: Mapping[str, str] = field(default_factory=lambda: LLAMA_PARTS)
    permuted: tuple[str, ...] = ()
    norm_offset: float = 0.0
    activation: tuple[str, str] = ("hidden_act", "silu")


DECI = "deci"  # llama.cpp's name of a Llama whose blocks differ in size
GELU = ("hidden_activation", "gelu_pytorch_tanh")
ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", permuted=("attn_q", "attn_k")),
    "mistral": Architecture("mistral", "MistralForCausalLM", permuted=("attn_q", "attn_k")),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**LLAMA_PARTS, **HEAD_NORMS}),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", GEMMA_PARTS, norm_offset=1.0, activation=GELU
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {**GEMMA_PARTS, **HEAD_NORMS},
        norm_offset=1.0,
        activation=GELU,
    ),
    "phi3": Architecture("phi3", "Phi3ForCausalLM", PHI3_PARTS),
    # Llama's blocks in different sizes; transformers' Mistral takes any number of heads
    DECI: Architecture("mistral", "MistralForCausalLM", permuted=("attn_q", "attn_k")),
}
# key that a file of differing blocks lists by block -> entry of config.json
SIZES_BY_BLOCK = {
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
# Blocks of the Gemma models of 27 billion parameters, whose queries are scaled by another number
# (llama.cpp does the same).
LARGE_GEMMA = {"gemma2": 46, "gemma3": 62}
SOFT_CAPS = {
    ("gemma2", "attn_logit_softcapping"): 50.0,
    ("gemma2", "final_logit_softcapping"): 30.0,
}


class Layout:
    """One file's architecture: its config, and where each of its tensors goes.

    Args:
        model: The file.

    Raises:
        SlimError: slim does not know the architecture, an entry is missing, or a tensor is missing
            or of another shape.
    """

    def __init__(self, model: GgufModel):
        self.model = model
        self.architecture = find_architecture(model)
        self.prefix = model.metadata["general.architecture"]
        self.config = self._config()
        self._check_tensors()

    @property
    def family(self) -> Family:
        """slim's description of the family."""
        return FAMILIES[self.architecture.family]

    def entry(self, key: str, default: Any = None) -> Any:
        """Return an entry of the metadata that begins with the architecture's name."""
        return self.model.metadata.get(f"{self.prefix}.{key}", default)

    def required(self, key: str) -> Any:
        """Return such an entry; one number where the file lists the same for every block.

        Raises:
            SlimError: It is missing, or differs from block to block.
        """
        value = self.entry(key)
        if value is None:
            raise SlimError(
                f"{self.model.path} lacks {self.prefix}.{key}: it cannot be read without. Fetch or "
                "make it again."
            )
        if isinstance(value, list):
            if len(set(value)) != 1:
                where = f"{self.model.path}: {self.prefix}.{key}"
                raise SlimError(f"{where} differs from block to block, which slim does not import.")
            return value[0]
        return value

    def count(self, key: str) -> int:
        """Return such an entry as a whole number above 0; where blocks differ, the largest. Raises
        ``SlimError`` if it is missing or something else.
        """
        if self.prefix == DECI and isinstance(self.entry(key), list):
            return max(self.counts(key))
        return self._checked_count(key, self.required(key))

    def counts(self, key: str) -> list[int]:
        """Return such an entry for every block.

        Raises:
            SlimError: It is missing, one of them is no count, or 0: a block without attention or
                MLP.
        """
        values, blocks = self.entry(key), self.count("block_count")
        if not isinstance(values, list):
            values = [self.required(key)] * blocks
        if 0 in values:
            raise SlimError(
                f"{self.model.path}: block {values.index(0)} has no attention or no MLP "
                f"({self.prefix}.{key} is 0), which slim does not import."
            )
        if len(values) != blocks:
            raise SlimError(
                f"{self.model.path}: {self.prefix}.{key} lists {len(values)} numbers for {blocks} "
                "blocks. Fetch or make it again."
            )
        return [self._checked_count(key, value) for value in values]

    def _checked_count(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 1:
            raise SlimError(
                f"{self.model.path}: {self.prefix}.{key} is {value!r}, where a count belongs. "
                "Fetch or make it again."
            )
        return value

    def differing_sizes(self, config: dict) -> dict[str, dict[str, int]]:
        """Return ``per_layer_config``: block -> entries in which it differs from the config."""
        differing: dict[str, dict[str, int]] = {}
        for key, entry in SIZES_BY_BLOCK.items():
            for block, size in enumerate(self.counts(key)):
                if size != config[entry]:
                    differing.setdefault(str(block), {})[entry] = size
        return differing

    def rows(self, name: str) -> int:
        """Return the number of rows of a tensor. Raises ``SlimError`` if the file lacks it."""
        return self.shape(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises ``SlimError`` if the file lacks it."""
        if name not in self.model.tensors:
            raise SlimError(
                f"{self.model.path} lacks the tensor {name}, which a {self.prefix} model has. "
                "Fetch or make it again."
            )
        return self.model.tensors[name].shape

    def _config(self) -> dict:
        """Return the content of ``config.json``."""
        architecture, heads = self.architecture, self.count("attention.head_count")
        kv_heads = heads
        if self.entry("attention.head_count_kv"):
            kv_heads = self.count("attention.head_count_kv")
        config = {
            "architectures": [architecture.class_name],
            "model_type": architecture.family,
            "vocab_size": self.rows("token_embd.weight"),
            "hidden_size": self.count("embedding_length"),
            "intermediate_size": self.count("feed_forward_length"),
            "num_hidden_layers": self.count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": self._head_dim(heads, kv_heads),
            "max_position_embeddings": self.count("context_length"),
            "rms_norm_eps": shortest(self.required("attention.layer_norm_rms_epsilon")),
            architecture.activation[0]: architecture.activation[1],
            "tie_word_embeddings": "output.weight" not in self.model.tensors,
            **token_ids(self.model.metadata),
            **self._biases(),
        }
        if self.prefix == DECI:
            config["per_layer_config"] = self.differing_sizes(config)
        config |= self._attention_settings(config)
        config["rope_parameters"] = rotary_settings(self.model, self.prefix, config)
        if architecture.family == "phi3":
            config.pop("head_dim")  # in its class always hidden_size / num_attention_heads
            length = self.entry(
                "rope.scaling.original_context_length", config["max_position_embeddings"]
            )
            config["original_max_position_embeddings"] = length
        return config

    def _head_dim(self, heads: int, kv_heads: int) -> int:
        """Return the size of a head, by the shape of the first block's projections.

        Raises:
            SlimError: Keys and values differ in size, or the rows do not divide.
        """
        if "attn_qkv" in self.architecture.parts:
            size, rest = divmod(self.rows("blk.0.attn_qkv.weight"), heads + 2 * kv_heads)
            sizes = [size]
        else:
            if self.prefix == DECI:
                heads = self.counts("attention.head_count")[0]
                kv_heads = self.counts("attention.head_count_kv")[0]
            counts = {"attn_q": heads, "attn_k": kv_heads, "attn_v": kv_heads}
            sizes, rest = [], 0
            for name, count in counts.items():
                rows = self.rows(f"blk.0.{name}.weight")
                sizes.append(rows // count)
                rest += rows % count
        if rest or len(set(sizes)) != 1:
            raise SlimError(
                f"{self.model.path}: queries, keys and values have heads of different sizes, which "
                "slim does not import."
            )
        return sizes[0]

    def _biases(self) -> dict[str, bool]:
        """Return the entries of the config that say which linear layers have biases, by the tensors
        that are there.
        """
        family, flags = self.family, {}
        for entry, part in (
            (family.qkv_bias, "attn_q"),
            (family.o_bias, "attn_output"),
            (family.mlp_bias, "ffn_up"),
        ):
            if isinstance(entry, str):
                flags[entry] = flags.get(entry, False) or f"blk.0.{part}.bias" in self.model.tensors
        return flags

    def _attention_settings(self, config: dict) -> dict:
        """Return windows, soft caps and the scale of the queries.

        Raises:
            SlimError: A window where the file cannot say which blocks have it.
        """
        family, window = config["model_type"], self._window(config)
        if family in ("gemma2", "gemma3_text"):
            return self._gemma_settings(config, window)
        if family in ("mistral", "phi3"):
            return {"sliding_window": window}
        if window is not None and window < config["max_position_embeddings"]:
            raise SlimError(
                f"{self.model.path}: a window of {window} tokens in a {self.prefix} model, and the "
                "file does not say in which "
                "blocks. Give the model as a checkpoint folder or hub id."
            )
        return {}

    def _window(self, config: dict) -> int | None:
        """Return the number of tokens that blocks with a window see; for early files without it,
        what llama.cpp assumes.
        """
        assumed = {"gemma2": 4096}
        if config["num_hidden_layers"] in (32, 40) and config["max_position_embeddings"] == 4096:
            assumed["phi3"] = 2047
        return self.entry("attention.sliding_window", assumed.get(config["model_type"])) or None

    def _gemma_settings(self, config: dict, window: int | None) -> dict:
        heads, head_dim = config["num_attention_heads"], config["head_dim"]
        large = config["num_hidden_layers"] == LARGE_GEMMA[self.prefix]
        return {
            "query_pre_attn_scalar": config["hidden_size"] // heads if large else head_dim,
            "sliding_window": window,
            "layer_types": self._layer_types(config, window),
            "attn_logit_softcapping": self._soft_cap("attn_logit_softcapping"),
            "final_logit_softcapping": self._soft_cap("final_logit_softcapping"),
        }

    def _layer_types(self, config: dict, window: int | None) -> list[str]:
        """Return what each block of a Gemma model attends to: as the file lists it, else by the
        family's pattern.
        """
        if window is None:
            return [FULL] * config["num_hidden_layers"]
        pattern = self.entry("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            return [SLIDING if slides else FULL for slides in pattern]
        return self.family.layer_types({**config, "sliding_window_pattern": pattern})

    def _soft_cap(self, key: str) -> float | None:
        """Return a soft cap, or None without one; for early files without it, what llama.cpp
        assumes.
        """
        value = self.entry(key, SOFT_CAPS.get((self.prefix, key)))
        return shortest(value) if value else None

    def targets(self) -> Iterator[tuple[str, str]]:
        """Yield (name in the file, name in the checkpoint) for every tensor that is imported, block
        after block.
        """
        family, tensors = self.family, self.model.tensors
        yield "token_embd.weight", f"{family.embeddings}.weight"
        for block in range(self.config["num_hidden_layers"]):
            for part, module in self.architecture.parts.items():
                for kind in ("weight", "bias"):
                    name = f"blk.{block}.{part}.{kind}"
                    if kind == "weight" or name in tensors:
                        yield name, f"{family.blocks}.{block}.{module}.{kind}"
        yield "output_norm.weight", f"{family.final_norm}.weight"
        if "output.weight" in tensors:
            yield "output.weight", f"{family.head}.weight"

    def _check_tensors(self) -> None:
        """Raise ``SlimError`` for a tensor that is missing, one that goes nowhere, and one of an
        unexpected shape.
        """
        spec = ModelSpec(self.config, name=str(self.model.path))
        wanted = dict(self.targets())
        for name in sorted(set(self.model.tensors) - set(wanted)):
            if not name.endswith(READ_ELSEWHERE):
                raise SlimError(
                    f"{self.model.path} has the tensor {name}, which slim does not know in a "
                    f"{self.prefix} model: "
                    "without it the model would be another. Give the model as a checkpoint folder "
                    "or hub id."
                )
        for name in wanted:
            shape, expected = self.shape(name), self._expected_shape(name, spec)
            if shape != expected:
                raise SlimError(
                    f"{self.model.path}: {name} has the shape {shape}, and the metadata ask for "
                    f"{expected}."
                )
        for block in range(spec.blocks):
            self._check_biases(block)

    def _expected_shape(self, name: str, spec: ModelSpec) -> tuple[int, ...]:
        """Return the shape that a tensor of the file must have."""
        if name in ("token_embd.weight", "output.weight"):
            return spec.vocab_size, spec.hidden_size
        if name == "output_norm.weight":
            return (spec.hidden_size,)
        block, part, kind = name.split(".")[1:]
        linears, module = spec.block_linears(int(block)), self.architecture.parts[part]
        if module in linears:
            return linears[module] if kind == "weight" else linears[module][:1]
        return (spec.head_dim if part in HEAD_NORMS else spec.hidden_size,)

    def _check_biases(self, block: int) -> None:
        """Raise ``SlimError`` where not all linear layers that share an entry of the config have
        biases, or none of them.
        """
        for part, module in self.architecture.parts.items():
            there = f"blk.{block}.{part}.bias" in self.model.tensors
            if there != self._has_bias(module):
                verb = "has" if there else "lacks"
                raise SlimError(
                    f"{self.model.path} {verb} the tensor blk.{block}.{part}.bias, unlike "
                    "transformers' "
                    f"{self.architecture.family} model with these settings. Give the model as a "
                    "checkpoint folder or hub id."
                )

    def _has_bias(self, module: str) -> bool:
        """Whether transformers' model has a bias in this part of a block."""
        family = self.family
        if module.endswith("norm"):
            return False
        entry = family.qkv_bias
        if module.startswith(family.mlp + "."):
            entry = family.mlp_bias
        elif module.endswith("o_proj"):
            entry = family.o_bias
        return bool(self.config.get(entry)) if isinstance(entry, str) else entry

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Read a tensor as the checkpoint stores it: in the order of rows and with the norms of
        transformers' model.
        """
        offset = -self.architecture.norm_offset if name.endswith("norm.weight") else 0.0
        tensor = self.model.read(name, dtype, offset)
        part = name.split(".")[2] if name.startswith("blk.") else ""
        if part in self.architecture.permuted:
            heads = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
            shape = ModelSpec(self.config).at(int(name.split(".")[1]))
            tensor = restore_rows(tensor, shape.config[heads])
        return tensor


def restore_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the rows of queries or keys into the order in which transformers rotates them.

    llama.cpp rotates neighbouring rows of a head together, 0 with 1, 2 with 3; transformers rotates
    the first half with the second. The file's rows are therefore x0 y0 x1 y1 ..., and the
    checkpoint's x0 x1 ... y0 y1 ...

    Args:
        tensor: Weight (heads * head_dim, in_features), or bias (heads * head_dim,).
        heads: The number of heads in it.

    Returns:
        The same numbers in a new tensor of the same shape.
    """
    pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def find_architecture(model: GgufModel) -> Architecture:
    """Return what slim knows of a file's architecture. Files of Mistral's models say ``llama``,
    which computes the same.

    Raises:
        SlimError: It is unknown, a mixture of experts, or no model but an adapter.
    """
    name = model.metadata.get("general.architecture")
    kind = model.metadata.get("general.type", "model")
    if kind != "model":
        raise SlimError(
            f"{model.path} is of the type '{kind}', not a model. Give the GGUF file of the model "
            "itself."
        )
    if name not in ARCHITECTURES:
        raise SlimError(
            f"{model.path} is of the architecture '{name}', which slim does not import. It imports "
            f"{', '.join(ARCHITECTURES)}."
            f"{did_you_mean(str(name), ARCHITECTURES)}"
        )
    if model.metadata.get(f"{name}.expert_count"):
        raise SlimError(
            f"{model.path} is a mixture of experts ({name}.expert_count), which slim does not "
            "import."
        )
    known_as = " ".join(
        str(model.metadata.get(f"general.{key}", "")) for key in ("name", "basename")
    ).lower()
    mistral = name == "llama" and ("mistral" in known_as or _needs_mistral(model))
    if name == DECI and _even_heads(model):
        name = "llama"
    return ARCHITECTURES["mistral" if mistral else name]


def _even_heads(model: GgufModel) -> bool:
    """Whether all blocks have the same number of heads, and it divides the hidden size."""
    hidden = model.metadata.get("deci.embedding_length")
    heads = model.metadata.get("deci.attention.head_count")
    counts = set(heads) if isinstance(heads, list) else {heads}
    number = counts.pop()
    usable = isinstance(number, int) and isinstance(hidden, int) and number > 0
    return not counts and usable and hidden % number == 0


def _needs_mistral(model: GgufModel) -> bool:
    """Whether transformers' Llama refuses the model: a window, or heads that do not divide the
    hidden size.
    """
    heads = model.metadata.get("llama.attention.head_count")
    hidden = model.metadata.get("llama.embedding_length")
    counts = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
    uneven = counts and hidden % heads != 0
    return uneven or bool(model.metadata.get("llama.attention.sliding_window"))


def token_ids(metadata: dict) -> dict[str, int | None]:
    """Return the ids of the special tokens as ``config.json`` names them; None where the file names
    none.
    """
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{name}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in keys.items()
    }

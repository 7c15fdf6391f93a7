"""What slim must know of a model: where blocks, projections, norms and heads are, and how large.

Everything here is read from ``config.json`` alone, without torch and without weights, so that a
plan or a wrong setting is answered at once. The names of a family's parts are in ``families.py``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from slim.core.errors import SlimError
from slim.models.encoders import ENCODERS, family_of, label_count, top_of
from slim.models.families import FAMILIES, FUSED, Family, LinearGroupSpec

# entry of config.json, and below it "parameters": how many the adapter has
ADAPTER = "slim_adapter"
# entries that every config must have, whole numbers
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)
DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "int8": 1,
}


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint as far as ``config.json`` tells: sizes, counts, how its weights are stored.

    Attributes:
        config: The parsed ``config.json``.
        name: How to call the model in messages.
    """

    config: dict
    name: str = "the model"

    def __post_init__(self) -> None:
        if "text_config" in self.config:
            model_type = self.config.get("model_type")
            raise SlimError(
                f"{self.name} is a model of several parts (model_type '{model_type}'); slim "
                "compresses text models.\n"
                "Save its text part as a checkpoint first: "
                "docs/extending/family.md, 'Models of several parts'."
            )
        names = [self.key(entry) for entry in SIZES]
        missing = [name for name in names if not isinstance(self.config.get(name), int)]
        if missing:
            raise SlimError(
                f"config.json of {self.name} lacks {', '.join(missing)}: not a decoder-only "
                "language model, nor an encoder."
            )

    @property
    def family(self) -> Family:
        """The family's description.

        Raises:
            SlimError: slim has none; the message says where to add one.
        """
        family = family_of(self.config)
        if family is None:
            model_type = self.config.get("model_type", "")
            raise SlimError(
                f"slim does not know the model family '{model_type}' of {self.name}. Known: "
                f"{', '.join((*FAMILIES, *ENCODERS))}.\n"
                f"To describe it, add Family('{model_type}', ...) to FAMILIES "
                "in slim/models/families.py; docs/extending/family.md says how."
            )
        return family

    @property
    def known(self) -> bool:
        """Whether there is a description of the family."""
        return family_of(self.config) is not None

    @property
    def is_encoder(self) -> bool:
        """Whether it is an encoder: a text becomes a vector per token, or scores of classes."""
        return self.config.get("model_type") in ENCODERS

    @property
    def top(self) -> str | None:
        """What stands on top of an encoder: ``classification``, ``masked`` or ``embedding``; None
        for a decoder."""
        if not self.is_encoder:
            return None
        return top_of(self.config)

    @property
    def labels(self) -> list[str]:
        """Names of the classes that a head for classes tells apart, in their order."""
        names = self.config.get("id2label") or {}
        count = label_count(self.config)
        return [str(names.get(str(number), f"LABEL_{number}")) for number in range(count)]

    def key(self, entry: str) -> str:
        """Return the name that an entry of ``config.json`` has in this family.

        Args:
            entry: As most families call it.
        """
        family = family_of(self.config)
        if family is None:
            return entry
        return family.key(entry)

    def entry(self, key: str) -> Any:
        """Return an entry of the config, or what the family assumes where it is left out.

        Args:
            key: Name of the entry.

        Returns:
            Its value; None where neither says anything.
        """
        if key in self.config or not self.known:
            return self.config.get(key)
        return self.family.defaults.get(key)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.config[self.key("num_hidden_layers")]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.config[self.key("hidden_size")]

    @property
    def intermediate_size(self) -> int:
        """Channels of the MLP."""
        return self.config[self.key("intermediate_size")]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config["vocab_size"]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.config[self.key("num_attention_heads")]

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.entry("num_key_value_heads") or self.heads

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.entry("head_dim") or self.hidden_size // self.heads

    @property
    def context_length(self) -> int:
        """Longest input in tokens that the model was built for."""
        length = self.config.get("max_position_embeddings") or 2048
        if self.is_encoder:
            length -= self.family.reserved_positions
        return length

    @property
    def tied(self) -> bool:
        """Whether the head shares the embedding's weights, or there is none that predicts
        tokens."""
        if self.is_encoder:
            return True
        return bool(self.entry("tie_word_embeddings"))

    @property
    def dtype(self) -> str:
        """Type in which weights that are not quantised are stored, such as ``"bfloat16"``."""
        return str(
            self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        ).removeprefix("torch.")

    @property
    def quantization(self) -> dict | None:
        """The ``quantization_config``, or None for plain weights."""
        return self.config.get("quantization_config")

    @property
    def adapter(self) -> dict | None:
        """What ``config.json`` says of an adapter next to the weights
        (``slim/loading/adapters.py``), or None."""
        return self.config.get(ADAPTER)

    def require_merged(self) -> None:
        """Refuse a model with an adapter next to its weights, which was trained for them as they
        are.

        Raises:
            SlimError: There is one.
        """
        if self.adapter is not None:
            raise SlimError(
                f"{self.name} has an adapter next to its weights, and changing these would leave "
                "the adapter without what it was trained on.\n"
                "Put this stage before the tuner, or tune with tuner.merge=true."
            )

    def require_decoder(self, setting: str, why: str, advice: str) -> None:
        """Refuse an encoder.

        Args:
            setting: What does not work for it, as it is typed.
            why: What it needs, such as ``"a loss of next tokens"``.
            advice: What to use instead, one sentence.

        Raises:
            SlimError: It is one.
        """
        if self.is_encoder:
            raise SlimError(f"{setting} needs {why}, and {self.name} is an encoder. {advice}")

    def require_plain(self, advice: str) -> None:
        """Refuse weights that are quantized, or that an adapter was trained for.

        Args:
            advice: What to do instead of changing quantized weights, one sentence.

        Raises:
            SlimError: They are.
        """
        self.require_merged()
        if self.quantization is not None:
            method = self.quantization.get("quant_method", "an unknown method")
            raise SlimError(f"{self.name} is already quantized ({method}). {advice}")

    @property
    def differing(self) -> dict[int, dict]:
        """Where blocks differ in size: block -> entries that replace the config's own there
        (``per_layer_config``)."""
        return {
            int(block): entries
            for block, entries in (self.config.get("per_layer_config") or {}).items()
        }

    def at(self, block: int) -> ModelSpec:
        """Return the description of a model whose blocks are all like one of this model's.

        Args:
            block: Its number. Where blocks do not differ, the result is this description.
        """
        if not self.config.get("per_layer_config"):
            return self
        config = {**self.config, **self.differing.get(block, {})}
        del config["per_layer_config"]
        return dataclasses.replace(self, config=config)

    def block_linears(self, block: int | None = None) -> dict[str, tuple[int, int]]:
        """Return the sizes of the linear layers of a block.

        Args:
            block: Its number; None: those of every block, or, where blocks differ, the largest rows
                and columns of each layer.

        Returns:
            Name within the block -> (out_features, in_features).
        """
        if block is not None or not self.differing:
            return self.at(block or 0)._linears()
        largest = self.at(0)._linears()
        for index in range(1, self.blocks):
            for name, (rows, columns) in self.at(index)._linears().items():
                largest[name] = (max(rows, largest[name][0]), max(columns, largest[name][1]))
        return largest

    def _projections(self) -> dict[str, tuple[int, int]]:
        """Return projection -> (out_features, in_features), fused ones and their parts alike."""
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
        for name, parts in FUSED.items():
            sizes[name] = (sum(sizes[part][0] for part in parts), hidden)
        return sizes

    def _linears(self) -> dict[str, tuple[int, int]]:
        """Return name within a block -> sizes, where all blocks are alike."""
        sizes, linears = self._projections(), {}
        for group in self.family.linear_groups:
            for name in group.linears:
                linears[name] = sizes[self.family.role(name)]
        return linears

    def first_scaled_row(self, group: LinearGroupSpec) -> int:
        """Return the first row of the layer ``group.scale_into`` that feeds a linear group.

        Args:
            group: The linear group.

        Returns:
            0, unless that layer holds several projections.
        """
        if group.scale_into_part is None:
            return 0
        parts, sizes = FUSED[group.scale_into.split(".")[-1]], self._projections()
        return sum(sizes[part][0] for part in parts[: parts.index(group.scale_into_part)])

    def block_parameters(self, block: int | None = None) -> int:
        """Count the parameters of a block: linear layers, biases, norms.

        Args:
            block: Its number; None as in :meth:`block_linears`.
        """
        linears = self.block_linears(block)
        weights = sum(rows * columns for rows, columns in linears.values())
        biases = sum(rows for name, (rows, _) in linears.items() if self._has_bias(name))
        norms = len(self.family.norms) * self.hidden_size + 2 * self.head_dim * self.family.qk_norm
        if self.is_encoder:
            norms *= 1 + self.family.norm_bias
        return weights + biases + norms

    def _has_bias(self, linear: str) -> bool:
        """Whether a linear layer, by its name within a block, has a bias."""
        family = self.family
        bias = family.qkv_bias
        if linear.startswith(family.mlp + "."):
            bias = family.mlp_bias
        elif linear.endswith(".o_proj"):
            bias = family.o_bias
        if isinstance(bias, str):  # an entry of the config decides
            return bool(self.entry(bias))
        return bias

    def parameters(self) -> int:
        """Count all parameters, a shared embedding once, packed weights as the weights they stand
        for, an adapter too."""
        embeddings = self.vocab_size * self.hidden_size
        if not self.tied:
            embeddings *= 2
        blocks = sum(self.block_parameters(block) for block in range(self.blocks))
        if self.is_encoder:
            rest = self.family.rest(self.config, self.top)
            return embeddings + rest + blocks + self.adapter_parameters
        return embeddings + self.hidden_size + blocks + self.adapter_parameters

    @property
    def adapter_parameters(self) -> int:
        """Parameters of the adapter next to the weights; 0 without one. They are stored in
        float32."""
        if self.adapter is None:
            return 0
        return self.adapter["parameters"]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return full name -> (out_features, in_features) of all linear layers and embeddings, a
        shared one once."""
        matrices = self.linears()
        matrices[self.family.embeddings] = (self.vocab_size, self.hidden_size)
        if not self.tied:
            matrices[self.family.head] = (self.vocab_size, self.hidden_size)
        return matrices

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return full name -> (out_features, in_features) of the blocks' linear layers, in
        order."""
        linears = {}
        for block in range(self.blocks):
            for name, shape in self.block_linears(block).items():
                linears[f"{self.family.blocks}.{block}.{name}"] = shape
        return linears

    @property
    def outer_linears(self) -> list[str]:
        """Full names of the linear layers outside the blocks: a decoder's head, or what stands on
        top of an encoder."""
        if self.is_encoder:
            return list(self.family.outside.get(self.top, ()))
        return [self.family.head]

    def with_config(self, **changes) -> ModelSpec:
        """Return a copy with some entries of the config replaced.

        Args:
            **changes: Entry of ``config.json`` -> its new value.
        """
        return dataclasses.replace(self, config={**self.config, **changes})

    def with_blocks(self, kept: list[int]) -> ModelSpec:
        """Return the description after keeping only some blocks.

        Lists with one entry per block are cut too. What each block attends to is listed in the
        result where the config so far says it by the blocks' numbers.

        Args:
            kept: Numbers of the blocks that stay, in their new order.
        """
        changes: dict[str, Any] = {}
        for key, value in self.config.items():
            per_block = isinstance(value, list) and len(value) == self.blocks
            per_block = per_block and key != "architectures"
            # as many tokens that end a text as blocks would be a coincidence
            if per_block and not key.endswith("token_id"):
                changes[key] = [value[index] for index in kept]
        if self.known and not self.config.get("layer_types"):
            types = self.family.layer_types(self.config)
            if types is not None:
                changes["layer_types"] = [types[index] for index in kept]
        if "per_layer_config" in self.config:
            changes["per_layer_config"] = {}
            for new, old in enumerate(kept):
                if old in self.differing:
                    changes["per_layer_config"][str(new)] = self.differing[old]
        changes[self.key("num_hidden_layers")] = len(kept)
        return self.with_config(**changes)


def resolve_dtype(spec: ModelSpec, dtype: str, device: str) -> str:
    """Return the type to compute in.

    Args:
        spec: The model.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"``: float32 on a CPU, the
            stored type elsewhere.
        device: ``"cpu"`` or ``"cuda"``.
    """
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else spec.dtype

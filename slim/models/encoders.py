"""The encoder families slim knows: text models that read a whole text at once and give one vector a
token, with a head for classes on top or none.

An encoder goes through the same stages as a decoder. What differs is said here: its blocks
normalise after adding (BERT) or have no gate in the MLP, so no scale can be folded into the layer
before; the names of the parts depend on whether there is a head, and those of the entries of
``config.json`` on the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from slim.models.families import FAMILIES, FULL, SLIDING, Family, LinearGroupSpec

# what stands on top of an encoder, by the end of its class's name
CLASSES, BODY, MASKED = "classification", "embedding", "masked"
ENDINGS = {"ForSequenceClassification": CLASSES, "ForMaskedLM": MASKED, "Model": BODY}


@dataclass(frozen=True)
class Encoder(Family):
    """Names of the parts of an encoder, as in its transformers implementation.

    ``blocks``, ``embeddings`` and ``final_norm`` are those of the model without a head; a model
    with one has them below ``base`` (:meth:`placed`).

    Attributes:
        base: Where a model with a head keeps the model without one.
        first_part: The module that makes the first block's input of the tokens.
        roles: Linear layer within a block -> the projection it is, as decoders call them.
        keys: Entry of ``config.json`` as decoders call it -> its name in this family.
        norm_bias: Whether norms have biases.
        reserved_positions: Positions of the table that no token can have.
        rest: (config, what is on top) -> parameters outside blocks and token embedding.
        outside: What is on top -> linear layers outside the blocks, as the model with it calls
            them.
        classes: The last layer of a head for classes.
    """

    base: str = "bert"
    first_part: str = "embeddings"
    roles: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    norm_bias: bool = True
    reserved_positions: int = 0
    rest: Callable[[dict, str], int] = lambda config, top: 0
    outside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classes: str = "classifier"

    @property
    def is_encoder(self) -> bool:
        return True

    @property
    def embedding_module(self) -> str:
        return self.first_part

    def role(self, linear: str) -> str:
        return self.roles[linear]

    def key(self, entry: str) -> str:
        return self.keys.get(entry, entry)

    def placed(self, config: dict) -> Encoder:
        """Return the family with the names that its parts have in a model.

        Args:
            config: The model's parsed ``config.json``.
        """
        if top_of(config) == BODY:
            return self
        names = {}
        for name in ("blocks", "embeddings", "final_norm", "first_part"):
            if getattr(self, name):
                names[name] = f"{self.base}.{getattr(self, name)}"
        return dataclasses.replace(self, **names)


def top_of(config: dict) -> str:
    """Return what stands on top of an encoder: ``classification``, ``masked`` (the prediction of
    masked tokens) or ``embedding`` (nothing).

    Args:
        config: The parsed ``config.json``.
    """
    names = config.get("architectures") or ["Model"]
    for ending, top in ENDINGS.items():
        if str(names[0]).endswith(ending):
            return top
    return BODY


def label_count(config: dict) -> int:
    """Return the number of classes that a config names.

    Args:
        config: The parsed ``config.json``.
    """
    return len(config.get("id2label") or ()) or int(config.get("num_labels") or 2)


def _bert_rest(config: dict, top: str) -> int:
    """Positions, token types, the embeddings' norm, the pooler and the layers on top."""
    width = config["hidden_size"]
    count = width * (config["max_position_embeddings"] + config.get("type_vocab_size", 2) + 2)
    if top == MASKED:
        return count + width * (width + 3) + config["vocab_size"]
    count += width * (width + 1)
    if top == CLASSES:
        count += (width + 1) * label_count(config)
    return count


def _roberta_rest(config: dict, top: str) -> int:
    """As BERT's: a dense layer stands in the head instead of the pooler, which makes as many."""
    return _bert_rest({"type_vocab_size": 1, **config}, top)


def _distilbert_rest(config: dict, top: str) -> int:
    """Positions, the embeddings' norm, and the layers on top; there is no pooler."""
    width = config["dim"]
    count = width * (config.get("max_position_embeddings", 512) + 2)
    if top == MASKED:
        return count + width * (width + 3) + config["vocab_size"]
    if top == CLASSES:
        count += width * (width + 1) + (width + 1) * label_count(config)
    return count


def _modernbert_rest(config: dict, top: str) -> int:
    """Two norms, without the first block's, which is left out; the layers on top."""
    width = config["hidden_size"]
    count = width  # the embeddings' norm and the final one, less the one that block 0 lacks
    if top == BODY:
        return count
    count += width * width + width
    if top == MASKED:
        return count + config["vocab_size"]
    return count + (width + 1) * label_count(config)


def _every_third_full(config: dict) -> list[str]:
    """What the blocks of ModernBERT attend to: the first of every three to the whole text."""
    period = config.get("global_attn_every_n_layers") or 3
    types = [SLIDING] * config["num_hidden_layers"]
    types[::period] = [FULL] * len(types[::period])
    return types


BERT_GROUPS = (
    LinearGroupSpec(("attention.self.query", "attention.self.key", "attention.self.value"), ""),
    LinearGroupSpec(("attention.output.dense",), ""),
    LinearGroupSpec(("intermediate.dense",), ""),
    LinearGroupSpec(("output.dense",), ""),
)
BERT_ROLES = {
    "attention.self.query": "q_proj",
    "attention.self.key": "k_proj",
    "attention.self.value": "v_proj",
    "attention.output.dense": "o_proj",
    "intermediate.dense": "up_proj",
    "output.dense": "down_proj",
}
BERT = dict(
    linear_groups=BERT_GROUPS,
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    roles=BERT_ROLES,
    blocks="encoder.layer",
    embeddings="embeddings.word_embeddings",
    final_norm="",
    head="",
    attention="attention",
    mlp="intermediate",
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    rest=_bert_rest,
    outside={
        BODY: ("pooler.dense",),
        CLASSES: ("bert.pooler.dense", "classifier"),
        MASKED: ("cls.predictions.transform.dense", "cls.predictions.decoder"),
    },
)
ROBERTA = {
    **BERT,
    "base": "roberta",
    "reserved_positions": 2,
    "rest": _roberta_rest,
    "outside": {
        BODY: ("pooler.dense",),
        CLASSES: ("classifier.dense", "classifier.out_proj"),
        MASKED: ("lm_head.dense", "lm_head.decoder"),
    },
    "classes": "classifier.out_proj",
}
DISTILBERT = {
    **BERT,
    "base": "distilbert",
    "linear_groups": (
        LinearGroupSpec(("attention.q_lin", "attention.k_lin", "attention.v_lin"), ""),
        LinearGroupSpec(("attention.out_lin",), ""),
        LinearGroupSpec(("ffn.lin1",), ""),
        LinearGroupSpec(("ffn.lin2",), ""),
    ),
    "roles": {
        "attention.q_lin": "q_proj",
        "attention.k_lin": "k_proj",
        "attention.v_lin": "v_proj",
        "attention.out_lin": "o_proj",
        "ffn.lin1": "up_proj",
        "ffn.lin2": "down_proj",
    },
    "norms": ("sa_layer_norm", "output_layer_norm"),
    "blocks": "transformer.layer",
    "mlp": "ffn",
    "keys": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
    },
    "rest": _distilbert_rest,
    "outside": {
        CLASSES: ("pre_classifier", "classifier"),
        MASKED: ("vocab_transform", "vocab_projector"),
    },
}
MODERNBERT = dict(
    base="model",
    linear_groups=(
        LinearGroupSpec(("attn.Wqkv",), ""),
        LinearGroupSpec(("attn.Wo",), ""),
        LinearGroupSpec(("mlp.Wi",), ""),
        LinearGroupSpec(("mlp.Wo",), ""),
    ),
    roles={
        "attn.Wqkv": "qkv_proj",
        "attn.Wo": "o_proj",
        "mlp.Wi": "gate_up_proj",
        "mlp.Wo": "down_proj",
    },
    norms=("attn_norm", "mlp_norm"),
    blocks="layers",
    embeddings="embeddings.tok_embeddings",
    final_norm="final_norm",
    head="",
    attention="attn",
    mlp="mlp",
    qkv_bias="attention_bias",
    o_bias="attention_bias",
    mlp_bias="mlp_bias",
    norm_bias=False,
    layer_types=_every_third_full,
    rest=_modernbert_rest,
    outside={CLASSES: ("head.dense", "classifier"), MASKED: ("head.dense", "decoder")},
)
ENCODERS = {
    family.model_type: family
    for family in (
        Encoder("bert", **BERT),
        Encoder("distilbert", **DISTILBERT),
        Encoder("roberta", **ROBERTA),
        Encoder("xlm-roberta", **ROBERTA),
        Encoder("modernbert", **MODERNBERT),
    )
}


def family_of(config: dict) -> Family | None:
    """Return the family of a model, an encoder's with the names its parts have there; None where
    slim knows none.

    Args:
        config: The parsed ``config.json``.
    """
    model_type = config.get("model_type")
    if model_type in ENCODERS:
        return ENCODERS[model_type].placed(config)
    return FAMILIES.get(model_type)

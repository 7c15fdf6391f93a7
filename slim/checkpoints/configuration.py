"""``config.json`` as slim reads it: what other files and the weights themselves say is added, and
values that no class can be built with are refused by name.

Needs neither torch nor transformers. Values that only transformers can judge are refused by
``slim/checkpoints/verify.py``, when the model's class is built."""

from __future__ import annotations

import json
from pathlib import Path

from slim.checkpoints.files import QUANTIZATION_FILES, quantization_file
from slim.checkpoints.stored import StoredTensor, equal_contents, plain_dtype
from slim.core.errors import SlimError
from slim.core.io import read_json, read_object
from slim.models.encoders import family_of
from slim.models.families import Family
from slim.models.spec import DTYPE_BYTES, SIZES

# transformers' own; any other value names a package that may not be installed
ATTENTION = ("eager", "sdpa", "flex_attention")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
# entries that slim computes with, where they are there
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "sliding_window_pattern")
OBJECTS = ("quantization_config", "compression_config", "per_layer_config", "slim_adapter")
NAMES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def read_config(folder: Path, tensors: dict[str, StoredTensor], notes: list[str]) -> dict:
    """Return the content of ``config.json`` as it holds for the tensors.

    Args:
        folder: The checkpoint folder.
        tensors: Those of its files, by the names they have in the model.
        notes: A sentence for each change is appended.

    Raises:
        SlimError: An entry has a value that no model can be built with.
    """
    config = read_json(folder / "config.json")
    config = _with_quantization(config, folder, tensors, notes)
    config = _with_dtype(config, tensors)
    for key in ATTENTION_KEYS:
        if config.get(key) not in (None, *ATTENTION):
            notes.append(f"config.json: {key}={config[key]} is left out; slim does not need it.")
            config.pop(key)
    family = family_of(config)
    if family is not None and _has_own_head(config, family, folder, tensors):
        notes.append(
            "config.json says that the head shares the embedding's weights, but the file has a "
            "head of its own, which is other than the embedding: it is kept."
        )
        config["tie_word_embeddings"] = False
    return config


def check_entries(config: dict, folder: Path) -> None:
    """Refuse entries that no class can be built with.

    Args:
        config: The content of ``config.json``.
        folder: The checkpoint folder, for messages.

    Raises:
        SlimError: It names the file and the entry.
    """
    file = folder / "config.json"
    for key in (*SIZES, *OPTIONAL_SIZES):
        value = config.get(key)
        # type, not isinstance: true is an int in Python
        if value is not None and (type(value) is not int or value < 1):
            raise SlimError(f"{file}: {key}={show(value)} must be a whole number of at least 1.")
    for key in OBJECTS:
        if not isinstance(config.get(key) or {}, dict):
            raise SlimError(f"{file}: {key}={show(config[key])} must be a JSON object.")
    if not isinstance(config.get("model_type", ""), str):
        raise SlimError(f"{file}: model_type={show(config['model_type'])} must be a name.")
    if "max_position_embeddings" in config:
        length = config["max_position_embeddings"]
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise SlimError(
                f"{file}: max_position_embeddings={show(length)} must be a whole number of at "
                "least 1, the longest input in tokens."
            )
    rows = config.get("vocab_size")
    padding = config.get("pad_token_id")
    # torch counts a negative row from the end
    if isinstance(rows, int) and isinstance(padding, int) and not -rows <= padding < rows:
        raise SlimError(
            f"{file}: pad_token_id={padding} must be below vocab_size={rows}, the rows of the "
            "embedding. Set it to a token of the vocabulary, or to null."
        )
    dtype = plain_dtype(config)
    if dtype and dtype not in (*DTYPE_BYTES, "auto", "float8_e5m2"):
        raise SlimError(
            f"{file}: dtype={dtype} must be one of {', '.join(NAMES.values())}, the type of the "
            "weights."
        )


def show(value: object) -> str:
    """Return a JSON value as it stands in a file."""
    return json.dumps(value, ensure_ascii=False)


def _with_quantization(
    config: dict, folder: Path, tensors: dict[str, StoredTensor], notes: list[str]
) -> dict:
    """Add what other files say of the quantization; take away what float8 weights no longer
    need."""
    config = dict(config)
    if config.get("quantization_config") is None:
        config.pop("quantization_config", None)
        if isinstance(config.get("compression_config"), dict):  # older compressed-tensors
            config["quantization_config"] = config.pop("compression_config")
    file = quantization_file(folder)
    if "quantization_config" not in config and file is not None:
        # the file may be left over from what the plain weights were made for
        packed = any(name.endswith((".qweight", ".weight_packed")) for name in tensors)
        if packed:
            method = {"quant_method": QUANTIZATION_FILES[file.name]}
            config["quantization_config"] = method | read_object(file)
            notes.append(f"The quantization is described by {file.name}.")
    if any(tensor.read_as is not None for tensor in tensors.values()):
        config.pop("quantization_config", None)
    return config


def _with_dtype(config: dict, tensors: dict[str, StoredTensor]) -> dict:
    """Where the config names no type that weights are computed in, take that of most weights."""
    dtype = plain_dtype(config)
    if not dtype or (dtype != "auto" and not dtype.startswith("float8")):
        return config
    counts: dict[str, int] = {}
    for tensor in tensors.values():
        kind = NAMES.get(tensor.entry[1])
        if kind is not None:
            counts[kind] = counts.get(kind, 0) + 1
    config = dict(config)
    config.pop("torch_dtype", None)  # the older name would say something else
    config["dtype"] = max(counts, key=counts.get, default="bfloat16")
    return config


def _has_own_head(
    config: dict, family: Family, folder: Path, tensors: dict[str, StoredTensor]
) -> bool:
    """Whether the file has a head other than the embedding that the config says it shares."""
    tied = config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings"))
    head = tensors.get(f"{family.head}.weight")
    embedding = tensors.get(f"{family.embeddings}.weight")
    if not tied or head is None or embedding is None:
        return False
    return not equal_contents(folder, head, embedding)

"""From ``config.json`` to a GGUF file's metadata and names of tensors: the way back of
``architecture.py``, with what llama.cpp cannot be told refused before any work.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp assumes where no key
says so (scale of Gemma's queries, which blocks have a window) follows ``src/llama-model.cpp``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slim.core.errors import SlimError
from slim.gguf.architecture import ARCHITECTURES, DECI, LARGE_GEMMA, SIZES_BY_BLOCK, Architecture
from slim.gguf.rotary import FACTORS, LOCAL_THETA, LONG, SHORT, THETA, llama3_factors
from slim.models.families import FULL, SLIDING
from slim.models.spec import ModelSpec

GGUF_FILE = "model.gguf"
# Files of Mistral's models say llama, which computes the same.
NAMES = {entry.family: name for name, entry in ARCHITECTURES.items() if name != DECI}
NAMES["mistral"] = "llama"
BY_BLOCK = ("llama", "mistral")  # families for whose models of differing blocks there is a name
GEMMA_PERIODS = {"gemma2": 2, "gemma3_text": 6}
WITH_BIASES = ("llama", "mistral", "qwen2")  # whose biases llama.cpp reads
ROPE_TYPES = ("default", "linear", "yarn", "llama3", "longrope")
QUERY_SCALAR = 256  # transformers' default for Gemma


def architecture_of(spec: ModelSpec) -> tuple[str, Architecture]:
    """Return a model's ``general.architecture`` and what slim knows of it.

    Raises:
        SlimError: slim does not know the family.
    """
    family = spec.family.model_type
    if family not in NAMES:
        raise SlimError(
            f"{spec.name}: slim does not write the family '{family}' as GGUF. It writes "
            f"{', '.join(NAMES)}."
        )
    if spec.differing and family in BY_BLOCK:
        return DECI, ARCHITECTURES[DECI]
    entry = ARCHITECTURES.get("mistral" if family == "mistral" else NAMES[family])
    return NAMES[family], entry


def check_model(spec: ModelSpec) -> None:
    """Raise ``SlimError`` for a model that GGUF, or llama.cpp, cannot be told as it is."""
    spec.require_decoder(
        "GGUF", "a model that continues texts", "Use quant.format=compressed-tensors or gptq."
    )
    _, architecture = architecture_of(spec)
    config = spec.config
    if spec.adapter is not None:
        raise SlimError(
            f"{spec.name} has an adapter next to its weights, which a GGUF file has no place for. "
            "Use tuner.merge=true."
        )
    _check_sizes(spec)
    entry, expected = architecture.activation
    activation = config.get(entry, config.get("hidden_act", expected))
    if activation != expected:
        raise SlimError(
            f"{spec.name} has {entry}={activation}; engines compute a GGUF file of this family "
            f"with {expected}."
        )
    _check_biases(spec)
    _check_rotary(spec)
    _check_windows(spec)


def _check_sizes(spec: ModelSpec) -> None:
    """Raise ``SlimError`` where blocks differ in what no architecture of llama.cpp can be told."""
    family = spec.family.model_type
    if spec.differing and family not in BY_BLOCK:
        raise SlimError(
            f"{spec.name} has blocks of different sizes, which llama.cpp has no architecture for "
            f"in the family '{family}' ({' and '.join(BY_BLOCK)} have one).\n"
            "Use pruner.uniform=true, or quant.format=compressed-tensors."
        )
    for block, entries in spec.differing.items():
        others = sorted(set(entries) - set(SIZES_BY_BLOCK.values()))
        if others:
            raise SlimError(
                f"{spec.name}: block {block} has its own {others[0]}. GGUF can say that blocks "
                f"differ in {', '.join(SIZES_BY_BLOCK.values())}."
            )


def _check_biases(spec: ModelSpec) -> None:
    family = spec.family
    entries = {value for value in (family.qkv_bias, family.o_bias) if isinstance(value, str)}
    if family.model_type in WITH_BIASES:
        return
    for entry in sorted(entries):
        if spec.entry(entry):
            raise SlimError(
                f"{spec.name} has {entry}=true, and llama.cpp reads no biases in this family."
            )


def _check_rotary(spec: ModelSpec) -> None:
    kind = rotary(spec)[0]["rope_type"]
    allowed = ROPE_TYPES if spec.family.model_type == "phi3" else ROPE_TYPES[:-1]
    if kind not in allowed:
        raise SlimError(
            f"{spec.name} has the rotary scaling '{kind}', which slim does not write as GGUF. "
            f"It writes {', '.join(allowed)}."
        )


def _check_windows(spec: ModelSpec) -> None:
    """Raise ``SlimError`` where an engine would give other blocks a window than the model does, or
    scale Gemma's queries otherwise.
    """
    family, window = spec.family.model_type, spec.config.get("sliding_window")
    types = layer_types(spec)
    if family in GEMMA_PERIODS:
        _gemma_period(spec)
        scalar = spec.config.get("query_pre_attn_scalar") or QUERY_SCALAR
        if scalar != _assumed_scalar(spec):
            raise SlimError(
                f"{spec.name} has query_pre_attn_scalar={scalar}, and llama.cpp would compute it "
                f"with {_assumed_scalar(spec)}, which it takes from the sizes: GGUF has no key "
                "for it."
            )
    elif family.startswith("qwen") and SLIDING in types and (window or 0) < spec.context_length:
        raise SlimError(
            f"{spec.name} has a window of {window} tokens in some blocks, which llama.cpp does "
            "not compute in this family."
        )


def _assumed_scalar(spec: ModelSpec) -> int:
    """Return by what llama.cpp divides Gemma's queries (its square)."""
    large = spec.blocks == LARGE_GEMMA[NAMES[spec.family.model_type]]
    return spec.hidden_size // spec.heads if large else spec.head_dim


def layer_types(spec: ModelSpec) -> list[str]:
    """Return what each block attends to."""
    types = spec.config.get("layer_types") or spec.family.layer_types(spec.config)
    return types or [FULL] * spec.blocks


def _gemma_period(spec: ModelSpec) -> int:
    """Return p where the last of every p blocks sees the whole text and the others a window.

    Raises:
        SlimError: The blocks follow no such pattern, as after removing some.
    """
    types, usual = layer_types(spec), GEMMA_PERIODS[spec.family.model_type]
    for period in (usual, *range(1, spec.blocks + 2)):
        expected = [SLIDING if (block + 1) % period else FULL for block in range(spec.blocks)]
        if types == expected:
            return period
    raise SlimError(
        f"{spec.name}: GGUF can say that one in so many blocks sees the whole text, and after "
        "pruning these blocks follow no such pattern.\nRemove blocks in whole periods "
        f"(of {usual}), or prune widths."
    )


def rotary(spec: ModelSpec) -> tuple[dict, dict | None]:
    """Return the settings of rotary embeddings, and those of Gemma 3's blocks with a window.

    Both spellings of ``config.json`` are read: ``rope_parameters``, and ``rope_theta`` with
    ``rope_scaling``.

    Returns:
        (settings with ``rope_type`` and ``rope_theta``, the same for blocks with a window or None).
    """
    config = spec.config
    parameters, local = config.get("rope_parameters"), None
    if parameters and FULL in parameters:
        local = parameters.get(SLIDING)
        parameters = parameters[FULL]
    elif not parameters:
        scaling = config.get("rope_scaling") or {}
        default = 1e6 if spec.family.model_type == "gemma3_text" else THETA
        parameters = {"rope_theta": config.get("rope_theta", default), **scaling}
    if spec.family.model_type == "gemma3_text" and local is None:
        local = {"rope_theta": config.get("rope_local_base_freq", LOCAL_THETA)}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "su":  # early name of longrope
        kind = "longrope"
    settings = {"rope_theta": config.get("rope_theta", THETA), **parameters, "rope_type": kind}
    return settings, local


def model_entries(spec: ModelSpec) -> dict[str, Any]:
    """Return the metadata that describe a model: key -> value, without those of the tokenizer and
    of the file itself.
    """
    name, _ = architecture_of(spec)
    entries = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.context_length,
        "embedding_length": spec.hidden_size,
        "block_count": spec.blocks,
        **_size_entries(spec),
        "attention.layer_norm_rms_epsilon": float(spec.config.get("rms_norm_eps", 1e-6)),
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        **_rotary_entries(spec),
        **_window_entries(spec),
    }
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if spec.config.get(cap):
            entries[cap] = float(spec.config[cap])
    return {f"{name}.{key}": value for key, value in entries.items()}


def _size_entries(spec: ModelSpec) -> dict[str, int | list[int]]:
    """Return heads and MLP channels: a number, or, where blocks differ, one for every block."""
    by_block: dict[str, list[int]] = {key: [] for key in SIZES_BY_BLOCK}
    for block in range(spec.blocks):
        shape = spec.at(block)
        by_block["feed_forward_length"].append(shape.intermediate_size)
        by_block["attention.head_count"].append(shape.heads)
        by_block["attention.head_count_kv"].append(shape.kv_heads)
    if spec.differing:
        return by_block
    return {key: sizes[0] for key, sizes in by_block.items()}


def _rotary_entries(spec: ModelSpec) -> dict[str, Any]:
    settings, local = rotary(spec)
    share = settings.get("partial_rotary_factor", spec.config.get("partial_rotary_factor", 1.0))
    entries = {
        "rope.freq_base": float(settings["rope_theta"]),
        "rope.dimension_count": int(spec.head_dim * share),
    }
    if local is not None:
        entries["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = settings["rope_type"]
    if kind in ("linear", "yarn"):
        entries["rope.scaling.type"] = kind
        entries["rope.scaling.factor"] = float(settings["factor"])
    original = settings.get(
        "original_max_position_embeddings", spec.config.get("original_max_position_embeddings")
    )
    if original and kind in ("yarn", "longrope"):
        entries["rope.scaling.original_context_length"] = int(original)
    names = {
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "attention_factor": "attn_factor",
    }
    for setting, key in names.items():
        if settings.get(setting) is not None and kind in ("yarn", "longrope"):
            entries[f"rope.scaling.{key}"] = float(settings[setting])
    if kind == "longrope" and original and "rope.scaling.attn_factor" not in entries:
        entries["rope.scaling.attn_factor"] = _longrope_factor(
            spec.context_length / original, original
        )
    return entries


def _longrope_factor(factor: float, original: int) -> float:
    """Return by what Phi-3's queries and keys are multiplied: transformers computes it, llama.cpp
    is told.
    """
    import math

    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _window_entries(spec: ModelSpec) -> dict[str, Any]:
    family, window = spec.family.model_type, spec.config.get("sliding_window")
    if family in GEMMA_PERIODS:
        period = _gemma_period(spec)
        entries = {"attention.sliding_window": window or 4096}
        if period != GEMMA_PERIODS[family]:
            entries["attention.sliding_window_pattern"] = period
        return entries
    if family == "phi3":
        return {"attention.sliding_window": window or 0}
    if family == "mistral" and window:
        return {"attention.sliding_window": window}
    return {}


def model_notes(spec: ModelSpec) -> list[str]:
    """Return where llama.cpp computes a model otherwise than transformers, in sentences."""
    window = spec.config.get("sliding_window")
    if spec.family.model_type in ("mistral", "phi3") and (window or 1e9) < spec.context_length:
        return [
            f"llama.cpp computes this family without its window of {window} tokens: texts longer "
            "than that differ."
        ]
    return []


def rotary_tensors(spec: ModelSpec) -> dict[str, list[float]]:
    """Return the stretched frequencies that GGUF stores as tensors of factors: name -> factors."""
    settings = rotary(spec)[0]
    if settings["rope_type"] == "llama3":
        theta, size = settings["rope_theta"], spec.head_dim
        frequencies = [theta ** (-2 * index / size) for index in range(size // 2)]
        return {FACTORS: llama3_factors(frequencies, settings)}
    if settings["rope_type"] == "longrope":
        return {LONG: settings["long_factor"], SHORT: settings["short_factor"]}
    return {}


def stored_names(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Yield (module in the checkpoint, name in the file, both without ``.weight``) in the order of
    the file. Biases follow their weights.
    """
    family, (_, architecture) = spec.family, architecture_of(spec)
    yield family.embeddings, "token_embd"
    for block in range(spec.blocks):
        for part, module in architecture.parts.items():
            yield f"{family.blocks}.{block}.{module}", f"blk.{block}.{part}"
    yield family.final_norm, "output_norm"
    if not spec.tied:
        yield family.head, "output"

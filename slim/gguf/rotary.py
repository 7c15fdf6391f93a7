"""The settings of rotary embeddings from a GGUF file.

Most are numbers in the metadata. Two kinds of stretched frequencies are stored as tensors of
factors by which each frequency is divided: Phi-3's (two lists, which transformers takes as they
are), and Llama 3's, which transformers computes from four settings.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from slim.core.errors import SlimError

if TYPE_CHECKING:
    from slim.gguf.reader import GgufModel

FACTORS = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# llama.cpp's defaults; the second is for Gemma 3's blocks with windows.
THETA, LOCAL_THETA = 10000.0, 10000.0
TOLERANCE = 1e-4  # between factors as stored and as computed again; they are stored in float32
# The settings of all published models of Llama 3.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def rotary_settings(model: GgufModel, prefix: str, config: dict) -> dict:
    """Return the entry ``rope_parameters`` of ``config.json``.

    Args:
        model: The file.
        prefix: Its architecture, with which its keys begin.
        config: The config so far.

    Raises:
        SlimError: A kind of scaling that transformers' model does not compute, or factors that no
            settings give.
    """
    get = lambda key, default=None: model.metadata.get(f"{prefix}.rope.{key}", default)  # noqa: E731
    settings = {"rope_theta": shortest(get("freq_base", THETA)), **_scaling(model, get, config)}
    share = get("dimension_count", config["head_dim"]) / config["head_dim"]
    if config["model_type"] == "phi3":
        settings["partial_rotary_factor"] = share
    elif share != 1:
        raise SlimError(
            f"{model.path}: only part of each head is rotated, which transformers' {prefix} does "
            "not foresee."
        )
    if config["model_type"] != "gemma3_text":
        return settings
    local = {"rope_type": "default", "rope_theta": shortest(get("freq_base_swa", LOCAL_THETA))}
    return {"full_attention": settings, "sliding_attention": local}


def _scaling(model: GgufModel, get, config: dict) -> dict:
    """Return the kind of scaling and its settings."""
    if LONG in model.tensors:
        return _longrope(model, get, config)
    if FACTORS in model.tensors:
        return llama3_settings(model, get("freq_base", THETA), config["head_dim"])
    kind, factor = get("scaling.type", "none"), get("scaling.factor") or get("scale_linear")
    if kind == "none" and get("scaling.type") is None and factor:
        kind = "linear"  # files from before the kind was stored
    if kind == "none" or (kind == "linear" and factor in (None, 1.0)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": shortest(factor)}
    if kind == "yarn" and factor and get("scaling.yarn_log_multiplier") is None:
        return _yarn(get, shortest(factor), config)
    raise SlimError(
        f"{model.path}: rotary scaling '{kind}' cannot be imported. slim imports none, linear, "
        "yarn and llama3."
    )


def _yarn(get, factor: float, config: dict) -> dict:
    original = get("scaling.original_context_length", config["max_position_embeddings"])
    settings = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    names = {
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "attention_factor": "attn_factor",
    }
    given = {name: get(f"scaling.{key}") for name, key in names.items()}
    return settings | {name: shortest(value) for name, value in given.items() if value is not None}


def _longrope(model: GgufModel, get, config: dict) -> dict:
    """Return Phi-3's settings: a factor per frequency, one list for short texts and one for long
    ones.
    """
    if config["model_type"] != "phi3" or SHORT not in model.tensors:
        raise SlimError(f"{model.path}: {LONG} is imported for phi3 only, together with {SHORT}.")
    original = get("scaling.original_context_length", config["max_position_embeddings"])
    settings = {
        "rope_type": "longrope",
        "long_factor": factors(model, LONG),
        "short_factor": factors(model, SHORT),
        "original_max_position_embeddings": original,
        "factor": config["max_position_embeddings"] / original,
    }
    stored = get("scaling.attn_factor")
    usual = 1.0
    if settings["factor"] > 1:
        usual = math.sqrt(1 + math.log(settings["factor"]) / math.log(original))
    # The usual factor is left to transformers, which computes it unrounded.
    if stored is not None and abs(stored - usual) > TOLERANCE:
        settings["attention_factor"] = shortest(stored)
    return settings


def factors(model: GgufModel, name: str) -> list[float]:
    """Return a tensor of factors as a list."""
    import torch

    return [shortest(value) for value in model.read(name, torch.float32).flatten().tolist()]


def llama3_settings(model: GgufModel, theta: float, head_dim: int) -> dict:
    """Return the settings from which Llama 3's factors were computed.

    With L the original length, the frequency f makes x = L f / (2 pi) turns within L. Above
    ``high`` turns f stays as it is (factor 1), below ``low`` turns it is divided by ``factor``.
    Between them, the reciprocal of what f is divided by is a straight line in x, from 1 / factor to
    1. Only L / low and L / high matter, so ``low`` is 1 without loss.

    Args:
        model: The file with the tensor ``rope_freqs.weight``, (head_dim / 2,).
        theta: The base of the frequencies: theta ** (-2 i / head_dim).
        head_dim: Size of a head.

    Raises:
        SlimError: No settings give these factors.

    Source:
        transformers, ``modeling_rope_utils._compute_llama3_parameters``; llama.cpp,
        ``convert_hf_to_gguf.py``.
    """
    stored = factors(model, FACTORS)
    frequencies = [theta ** (-2 * index / head_dim) for index in range(len(stored))]
    if all(abs(value - 1) < TOLERANCE for value in stored):
        return {"rope_type": "default"}
    guesses = [{"rope_type": "llama3", "factor": round(max(stored), 4), **LLAMA3}]
    guesses += _solve_llama3(frequencies, stored)
    for guess in guesses:
        computed = llama3_factors(frequencies, guess)
        pairs = zip(computed, stored, strict=True)
        if all(abs(one - other) <= TOLERANCE * other for one, other in pairs):
            return guess
    raise SlimError(
        f"{model.path}: its {FACTORS} are not those of a Llama 3 model, and transformers has no "
        "settings for them. "
        "Give the model as a checkpoint folder or hub id."
    )


def _solve_llama3(frequencies: list[float], stored: list[float]) -> list[dict]:
    """Return the settings on whose straight line the middle range's first and last frequency lie,
    or nothing.
    """
    factor = max(stored)
    middle = [
        index
        for index, value in enumerate(stored)
        if 1 + TOLERANCE < value < factor * (1 - TOLERANCE)
    ]
    if len(middle) < 2:
        return []
    first, last = middle[0], middle[-1]
    # Share of the way from 1 / factor to 1 at both: 1 at x = high, 0 at x = low.
    shares = [(1 / stored[index] - 1 / factor) / (1 - 1 / factor) for index in (first, last)]
    slope = (shares[0] - shares[1]) / (frequencies[first] - frequencies[last])
    zero = frequencies[last] - shares[1] / slope  # the frequency with x = low
    if slope <= 0 or zero <= 0:
        return []
    length = round(2 * math.pi / zero)
    high = round(1 + 1 / (slope * zero), 3)
    found = {
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    return [{"rope_type": "llama3", "factor": round(factor, 4), **found}]


def llama3_factors(frequencies: list[float], settings: dict) -> list[float]:
    """Return what each frequency is divided by, from the settings (the straight line of
    :func:`llama3_settings`).
    """
    low, high, factor = (
        settings[name] for name in ("low_freq_factor", "high_freq_factor", "factor")
    )
    result = []
    for frequency in frequencies:
        turns = settings["original_max_position_embeddings"] * frequency / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))
        result.append(1 / (share + (1 - share) / factor))
    return result


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same in float32: 1e-05 for 9.999999747378752e-06."""
    import numpy

    return float(str(numpy.float32(value)))

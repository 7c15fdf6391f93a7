"""Writes transformers models as GGUF, with the ``gguf`` library's writer and its own map of names.

Nothing of slim's is used: what llama.cpp's ``convert_hf_to_gguf.py`` changes is done here in its
direction.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy
import torch
from transformers import AutoConfig, AutoModelForCausalLM

ASSETS = Path(__file__).parents[2] / "slim" / "assets" / "tiny"
SIZES = dict(
    vocab_size=1536,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=1,
    rms_norm_eps=1e-5,
)
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
}  # where GGUF names a family in another way
KINDS = {"normal": 1, "unknown": 2, "control": 3, "user": 4, "unused": 5, "byte": 6}


def random_model(family: str, **changes):
    """A random model of a family in float32, with norms and biases that are not what they are when
    made.
    """
    config = AutoConfig.for_model(family, **{**SIZES, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(4)  # the default is so small that blocks hardly matter
            elif name.endswith("bias"):
                weight.normal_(generator=generator)
            else:  # what the norm multiplies by is positive; Gemma stores one less
                weight.copy_(
                    (torch.randn(weight.shape, generator=generator) / 2).exp()
                    - int("gemma" in family)
                )
    return model


def tiny_tokenizer(rule: str = "gpt-2") -> dict:
    """The metadata of the embedded model's byte-level tokenizer."""
    content = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    marks = {token["content"] for token in content["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    return {
        "model": "gpt2",
        "pre": rule,
        "tokens": tokens,
        "token_type": [KINDS["control" if token in marks else "normal"] for token in tokens],
        "merges": [
            " ".join(pair) if isinstance(pair, list) else pair
            for pair in content["model"]["merges"]
        ],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "padding_token_id": 1,
        "add_bos_token": False,
    }


def permuted(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """The order of rows in which llama.cpp rotates queries and keys (``LlamaModel.permute`` in its
    converter).
    """
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def stored_tensors(model) -> dict[str, numpy.ndarray]:
    """The tensors of a model under their names in GGUF, changed as llama.cpp changes them."""
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if architecture == "llama" and ".q_proj." in name:
            values = permuted(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            values = permuted(values, config.num_key_value_heads)
        if "gemma" in architecture and name.endswith("norm.weight"):
            values = values + 1
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = numpy.ascontiguousarray(
            values
        )
    return tensors


def metadata_of(model) -> dict:
    """The entries of a model's metadata that begin with the architecture's name."""
    config = model.config
    entries = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.sliding_window": getattr(config, "sliding_window", None)
        if config.model_type in WINDOWED
        else None,
        "attn_logit_softcapping": getattr(config, "attn_logit_softcapping", None),
        "final_logit_softcapping": getattr(config, "final_logit_softcapping", None),
    }
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    entries["rope.freq_base"] = float(rope["rope_theta"])
    if config.model_type in ("llama", "mistral", "phi3"):
        size = (
            config.hidden_size // config.num_attention_heads
            if config.model_type == "phi3"
            else config.head_dim
        )
        entries["rope.dimension_count"] = int(size * rope.get("partial_rotary_factor", 1))
    if rope["rope_type"] in ("linear", "yarn"):
        entries["rope.scaling.type"] = rope["rope_type"]
        entries["rope.scaling.factor"] = float(rope["factor"])
    if "original_max_position_embeddings" in rope and rope["rope_type"] != "llama3":
        entries["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return {key: value for key, value in entries.items() if value is not None}


WINDOWED = ("gemma2", "gemma3_text", "phi3", "mistral")


def rotary_tensors(model) -> dict[str, numpy.ndarray]:
    """The factors of stretched frequencies that llama.cpp stores as tensors."""
    rope = model.config.rope_parameters
    if rope.get("rope_type") == "llama3":
        size = model.config.head_dim
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        return {"rope_freqs.weight": (plain / model.model.rotary_emb.inv_freq).numpy()}
    if rope.get("rope_type") == "longrope":
        return {
            f"rope_factors_{kind}.weight": numpy.float32(rope[f"{kind}_factor"])
            for kind in ("long", "short")
        }
    return {}


def write_gguf(
    model, path: Path, kind: str = "F32", tokenizer: dict | None = None, endianess=None, **changes
) -> Path:
    """Write a model.

    Args:
        model: Of transformers.
        path: The file.
        kind: Type of matrices; others are in float32.
        tokenizer: Metadata without ``tokenizer.ggml.``; None: that of the embedded model, {}: none.
        endianess: Order of bytes.
        changes: Metadata to add or replace, with ``__`` for dots; None removes an entry.
    """
    architecture = ARCHITECTURES.get(model.config.model_type, model.config.model_type)
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess or gguf.GGUFEndian.LITTLE)
    tokenizer = tiny_tokenizer() if tokenizer is None else tokenizer
    entries = {f"{architecture}.{key}": value for key, value in metadata_of(model).items()}
    entries |= {f"tokenizer.ggml.{key}": value for key, value in tokenizer.items()}
    entries |= {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in entries.items():
        add_entry(writer, key, value)
    for name, values in {**stored_tensors(model), **rotary_tensors(model)}.items():
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    close(writer)
    return path


def add_entry(writer: gguf.GGUFWriter, key: str, value) -> None:
    """Add a metadata entry in the type that llama.cpp gives it."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def close(writer: gguf.GGUFWriter) -> None:
    """Write everything."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama3_factors(
    size: int, theta: float, factor: float, low: float, high: float, length: int
) -> list[float]:
    """Llama 3's factors, frequency by frequency as in llama.cpp's converter."""
    result = []
    for index in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (index / size)
        if wavelength < length / high:
            result.append(1.0)
        elif wavelength > length / low:
            result.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            result.append(1 / ((1 - smooth) / factor + smooth))
    return result

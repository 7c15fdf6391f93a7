"""How a checkpoint can be loaded, told from its config alone: with slim, transformers and vLLM.
Says what was not tried.

The facts are those of docs/formats.md (what was tried with which versions),
docs/methods/bitsandbytes.md and width.md."""

from __future__ import annotations

from dataclasses import dataclass

from slim.models.spec import ADAPTER

NOT_TRIED = "It was not tried."
PLAIN = 'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")'
DEQUANTIZED = (
    "config = CompressedTensorsConfig(dequantize=True)\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER", quantization_config=config)'
)


@dataclass(frozen=True)
class Loading:
    """Sentences on transformers and vLLM; ``code`` for transformers, None where it cannot load the
    folder."""

    transformers: str
    code: str | None
    vllm: str


def loading(config: dict) -> Loading:
    """Return how a folder with this ``config.json`` is loaded."""
    if config.get(ADAPTER) is not None:
        return _with_adapter()
    found = _by_format(config.get("quantization_config"))
    if config.get("per_layer_config"):
        return _unequal(found, config.get("quantization_config"))
    return found


def _by_format(quantization: dict | None) -> Loading:
    if quantization is None:
        return Loading(
            "As any model.",
            _code(PLAIN),
            f"`vllm serve FOLDER`: the weights are plain. {NOT_TRIED}",
        )
    method = quantization.get("quant_method")
    known = {
        "compressed-tensors": _compressed_tensors,
        "gptq": _gptq,
        "awq": _awq,
        "bitsandbytes": _bitsandbytes,
        "gguf": _gguf,
    }
    if method in known:
        return known[method](quantization)
    return Loading(
        f"The format {method} is not one of slim's; see its own documentation.", None, NOT_TRIED
    )


def _code(line: str, imported: str = "", first: str = "") -> str:
    names = ", ".join(sorted(filter(None, ("AutoModelForCausalLM", "AutoTokenizer", imported))))
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    return f"{first}from transformers import {names}\n\n{line}\n{tokenizer}"


def _compressed_tensors(quantization: dict) -> Loading:
    groups = list(quantization.get("config_groups", {}).values())
    schemes = [group["weights"] for group in groups]
    symmetric, several = all(scheme.get("symmetric", True) for scheme in schemes), len(groups) > 1
    embedding = any(
        "embed_tokens" in target for group in groups for target in group.get("targets", [])
    )
    bits = {scheme.get("num_bits") for scheme in schemes}
    served = f"`vllm serve FOLDER` is documented for 4 and 8 bits on a symmetric grid. {NOT_TRIED}"
    vllm = served if symmetric and bits <= {4, 8} else f"Not documented for this grid. {NOT_TRIED}"
    if any(scheme.get("actorder") == "group" for scheme in schemes):
        return Loading(
            "No: compressed-tensors no longer reads groups in activation order.", None, vllm
        )
    if symmetric and not embedding:
        return Loading("With `compressed-tensors` installed.", _code(PLAIN), vllm)
    if several:
        asymmetric, embedding = (
            "an asymmetric grid that differs by layer",
            "a quantised embedding next to layers of other settings",
        )
        reason = embedding if symmetric else asymmetric
        return Loading(f"No: it cannot read {reason}. Use slim.", None, vllm)
    needed = (
        "With `compressed-tensors` installed, and `dequantize=True`: it cannot run such a grid "
        "packed."
    )
    return Loading(needed, _code(DEQUANTIZED, "CompressedTensorsConfig"), vllm)


def _gptq(quantization: dict) -> Loading:
    symmetric, bits = quantization.get("sym", True), quantization.get("bits")
    documented = symmetric and bits in (4, 8)
    vllm = f"`vllm serve FOLDER` is documented for 4 and 8 bits on a symmetric grid. {NOT_TRIED}"
    needed = (
        "With `gptqmodel` and `optimum` installed, which want an environment of their own (a "
        "newer torch)."
    )
    return Loading(
        needed, _code(PLAIN), vllm if documented else f"Not documented for this grid. {NOT_TRIED}"
    )


def _awq(quantization: dict) -> Loading:
    needed = "With `gptqmodel` installed, which wants an environment of its own (a newer torch)."
    return Loading(needed, _code(PLAIN), f"`vllm serve FOLDER` is documented for AWQ. {NOT_TRIED}")


def _bitsandbytes(quantization: dict) -> Loading:
    return Loading("With `bitsandbytes` and `accelerate` installed.", _code(PLAIN), NOT_TRIED)


def _gguf(quantization: dict) -> Loading:
    line = 'model = AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="model.gguf")'
    text = (
        "With `gguf` installed; weights are dequantized. `model.gguf` is for engines: "
        "`llama-cli -m FOLDER/model.gguf`, or `ollama create NAME -f FOLDER/Modelfile`."
    )
    return Loading(text, _code(line), NOT_TRIED)


def _unequal(found: Loading, quantization: dict | None) -> Loading:
    """Blocks of unequal sizes: transformers builds them only once slim is imported."""
    text = (
        "The sizes of every block are in `config.json` under `per_layer_config`. The model "
        "classes of transformers do not read "
        "them yet; with slim imported they do. Without it loading ends with an error, never with "
        "wrong weights."
    )
    tried = quantization is None or quantization.get("quant_method") == "compressed-tensors"
    said = [text, *([found.transformers] if quantization else []), *([] if tried else [NOT_TRIED])]
    code = None if found.code is None else "import slim\n" + found.code
    return Loading(" ".join(said), code, "No: its model classes build all blocks alike.")


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

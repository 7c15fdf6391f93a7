"""Quantizes with llm-compressor: GPTQ, AWQ or rounding to nearest, saved packed.

Settings: modifier, bits, group_size, symmetric, and the modifier's own under "options". The samples
go to ``oneshot`` in their order, one at a time, without padding. All else is the library's default
(GPTQ: static activation order, damping 0.01, blocks of 128; AWQ: 20 grid points, duo_scaling "both"
as its documentation shows)."""

import contract

contract.report_bars()

import sys  # noqa: E402

import torch  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: E402
from loguru import logger  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def recipe(settings):
    """Return the modifiers for all linear layers but the head."""
    group = settings["group_size"]
    weights = QuantizationArgs(
        num_bits=settings["bits"],
        type="int",
        symmetric=settings["symmetric"],
        strategy="channel" if group == -1 else "group",
        group_size=None if group == -1 else group,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    schemes = {"config_groups": groups, "ignore": ["lm_head"]}
    options = settings["options"]
    if settings["modifier"] == "gptq":
        return [GPTQModifier(**schemes, **options)]
    if settings["modifier"] == "awq":
        options = {"duo_scaling": "both", **options}
        return [AWQModifier(**options), QuantizationModifier(**schemes)]
    return [QuantizationModifier(**schemes, **options)]


def samples(request):
    """Return the calibration tokens, a sample at a time, as the model's keyword arguments."""
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row)}
        for row in contract.tokens(request)
    ]
    return DataLoader(rows, batch_size=1)


def main():
    request = contract.read_request()
    settings = request["settings"]
    logger.remove()
    logger.add(sys.stderr, level="INFO")
    torch.manual_seed(request["seed"])
    if settings["modifier"] == "awq" and not torch.accelerator.is_available():
        # 0.14 pins memory for copies to a GPU and fails where there is none
        IntermediatesCache.pin_memory = lambda *_: None
        contract.note(
            "llm-compressor's AWQ pins host memory and fails without an accelerator: pinning is "
            "left out here, which changes no result."
        )
    model = AutoModelForCausalLM.from_pretrained(
        request["source"], dtype="auto", local_files_only=True
    )
    data = {}
    if request["calibration"] is not None:
        loader = samples(request)
        data = {"dataset": loader, "num_calibration_samples": len(loader.dataset)}
    with contract.Stopwatch():
        oneshot(model=model, recipe=recipe(settings), **data)
    model.save_pretrained(request["target"], save_compressed=True)
    contract.packages("llmcompressor", "compressed-tensors", "torch", "transformers")
    contract.done()


if __name__ == "__main__":
    main()

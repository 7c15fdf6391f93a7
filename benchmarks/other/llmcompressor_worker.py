"""Quantise a checkpoint with llm-compressor and print how long it took, as JSON. Runs in
llm-compressor's environment.

    PYTHON benchmarks/other/llmcompressor_worker.py MODEL TOKENS.safetensors OUT --method gptq
    --bits 4 --group 128

TOKENS holds int64 [samples, length] under "tokens"; the samples are given to ``oneshot`` in their
order, without padding. The result is saved packed (compressed-tensors, pack-quantized), so that one
loader measures both sides. Settings are the library's own defaults (GPTQ: static activation order,
damping 0.01, blocks of 128; AWQ: 20 grid points, duo_scaling="both" as its documentation shows),
but for bits, group and symmetry. Needs nothing of slim.

Its AWQ pins memory for copies to a GPU and fails where there is none (0.14.0.1); there pinning is
left out, which changes no result."""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def recipe(method: str, bits: int, group: int, symmetric: bool) -> list:
    """Return the modifiers for linear layers but the head. group: weights per scale."""
    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=group
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    settings = {"config_groups": groups, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**settings)]
    if method == "awq":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**settings)]
    return [QuantizationModifier(**settings)]


def samples(path: Path, batch: int) -> DataLoader:
    """Return the calibration tokens in batches of ``batch`` samples, as the model's keyword
    arguments."""
    rows = load_file(path)["tokens"]
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    return DataLoader(data, batch_size=batch)


def main() -> None:
    """Load, quantise (timed), save."""
    parser = argparse.ArgumentParser(
        spec=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument(
        "--batch", type=int, default=1, help="samples per forward; 1 is the library's default"
    )
    parser.add_argument(
        "--dtype", default="auto", help="type the model is loaded in; auto: the stored one"
    )
    options = parser.parse_args()
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None
    logger.remove()
    logger.add(sys.stderr, level="WARNING")

    model = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=options.dtype, local_files_only=True
    )
    loader = samples(options.tokens, options.batch)
    steps = recipe(options.method, options.bits, options.group, options.symmetric)
    start = time.perf_counter()
    oneshot(model=model, dataset=loader, recipe=steps, num_calibration_samples=len(loader.dataset))
    seconds = time.perf_counter() - start

    model.save_pretrained(options.out, save_compressed=True)
    AutoTokenizer.from_pretrained(options.model, local_files_only=True).save_pretrained(options.out)
    facts = {
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    print(json.dumps(facts | {"versions": {name: version(name) for name in PACKAGES}}))


if __name__ == "__main__":
    main()

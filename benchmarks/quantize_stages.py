"""What the quantisation benchmarks share: stages by name, runs in a process of their own, and what
a run took."""

from __future__ import annotations

import importlib
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from slim.checkpoints.stage import Context, Stage
from slim.evaluation.memory import process_bytes, release, reset_process_peak

TOKENS = "tokens"  # name of the int64 tensor [samples, length] in a file of calibration tokens


@dataclass
class Run:
    """Seconds of a stage, reading and writing included; its peak of resident memory over the
    imported libraries', in bytes; and its facts."""

    seconds: float
    peak: int
    facts: dict


def make_stage(spec: str, bits: int, group: int, symmetric: bool) -> Stage:
    """Return the stage for a name in ``slim.quantization.methods``, with settings after a colon:
    ``rtn:search=20,bits=3``."""
    name, _, settings = spec.partition(":")
    given = dict(pair.split("=", 1) for pair in settings.split(",") if pair)
    stage = getattr(importlib.import_module(f"slim.quantization.methods.{name}"), name.upper())
    common = {"bits": bits, "group_size": group, "symmetric": symmetric}
    return stage(**common | {key: yaml.safe_load(value) for key, value in given.items()})


def run_stage(
    spec: str, model: Path, tokens_file: Path, target: Path, bits: int, group: int, symmetric: bool
) -> Run:
    """Quantise ``model`` into ``target`` on the tokens in ``tokens_file``. Raises ``SlimError`` as
    the stage does."""
    stage, tokens = make_stage(spec, bits, group, symmetric), load_file(tokens_file)[TOKENS]
    stage.tokens = lambda checkpoint: tokens  # as they are: another tool is given the same
    import_libraries()
    release()
    reset_process_peak()
    before, start = process_bytes("VmRSS"), time.perf_counter()
    facts = stage.run(model, target, Context())
    seconds = time.perf_counter() - start
    return Run(seconds, process_bytes("VmHWM") - before, facts)


def import_libraries() -> None:
    """Import what any run imports, and let the linear algebra library set itself up."""
    importlib.import_module("matplotlib.figure")
    for module in (
        "slim.calibration.sequential",
        "slim.checkpoints.checkpoint",
        "slim.quantization.methods.block_method",
        "slim.core.console",
    ):
        importlib.import_module(module)
    from transformers import AutoModelForCausalLM, LlamaConfig

    AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=8)
    )
    torch.linalg.cholesky(torch.eye(64) @ torch.eye(64))


def in_child(function: Callable, *arguments: Any) -> Any:
    """Call a function of a module in a fresh process and return its result; errors are raised
    here."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def median_run(repeats: int, run: Callable[[], Run]) -> Run:
    """Return the run of median seconds out of ``repeats``, with the largest peak."""
    runs = sorted((run() for _ in range(repeats)), key=lambda item: item.seconds)
    middle = runs[len(runs) // 2]
    return Run(
        statistics.median(item.seconds for item in runs),
        max(item.peak for item in runs),
        middle.facts,
    )

"""slim and llm-compressor side by side: seconds of quantising, perplexity and divergence of the
results."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from quantize_floor import floor
from quantize_quality import Quality, Yardstick
from quantize_stages import TOKENS, in_child, median_run, run_stage
from safetensors.torch import load_file, save_file

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.data.calibration import Calibration

WORKER = Path(__file__).parent / "other" / "llmcompressor_worker.py"
NAMESAKES = ("awq", "gptq")
TIMED = (4, 128)  # bits and group of the timings


def save_calibration(options: argparse.Namespace, folder: Path) -> Path:
    """Write the calibration tokens, int64 [samples, length], and return the file."""
    calibration = Calibration(
        str(options.calibration), samples=options.samples, length=options.length
    )
    context = open_checkpoint(options.model).spec.context_length
    save_file(
        {TOKENS: calibration.tokens(load_tokenizer(options.model), context)},
        folder / "tokens.safetensors",
    )
    return folder / "tokens.safetensors"


class Other:
    """llm-compressor in its own environment, measured by the same yardstick.

    results: folder where its checkpoints and figures stay, so that it need not run again when only
    slim has changed."""

    def __init__(self, python: Path, model: Path, tokens: Path, symmetric: bool, results: Path):
        self.python, self.model, self.tokens, self.symmetric = python, model, tokens, symmetric
        self.results = results
        self.inputs = {
            path.name: sha256(path) for path in (tokens, *open_checkpoint(model).weight_files)
        }
        self.versions: dict[str, str] = {}

    def run(self, method: str, bits: int, group: int, out: Path) -> float:
        """Quantise into ``out`` and return the seconds that took, without loading and saving."""
        command = [
            self.python,
            WORKER,
            self.model,
            self.tokens,
            out,
            "--method",
            method,
            "--bits",
            bits,
            "--group",
            group,
        ]
        command += ["--symmetric"] if self.symmetric else []
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            raise SystemExit(f"{WORKER.name} failed:\n{done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        self.versions = found["versions"]
        return found["seconds"]

    def quality(self, method: str, bits: int, group: int, yardstick: Yardstick) -> Quality:
        """Return the quality of its result; what is in ``results`` for the same inputs is not made
        again."""
        folder = (
            self.results
            / f"llmcompressor-{method}-{bits}-{group}-{'sym' if self.symmetric else 'asym'}"
        )
        figures = folder / "figures.json"
        found = json.loads(figures.read_text()) if figures.is_file() else {}
        if found.get("inputs") != self.inputs:
            self.run(method, bits, group, folder)
            found = {"inputs": self.inputs, "versions": self.versions}
        if found.get("yardstick") != yardstick.cache_key:
            found |= {
                "yardstick": yardstick.cache_key,
                "quality": dataclasses.asdict(yardstick.measure(folder)),
            }
        figures.write_text(json.dumps(found, indent=1) + "\n")
        self.versions = found["versions"]
        return Quality(**found["quality"])


def ours(
    spec: str,
    options: argparse.Namespace,
    tokens: Path,
    bits: int,
    group: int,
    yardstick: Yardstick,
) -> Quality | None:
    """Quantise with slim and measure; None where the method does not go with the setting."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            in_child(
                run_stage, spec, options.model, tokens, Path(folder), bits, group, options.symmetric
            )
        except SlimError as error:
            print(f"{spec} at {bits} bits, groups of {group}: {error}", flush=True)
            return None
        return yardstick.measure(Path(folder))


def times(options: argparse.Namespace, tokens: Path, other: Other | None) -> None:
    """Print medians of seconds at 4 bits, groups of 128, the tools taking turns, and their
    ratios."""
    shape = load_file(tokens)[TOKENS].shape
    least = in_child(floor, options.model, tuple(shape))
    print(f"\nSeconds, median of {options.repeats}, {torch.get_num_threads()} threads, {shape[0]} x {shape[1]} tokens, "
          f"4 bits, groups of 128. slim's include reading and writing the checkpoint, llm-compressor's do not.\n"
          f"Floor of one pass: {least}.\n")  # fmt: skip
    print(
        "| method | llm-compressor | slim | slim / llm-compressor | slim / floor |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for spec in options.ours:
        theirs, mine = [], []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                if other and spec in NAMESAKES:
                    theirs.append(other.run(spec, *TIMED, Path(folder) / "theirs"))
                (Path(folder) / "ours").mkdir()
                arguments = (
                    spec,
                    options.model,
                    tokens,
                    Path(folder) / "ours",
                    *TIMED,
                    options.symmetric,
                )
                mine.append(in_child(run_stage, *arguments))
        seconds = median_run(len(mine), iter(mine).__next__).seconds
        other_seconds = statistics.median(theirs) if theirs else float("nan")
        print(f"| {spec} | {other_seconds:.1f} | {seconds:.2f} | {seconds / other_seconds:.3f} | "
              f"{seconds / least.total:.2f} |", flush=True)  # fmt: skip


def qualities(options: argparse.Namespace, tokens: Path, other: Other | None) -> None:
    """Print perplexity and divergence over bits and groups, and where slim's are above the other
    tool's."""
    yardstick = Yardstick(
        options.model, options.test, options.length, options.windows, options.compared
    )
    count, length = yardstick.windows.shape
    plain = yardstick.measure_model(yardstick.reference).perplexity
    print(f"\nPerplexity on {count} windows of {length} tokens / divergence from the unquantised model in nats per token "
          f"on {yardstick.compared} of them. Unquantised: {plain:.3f}.\n")  # fmt: skip
    others = [f"llm-compressor {name}" for name in NAMESAKES] if other else []
    names = [*others, *(f"slim {spec}" for spec in options.ours)]
    print(
        f"| bits | group | {' | '.join(names)} |\n| ---: | ---: |{' ---: |' * len(names)}",
        flush=True,
    )
    verdicts = []
    for bits in options.bits:
        for group in options.groups:
            found = {
                f"llm-compressor {name}": other.quality(name, bits, group, yardstick)
                for name in NAMESAKES
                if other
            }
            found |= {
                f"slim {spec}": ours(spec, options, tokens, bits, group, yardstick)
                for spec in options.ours
            }
            cells = [
                f"{item.perplexity:.2f} / {item.divergence:.4f}" if item else "-"
                for item in found.values()
            ]
            print(f"| {bits} | {group} | {' | '.join(cells)} |", flush=True)
            verdicts += compared(bits, group, found) if other else []
    print("\n" + "\n".join(verdicts))


def compared(bits: int, group: int, found: dict[str, Quality | None]) -> list[str]:
    """Return a sentence per method with a namesake, and one for the best of ours against the best
    of the others."""
    perplexity = {name: item.perplexity for name, item in found.items() if item}
    lines = []
    for name in NAMESAKES:
        mine, theirs = perplexity.get(f"slim {name}"), perplexity[f"llm-compressor {name}"]
        if mine is not None:
            lines.append(
                f"- {bits} bits, group {group}, {name}: {mine / theirs:.4f} of llm-compressor's perplexity"
            )
    slims, others = (
        [item for item in perplexity.items() if item[0].startswith(side)]
        for side in ("slim", "llm")
    )
    best, least = min(slims, key=lambda item: item[1]), min(others, key=lambda item: item[1])
    lines.append(
        f"- {bits} bits, group {group}, best: {best[0]} {best[1] / least[1]:.4f} of {least[0]}"
    )
    return lines


def compare(options: argparse.Namespace) -> None:
    """Print times, perplexities, ratios and versions as Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, other = save_calibration(options, Path(folder)), None
        if options.other_python:
            other = Other(
                options.other_python,
                options.model,
                tokens,
                options.symmetric,
                options.results or Path(folder),
            )
        print(f"{options.model}, {'symmetric' if options.symmetric else 'asymmetric'} grids; slim's side: "
              f"torch {version('torch')}, transformers {version('transformers')}")  # fmt: skip
        if options.repeats:
            times(options, tokens, other)
        if options.bits:
            qualities(options, tokens, other)
        if other:
            print(
                "\nllm-compressor's side: "
                + ", ".join(f"{name} {number}" for name, number in other.versions.items())
            )

"""KL and size of SmolLM2 in llama.cpp's types: by slim, and by llama.cpp's own quantizer with and without an importance matrix.

    python benchmarks/gguf_types.py --engine FOLDER --calibration TEXT --test TEXT
    python benchmarks/gguf_types.py --engine FOLDER --calibration TEXT --test TEXT --model FOLDER Q4_K_M Q2_K

FOLDER of ``--engine`` is where ``npm install node-llama-cpp@3 --ignore-scripts`` ran; llama.cpp's quantizer is called in the library
that came with it. Both get the same calibration text: slim its tokens, llama.cpp the mean squares of every layer's
inputs for them, as its importance matrix holds. Every file is read back by slim and computed in float32, so that only the weights differ.
About four minutes for each type on two cores, nearly all of it slim's. Files are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy
import torch
from engines import made
from gguf import LlamaFileType

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.data.calibration import Calibration
from slim.gguf.metadata import stored_names
from slim.gguf.quantizer import Gguf
from slim.gguf.sources import packaged_smollm2
from slim.gguf.stage import ImportGguf
from slim.loading.load_model import load_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.llama_quantize import quantize  # noqa: E402 - the path comes first

TYPES = ("Q4_K_M", "Q3_K_M", "Q2_K")
CHARACTERS = 2_000_000  # of the test text, from which windows are taken at equal distances


def windows_of(tokenizer, text: Path, count: int, length: int) -> torch.Tensor:
    """Return int64 [count, length], spread over the text."""
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8")[:CHARACTERS]).input_ids)
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


@torch.no_grad()
def importance(model, folder: Path, calibration: Calibration) -> dict[str, numpy.ndarray]:
    """Return the mean squares of the inputs of every linear layer in the blocks, by GGUF's name."""
    spec = open_checkpoint(folder).spec
    names = dict(stored_names(spec))
    squares: dict[str, torch.Tensor] = {}

    def add_to(name: str):
        def hook(module, inputs):
            total = inputs[0].flatten(0, -2).double().square().sum(0)
            squares[name] = squares.get(name, 0) + total

        return hook

    handles = [
        module.register_forward_pre_hook(add_to(f"{names[name]}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(spec.family.blocks)
    ]
    tokens = calibration.tokens(load_tokenizer(folder), spec.context_length)
    for part in tokens.split(4):
        model(part)
    for handle in handles:
        handle.remove()
    count = tokens.numel()
    return {name: (total / count).float().numpy() for name, total in squares.items()}


@torch.no_grad()
def compared(folder: Path, source, windows: torch.Tensor) -> tuple[float, float]:
    """Return the mean KL(source, checkpoint) per token in nats, and the checkpoint's perplexity."""
    model = load_model(folder, "float32")
    divergences, losses = [], []
    for window in windows.unsqueeze(1):
        reference = source(window).logits[0].log_softmax(-1)
        predicted = model(window).logits[0].log_softmax(-1)
        divergences.append((reference.exp() * (reference - predicted)).sum(-1))
        losses.append(-predicted[:-1].gather(1, window[0, 1:, None]))
    return torch.cat(divergences).mean().item(), torch.cat(losses).mean().exp().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", default=TYPES)
    parser.add_argument("--engine", type=Path, required=True, help="folder of node-llama-cpp")
    parser.add_argument("--calibration", required=True, help="text file")
    parser.add_argument("--test", type=Path, required=True, help="text file")
    parser.add_argument("--model", type=Path, help="another checkpoint than SmolLM2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens")
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmark_gguf_types")
    given = parser.parse_args()
    work = given.work / (given.model.name if given.model else "smollm2")
    work.mkdir(parents=True, exist_ok=True)
    plain = given.model or made(ImportGguf(packaged_smollm2(), "bfloat16"), None, work, "plain")
    calibration = Calibration(given.calibration, samples=given.samples, length=given.length)
    source = load_model(plain, "float32")
    windows = windows_of(load_tokenizer(plain), given.test, given.windows, 512)
    full = made(Gguf("BF16"), plain, work, "BF16") / "model.gguf"
    inputs = importance(source, plain, calibration)
    print("| type | quantizer | KL | perplexity | bytes | seconds |", flush=True)
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)

    def row(name: str, quantizer: str, folder: Path, file: Path, seconds: float) -> None:
        kl, perplexity = compared(folder, source, windows)
        size = f"{file.stat().st_size:,}"
        print(
            f"| {name} | {quantizer} | {kl:.4f} | {perplexity:.3f} | {size} | {seconds:.0f} |",
            flush=True,
        )

    row("BF16", "none", plain, full, 0)
    for name in given.types:
        number = LlamaFileType[f"MOSTLY_{name}"].value
        for label, matrix in (("llama.cpp", None), ("llama.cpp, importance matrix", inputs)):
            file = work / f"{name}{'-importance' if matrix else ''}.gguf"
            start = time.perf_counter()
            quantize(given.engine, full, file, number, matrix)
            seconds = time.perf_counter() - start
            row(
                name, label, made(ImportGguf(file, "float32"), None, work, file.stem), file, seconds
            )
        start = time.perf_counter()
        folder = made(Gguf(name, calibration=calibration), plain, work, f"slim {name}")
        row(name, "slim", folder, folder / "model.gguf", time.perf_counter() - start)


if __name__ == "__main__":
    main()

"""Time and perplexity of quantisation, and the time of packed layers.

    python benchmarks/quantize.py MODEL CALIBRATION_TEXT TEST_TEXT [--samples 128] [--length 256] [--windows 200]
    python benchmarks/quantize.py kernels

The first prints the time of one forward over the calibration tokens, then time, perplexity and size for RTN and AWQ at
4, 3 and 2 bits. The second prints how long a layer of 2048 x 5632 takes packed and dense, by number of rows: where the
int4 kernel loses to unpacking is the threshold in slim/quantization/linear.py. OMP_NUM_THREADS sets the cores.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slim.checkpoint import load_model, load_tokenizer, open_checkpoint
from slim.data.calibration import Calibration
from slim.quantization import linear
from slim.quantization.awq import AWQ
from slim.quantization.linear import QuantLinear
from slim.quantization.rtn import RTN
from slim.quantization.scheme import Scheme
from slim.stage import Context

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 256, 1024)


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    """Token perplexity over windows [n, length], each by itself."""
    model, total = load_model(folder, "float32"), 0.0
    with torch.no_grad():
        for batch in windows.split(16):
            total += model(batch, labels=batch).loss.double().item() * len(batch)
    return math.exp(total / len(windows))


def forward_seconds(folder: Path, tokens: torch.Tensor) -> float:
    """Time of one forward of the decoder over all tokens, head left out."""
    model = load_model(folder, "float32").model
    with torch.no_grad():
        model(tokens[:8])
        start = time.perf_counter()
        for batch in tokens.split(16):
            model(batch, use_cache=False)
    return time.perf_counter() - start


def table(options: argparse.Namespace) -> None:
    calibration = Calibration(text=str(options.calibration), samples=options.samples, length=options.length)
    tokenizer = load_tokenizer(options.model)
    tokens = calibration.tokens(tokenizer, open_checkpoint(options.model).description.context_length)
    ids = torch.tensor(tokenizer(options.test.read_text(encoding="utf-8"), verbose=False)["input_ids"])
    count = min(options.windows, len(ids) // options.length)
    windows = ids[: count * options.length].view(count, options.length)
    samples, length = tokens.shape
    print(f"{samples} x {length} calibration tokens, {count} test windows, {torch.get_num_threads()} threads")
    print(f"one forward over the calibration tokens: {forward_seconds(options.model, tokens):.1f} s")
    print(f"{'method':8} {'bits':>4} {'seconds':>8} {'perplexity':>11} {'bits/weight':>12}")
    print(f"{'none':8} {'':4} {'':8} {perplexity(options.model, windows):11.3f}")
    for bits in (4, 3, 2):
        for stage in (RTN(bits), RTN(bits, search=20), AWQ(bits, calibration=calibration)):
            with tempfile.TemporaryDirectory() as folder:
                start = time.perf_counter()
                facts = stage.run(options.model, Path(folder), Context())
                seconds = time.perf_counter() - start
                name = "rtn+" if getattr(stage, "search", 1) > 1 else type(stage).__name__.lower()
                found = perplexity(Path(folder), windows)
                print(f"{name:8} {bits:4} {seconds:8.1f} {found:11.3f} {facts['bits_per_weight']:12.3f}", flush=True)
    print("rtn+: search=20")


def best_ms(function: Callable[[], object], repeats: int = 15) -> float:
    """Return the shortest of ``repeats`` times in milliseconds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def kernels() -> None:
    inputs, outputs = 2048, 5632
    layer = QuantLinear(inputs, outputs, Scheme(4, 128, False), torch.bfloat16)
    layer.packed = torch.randint(-(2**31), 2**31 - 1, layer.packed.shape, dtype=torch.int32)
    layer.choose_kernel()
    dense = torch.randn(outputs, inputs).bfloat16()
    print("| rows | int4 kernel | unpack and multiply | dense bfloat16 |\n| ---: | ---: | ---: | ---: |")
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        times = []
        for limit in (max(ROWS), 0):
            linear.KERNEL_ROWS = limit
            times.append(
                best_ms(lambda x=x: layer(x), 5 if rows > 64 else 15) if layer.kernel or not limit else math.nan
            )
        times.append(best_ms(lambda x=x: x @ dense.T))
        print(f"| {rows} | " + " | ".join(f"{value:.2f}" for value in times) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder, or the word kernels")
    parser.add_argument("calibration", type=Path, nargs="?")
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=200)
    options = parser.parse_args()
    if str(options.model) == "kernels":
        kernels()
    elif options.test is None:
        parser.error("give MODEL CALIBRATION_TEXT TEST_TEXT")
    else:
        table(options)


if __name__ == "__main__":
    main()

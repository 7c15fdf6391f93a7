"""Time, memory and perplexity of quantisation, next to llm-compressor's, and the speed of packed
models.

    python benchmarks/quantize.py compare MODEL CALIBRATION_TEXT TEST_TEXT --other-python PATH
    [--ours awq gptq rtn:search=20] python benchmarks/quantize.py table MODEL CALIBRATION_TEXT
    TEST_TEXT python benchmarks/quantize.py memory python benchmarks/quantize.py decode python
    benchmarks/quantize.py kernels

compare: seconds at 4 bits (medians of three), then perplexity over bits and groups, of slim and of
llm-compressor in its own environment (PATH is that environment's python with `pip install
llmcompressor`), on the same calibration tokens and the same machine; prints ratios. Without
--other-python slim alone. table: seconds, perplexity and size of slim's methods.
memory: peak memory and time of GPTQ on a random model of TinyLlama-1.1B's shape, against what must
    be held and done.
decode: tokens per second of that model in 4 bits and plain. kernels: how long a layer of 2048 x
5632 takes packed and dense, by number of rows: where the int4 kernel loses to unpacking is the
threshold in slim/quantization/kernels/linear.py.

OMP_NUM_THREADS sets the cores. Times and memory need an otherwise idle machine; perplexities do
not."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import quantize_compare
import quantize_cost
import torch
from quantize_quality import Yardstick
from quantize_stages import in_child, run_stage

from slim.quantization.kernels import linear
from slim.quantization.kernels.linear import QuantLinear
from slim.quantization.scheme import Scheme

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 256, 1024)
METHODS = ["rtn", "rtn:search=20", "awq", "gptq"]


def table(options: argparse.Namespace) -> None:
    """Print seconds, perplexity, divergence and size of slim's methods."""
    yardstick = Yardstick(
        options.model, options.test, options.length, options.windows, options.compared
    )
    print(f"{options.samples} x {options.length} calibration tokens, {len(yardstick.windows)} test windows, "
          f"{torch.get_num_threads()} threads\n")  # fmt: skip
    print("| method | bits | seconds | perplexity | divergence | stored bits per weight |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(
        f"| none | | | {yardstick.measure_model(yardstick.reference).perplexity:.3f} | | |",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        tokens = quantize_compare.save_calibration(options, Path(scratch))
        for bits in options.bits:
            for spec in options.ours:
                with tempfile.TemporaryDirectory() as folder:
                    arguments = (
                        spec,
                        options.model,
                        tokens,
                        Path(folder),
                        bits,
                        128,
                        options.symmetric,
                    )
                    run = in_child(run_stage, *arguments)
                    found = yardstick.measure(Path(folder))
                print(f"| {spec} | {bits} | {run.seconds:.1f} | {found.perplexity:.3f} | {found.divergence:.4f} | "
                      f"{run.facts['bits_per_weight']:.3f} |", flush=True)  # fmt: skip


def best_ms(function: Callable[[], object], repeats: int = 15) -> float:
    """Return the shortest of ``repeats`` times in milliseconds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def kernels(options: argparse.Namespace) -> None:
    """Print milliseconds of one layer by number of rows."""
    inputs, outputs = 2048, 5632
    layer = QuantLinear(inputs, outputs, Scheme(4, 128, False), torch.bfloat16)
    layer.packed = torch.randint(-(2**31), 2**31 - 1, layer.packed.shape, dtype=torch.int32)
    layer.choose_kernel()
    dense = torch.randn(outputs, inputs).bfloat16()
    print(
        "| rows | int4 kernel | unpack and multiply | dense bfloat16 |\n| ---: | ---: | ---: | ---: |"
    )
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        times = []
        for limit in (max(ROWS), 0):
            linear.KERNEL_ROWS = limit
            times.append(
                best_ms(lambda x=x: layer(x), 5 if rows > 64 else 15)
                if layer.kernel or not limit
                else math.nan
            )
        times.append(best_ms(lambda x=x: x @ dense.T))
        print(f"| {rows} | " + " | ".join(f"{value:.2f}" for value in times) + " |", flush=True)


def quality_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``table`` and ``compare`` share."""
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument(
        "--ours", nargs="+", default=METHODS, help="slim's methods, settings after a colon"
    )
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument(
        "--length", type=int, default=256, help="tokens of a sample and of a test window"
    )
    parser.add_argument("--windows", type=int, help="test windows; all of the text by default")
    parser.add_argument(
        "--compared", type=int, default=200, help="test windows that the divergence is taken over"
    )
    parser.add_argument("--symmetric", action="store_true")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("table")
    quality_arguments(one)
    one.set_defaults(run=table)
    both = commands.add_parser("compare")
    quality_arguments(both)
    both.add_argument("--groups", type=int, nargs="+", default=[128, 64])
    both.add_argument("--repeats", type=int, default=3, help="runs per time; 0: no times")
    both.add_argument(
        "--other-python", type=Path, help="python of an environment with llmcompressor"
    )
    both.add_argument(
        "--results",
        type=Path,
        help="folder that keeps llm-compressor's checkpoints for the next run",
    )
    both.set_defaults(run=quantize_compare.compare)
    for name, run in (("memory", quantize_cost.memory), ("decode", quantize_cost.decode)):
        command = commands.add_parser(name)
        command.add_argument("--layers", type=int, default=22)
        command.add_argument("--repeats", type=int, default=3)
        command.set_defaults(run=run)
        sizes = {"samples": 32, "length": 512} if name == "memory" else {"prompt": 32, "new": 32}
        for option, size in sizes.items():
            command.add_argument(f"--{option}", type=int, default=size)
    commands.choices["memory"].add_argument("--method", default="gptq")
    commands.add_parser("kernels").set_defaults(run=kernels)
    return parser


def main() -> None:
    """Read the arguments and measure."""
    options = arguments().parse_args()
    options.run(options)


if __name__ == "__main__":
    main()

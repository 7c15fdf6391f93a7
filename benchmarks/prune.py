"""Pruning: perplexity at matched parameter counts, and what scoring costs in memory and time.

    python benchmarks/prune.py quality MODEL CALIBRATION_TEXT TEST_TEXT [--blocks 2] [--windows 100]
    python benchmarks/prune.py memory [--layers 22] [--samples 10] [--length 128]
    python benchmarks/prune.py speed [--layers 2] [--samples 16] [--length 512]

quality: removes some blocks, or the same number of parameters by width (all blocks but the ends),
or makes as many weights of the blocks zero; with and without reconstruction. Texts: files, or
tiny:calibration and tiny:heldout.
memory: peak memory over the weights of Taylor scores, and of a plain loss.backward(), on a random
bfloat16 model of TinyLlama-1.1B's shape, each in a process of its own.
speed: Wanda 2:4 and SparseGPT 2:4 against one forward pass over the calibration set plus the
Hessians, on blocks of that shape, in seconds of processor time, and block calls of the ppl
criterion. OMP_NUM_THREADS sets the cores."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import torch

from slim.calibration.block_method import BlockMethod
from slim.calibration.loaded_blocks import BlockChain
from slim.calibration.sequential import SequentialCalibration
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.writer import copy_companions
from slim.data.calibration import Calibration
from slim.evaluation.memory import process_bytes, reset_process_peak
from slim.evaluation.perplexity import Perplexity as PerplexityProtocol
from slim.evaluation.perplexity import exponential, negative_log_likelihood
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.pruning.angular import Angular
from slim.pruning.magnitude import Magnitude
from slim.pruning.ppl import Perplexity, perplexities_without
from slim.pruning.rules import default_ends
from slim.pruning.taylor import Taylor, block_taylor_scores
from slim.pruning.weights import MagnitudeWeights, SparseGPT, Wanda
from slim.pruning.width_activation import WidthActivation
from slim.pruning.width_magnitude import WidthL1, WidthL2, WidthRandom
from slim.pruning.width_taylor import WidthTaylor, channel_taylor_scores
from slim.quantization.storage import weight_bytes

TINY = Path(__file__).parent.parent / "slim" / "assets" / "tiny"
SHAPE = dict(
    model_type="llama", hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
    vocab_size=32000, dtype="bfloat16",
)  # fmt: skip


# --- quality
# --------------------------------------------------------------------------------------------------------


def structured(spec: ModelSpec, blocks: int, text: Calibration) -> list[tuple[str, type, dict]]:
    """Return (name, stage, settings) of depth and width methods that remove about the same number
    of parameters."""
    pruned = spec.blocks - sum(default_ends(spec.blocks))
    common = {"calibration": text}
    width = {**common, "ratio": blocks / pruned, "rounding": 32}
    return [
        *((f"depth {name}", stage, {**common, "blocks": blocks}) for name, stage in
          (("magnitude", Magnitude), ("taylor", Taylor), ("ppl", Perplexity), ("angular", Angular))),
        ("depth ppl, greedy", Perplexity, {**common, "blocks": blocks, "iterative": True}),
        *((f"width taylor, {order}", WidthTaylor, {**width, "order": order})
          for order in ("first", "second", "mixed", "vectorised")),
        *((f"width {name}", stage, width) for name, stage in
          (("l1", WidthL1), ("l2", WidthL2), ("activation", WidthActivation), ("random", WidthRandom))),
    ]  # fmt: skip


def unstructured(spec: ModelSpec, blocks: int, text: Calibration) -> list[tuple[str, type, dict]]:
    """Return (name, stage, settings) of weight pruning with as many zeros as the others remove, and
    of 2:4."""
    patterns = (
        (f"{blocks / spec.blocks:.0%}", {"sparsity": blocks / spec.blocks}),
        ("2:4", {"n": 2, "m": 4}),
    )
    return [
        (
            f"weights {name}, {label}",
            stage,
            settings | ({} if stage is MagnitudeWeights else {"calibration": text}),
        )
        for label, settings in patterns
        for name, stage in (
            ("magnitude", MagnitudeWeights),
            ("wanda", Wanda),
            ("sparsegpt", SparseGPT),
        )
    ]


def perplexity_after(stage, source: Path, windows: torch.Tensor) -> tuple[float, dict]:
    """Run a stage and return the perplexity of its result and its facts."""
    with tempfile.TemporaryDirectory() as target:
        facts = stage.run(source, Path(target), Context())
        return perplexity(Path(target), windows), facts


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    """Token perplexity of a checkpoint over windows [n, length], each by itself."""
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return exponential(negative_log_likelihood(load_model(folder, "float32"), windows) / predicted)


def quality(args: argparse.Namespace) -> None:
    """Print the table of perplexities in Markdown."""
    source, spec = Path(args.model), open_checkpoint(args.model).spec
    text = Calibration(args.calibration, samples=128, length=256)
    windows = PerplexityProtocol(args.test, window=256, limit=args.windows).windows(
        load_tokenizer(source), 256
    )
    print(f"unpruned: {perplexity(source, windows):.3f}, {spec.parameters():,} parameters")
    print(
        "| method | parameters (M) | perplexity | with reconstruction |\n| --- | ---: | ---: | ---: |"
    )
    better = rows = 0
    for name, stage, settings in structured(spec, args.blocks, text):
        plain, facts = perplexity_after(stage(**settings), source, windows)
        fitted, _ = perplexity_after(stage(**settings, reconstruct=True), source, windows)
        better, rows = better + (fitted < plain), rows + 1
        print(
            f"| {name} | {facts['parameters_after'] / 1e6:.2f} | {plain:.3f} | {fitted:.3f} |",
            flush=True,
        )
    print(f"reconstruction helps in {better} of {rows} rows")
    print("| method | zeros among all parameters | perplexity |\n| --- | ---: | ---: |")
    for name, stage, settings in unstructured(spec, args.blocks, text):
        found, facts = perplexity_after(stage(**settings), source, windows)
        print(f"| {name} | {facts['sparsity_of_all_parameters']:.1%} | {found:.3f} |", flush=True)


# --- memory
# ---------------------------------------------------------------------------------------------------------


def random_model(layers: int):
    """Return a random bfloat16 model of TinyLlama-1.1B's shape with ``layers`` blocks, and its
    description."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {key: value for key, value in SHAPE.items() if key != "model_type"}
    torch.manual_seed(0)
    made = AutoConfig.for_model(SHAPE["model_type"], num_hidden_layers=layers, **config)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).eval()
    return model, ModelSpec({**SHAPE, "num_hidden_layers": layers})


def plain_backward(model, spec: ModelSpec, tokens: torch.Tensor) -> None:
    model.requires_grad_(True)
    model(tokens, labels=tokens, use_cache=False).loss.backward()


def depth_scores(model, spec: ModelSpec, tokens: torch.Tensor) -> None:
    block_taylor_scores(model, spec.family, tokens)


def width_scores(model, spec: ModelSpec, tokens: torch.Tensor) -> None:
    channel_taylor_scores(model, spec.family, tokens, range(spec.blocks), "first")


def peak_of(way: str, layers: int, samples: int, length: int, queue) -> None:
    """Put (peak over the weights in bytes, seconds) of one way into ``queue``."""
    model, spec = random_model(layers)
    tokens = torch.randint(
        0, SHAPE["vocab_size"], (samples, length), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        model(tokens[:1, :8])  # libraries and threads
    reset_process_peak()
    before, started = process_bytes("VmRSS"), time.monotonic()
    {"plain": plain_backward, "depth": depth_scores, "width": width_scores}[way](
        model, spec, tokens
    )
    queue.put((process_bytes("VmHWM") - before, time.monotonic() - started))


def memory(args: argparse.Namespace) -> None:
    """Print peak memory over the weights of the three ways."""
    spec = ModelSpec({**SHAPE, "num_hidden_layers": args.layers})
    largest = 2 * max(rows * columns for rows, columns in spec.block_linears().values())
    states = 2 * (args.layers + 1) * args.samples * args.length * SHAPE["hidden_size"]
    print(f"{spec.parameters():,} parameters, weights {weight_bytes(spec) / 1e6:.0f} MB; the largest "
          f"of a block {largest / 1e6:.0f} MB; inputs of all blocks {states / 1e6:.0f} MB")  # fmt: skip
    context = multiprocessing.get_context("spawn")
    for way, label in (
        ("depth", "taylor"),
        ("width", "width_taylor"),
        ("plain", "loss.backward()"),
    ):
        queue = context.Queue()
        process = context.Process(
            target=peak_of, args=(way, args.layers, args.samples, args.length, queue)
        )
        process.start()
        peak, seconds = queue.get()
        process.join()
        print(f"{label:16} {peak / 1e6:8.0f} MB over the weights, {seconds:6.1f} s", flush=True)


# --- speed
# ----------------------------------------------------------------------------------------------------------


class Nothing(BlockMethod):
    """Asks for all Hessians and leaves the weights alone: the floor of every calibrated
    method."""

    def process(self, group) -> dict[str, float]:
        return {}


def speed(args: argparse.Namespace) -> None:
    """Print times of sequential calibration with and without a method, and block calls of ppl."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "model", Path(folder) / "out"
        random_model(args.layers)[0].save_pretrained(source)
        copy_companions(TINY, source)
        tokens = torch.randint(
            0, 1000, (args.samples, args.length), generator=torch.Generator().manual_seed(0)
        )
        started = time.process_time()
        SequentialCalibration(open_checkpoint(source), Nothing(), None, tokens).run()
        floor = time.process_time() - started
        print(
            f"one forward pass over {tokens.numel()} tokens and the Hessians, {args.layers} blocks: "
            f"{floor:.1f} s"
        )
        for name, stage in (
            ("wanda 2:4", Wanda),
            ("sparsegpt 2:4", SparseGPT),
            ("wanda 50 %", Wanda),
        ):
            settings = {"n": 2, "m": 4} if "2:4" in name else {}
            found = stage(calibration=Calibration("tiny:calibration"), **settings)
            found.tokens = lambda checkpoint: tokens
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            started = time.process_time()
            found.run(source, target, Context())
            seconds = time.process_time() - started
            print(f"{name}: {seconds:.1f} s, {seconds / floor:.2f} times that", flush=True)
    count_forwards()


def count_forwards() -> None:
    """Print how many forwards the ppl criterion takes for all blocks of the embedded model."""
    model, spec = load_model(TINY), open_checkpoint(TINY).spec
    calls, step = [], BlockChain.step
    BlockChain.step = lambda chain, index, hidden: (
        calls.append(index),
        step(chain, index, hidden),
    )[1]
    perplexities_without(model, spec.family, torch.zeros(4, 32, dtype=torch.long))
    limit = math.floor((spec.blocks + 1) / 2) + 1
    print(f"ppl over {spec.blocks} blocks: {len(calls) / spec.blocks:.2f} forwards (limit {limit})")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(
        spec=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    table = commands.add_parser("quality")
    for name in ("model", "calibration", "test"):
        table.add_argument(name)
    table.add_argument("--blocks", type=int, default=2)
    table.add_argument("--windows", type=int, default=100)
    table.set_defaults(run=quality)
    for name, run, sizes in (("memory", memory, (22, 10, 128)), ("speed", speed, (2, 16, 512))):
        command = commands.add_parser(name)
        for option, size in zip(("--layers", "--samples", "--length"), sizes, strict=True):
            command.add_argument(option, type=int, default=size)
        command.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()

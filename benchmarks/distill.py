"""Distillation: what it heals beside tuning at equal steps, what a cached teacher saves, what chunks save.

    python benchmarks/distill.py heal MODEL [--train FILE] [--test FILE] [--blocks 2] [--steps 300] [--seeds 3] [--adapt 0]
                                      [--set loss=reverse temperature=2 ...]
    python benchmarks/distill.py questions [--blocks 4] [--steps 200] [--seeds 3]
    python benchmarks/distill.py cache MODEL [--train FILE] [--blocks 2] [--steps 60] [--repeats 3]
    python benchmarks/distill.py memory [--vocabulary 131072] [--tokens 2048] [--hidden 256] [--repeats 3]

heal: removes blocks by Taylor scores, then heals with adapters, once on the text alone and once on the text and the whole
model as teacher: same data, same steps, same adapters. Perplexity on other text, mean and spread over seeds.
--adapt: first tune the whole model on the text for so many steps, so that it is at home there; that is the source then.
questions: a pruned tiny model learns from the whole one's distributions on answers of its own or of the teacher, never from
the data's; facts that it gets right before and after, beside tuning on the true answers.
cache: the second pass over the data with the teacher's distributions from disk and with the teacher itself, seconds of
processor time, medians; and the validation loss both reach.
memory: peak memory of the forward KL and its gradients in chunks and as one formula, each in a process of its own, medians.
MODEL: a checkpoint folder, or tiny. Without --train and --test, the tiny world's texts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from slim.checkpoint import load_model, load_tokenizer, open_checkpoint
from slim.data.calibration import Calibration
from slim.data.examples import TextData, TinyChat, TinyText, TrainingData
from slim.distillation import stage as distillation
from slim.distillation.questions import Generation
from slim.evaluation.memory import process_bytes, reset_process_peak
from slim.evaluation.perplexity import Perplexity, exponential, negative_log_likelihood
from slim.evaluation.tasks import Tasks
from slim.pruning.taylor import Taylor
from slim.source import EMBEDDED, Source
from slim.stage import Context, Stage
from slim.training import fit, tune


def spread(values: list[float], digits: int = 3) -> str:
    """Show mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {deviation:.{digits}f}"


def run(stage: Stage, source: Path, target: Path) -> dict:
    """Run a stage into a new folder and return its facts."""
    target.mkdir(parents=True)
    stage.check(open_checkpoint(source).description)
    return stage.run(source, target, Context())


def pruned(model: Path, text: str, blocks: int, target: Path) -> list[int]:
    """Remove blocks by Taylor scores on ``text``; return those removed."""
    calibration = Calibration(text=text, samples=16, length=128)
    return run(Taylor(blocks=blocks, calibration=calibration), model, target)["removed_blocks"]


def text_data(path: str | None, seed: int) -> TrainingData:
    return TinyText(seed=seed) if path is None else TextData(text=path, seed=seed)


# --- heal -----------------------------------------------------------------------------------------------------------


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    return exponential(negative_log_likelihood(load_model(folder), windows) / (windows.numel() - len(windows)))


def parsed(settings: list[str]) -> dict:
    """Turn ``loss=reverse temperature=2`` into settings of the distillation."""
    pairs = (setting.split("=", 1) for setting in settings)
    return {name: float(value) if value.replace(".", "").isdigit() else value for name, value in pairs}


def heal(args: argparse.Namespace) -> None:
    model = EMBEDDED.get(args.model, Path(args.model))
    protocol = Perplexity(text=args.test or "tiny:heldout", window=256, limit=args.windows)
    windows = protocol.windows(load_tokenizer(model), 256)
    common = dict(steps=args.steps, validate_every=max(1, args.steps // 6))
    with tempfile.TemporaryDirectory() as scratch:
        if args.adapt:
            run(tune.Lora(data=text_data(args.train, 99), steps=args.adapt, r=32, alpha=64), model, Path(scratch) / "source")
            model = Path(scratch) / "source"
        start = Path(scratch) / "pruned"
        removed = pruned(model, args.train or "tiny:calibration", args.blocks, start)
        print(f"{model.name}: blocks {removed} removed, {args.steps} steps, {len(windows)} windows of {windows.shape[1]}")
        print(f"source        {perplexity(model, windows):.3f}\npruned        {perplexity(start, windows):.3f}", flush=True)
        ways = {
            "lora": lambda seed: tune.Lora(data=text_data(args.train, seed), seed=seed, **common),
            "distilled": lambda seed: distillation.Lora(
                data=text_data(args.train, seed), seed=seed, base=Source(str(model)), **common, **parsed(args.set)
            ),
        }
        for name, make in ways.items():
            if name in args.skip:
                continue
            found, losses = [], []
            for seed in range(args.seeds):
                target = Path(scratch) / f"{name}{seed}"
                facts = run(make(seed), start, target)
                found.append(perplexity(target, windows))
                losses.append(facts["validation_loss_after"])
            print(
                f"{name:13} {spread(found)}   validation loss {spread(losses, 4)}   {[round(x, 3) for x in found]}", flush=True
            )


# --- questions ------------------------------------------------------------------------------------------------------


def facts_right(folder: Path) -> float:
    """Return the share of the tiny world's fact questions that a model answers rightly, in per cent."""
    found = Tasks(names=["tiny_facts"], batch_size=64).measure(load_model(folder), load_tokenizer(folder), 512)
    return 100 * found["metrics"]["tiny_facts/acc"]


def questions(args: argparse.Namespace) -> None:
    common = dict(steps=args.steps, validate_every=max(1, args.steps // 4), batch_tokens=1024)
    taught = dict(
        base=Source("tiny"), hard_weight=0.0, loss="symmetric", generation=Generation(questions=32, new_tokens=24), **common
    )
    ways = {
        "student answers": lambda seed: distillation.Lora(data=TinyChat(seed=seed), seed=seed, answers="student", **taught),
        "teacher answers": lambda seed: distillation.Lora(data=TinyChat(seed=seed), seed=seed, answers="teacher", **taught),
        "true answers, no teacher": lambda seed: tune.Lora(data=TinyChat(seed=seed), seed=seed, **common),
    }
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "pruned"
        removed = pruned(EMBEDDED["tiny"], "tiny:calibration", args.blocks, start)
        print(f"tiny: blocks {removed} removed, {args.steps} steps; facts right, per cent (chance: 25)")
        print(f"{'teacher':26} {facts_right(EMBEDDED['tiny']):.1f}\n{'pruned':26} {facts_right(start):.1f}", flush=True)
        for name, make in ways.items():
            found, started = [], time.process_time()
            for seed in range(args.seeds):
                target = Path(scratch) / f"{name}{seed}"
                run(make(seed), start, target)
                found.append(facts_right(target))
            seconds = (time.process_time() - started) / args.seeds
            print(f"{name:26} {spread(found, 1)}   {seconds:.0f} s of processor time each", flush=True)


# --- cache ----------------------------------------------------------------------------------------------------------


def cache(args: argparse.Namespace) -> None:
    fit.time = SimpleNamespace(perf_counter=time.process_time)  # tokens per second of processor time: others work here too
    model = EMBEDDED.get(args.model, Path(args.model))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pruned(model, args.train or "tiny:calibration", args.blocks, folder / "pruned")
        taken: dict[str, list[float]] = {"live": [], "cached": []}
        losses = {}
        for number in range(args.repeats + 1):
            for name, seconds in taken.items():
                settings = dict(cache=name == "cached", cache_folder=str(folder / "cache"), steps=args.steps)
                stage = distillation.Lora(
                    data=text_data(args.train, 0), base=Source(str(model)), validate_every=args.steps, **settings
                )
                facts = run(stage, folder / "pruned", folder / f"{name}{number}")
                losses[name] = facts["validation_loss_after"]
                if number:  # the first round asks the teacher, the later ones find its answers
                    seconds.append(args.steps * stage.batch_tokens / facts["tokens_per_second"])
        live, cached = (statistics.median(taken[name]) for name in ("live", "cached"))
        print(f"{args.steps} steps: live {live:.2f} s, cached {cached:.2f} s, ratio {live / cached:.2f}")
        print(f"validation loss: {losses}, difference {abs(losses['cached'] / losses['live'] - 1):.3%}")


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_of(way: str, vocabulary: int, tokens: int, hidden: int, queue) -> None:
    """Put peak memory over the inputs, seconds, the loss and a sum over the gradient into ``queue``."""
    from slim.distillation.chunks import chunk_rows, chunked_sum
    from slim.distillation.losses import forward_kl, softened

    torch.manual_seed(0)
    states, taught = (torch.randn(tokens, hidden) for _ in range(2))
    student, teacher = (torch.randn(vocabulary, hidden) / hidden**0.5 for _ in range(2))
    states.requires_grad_()
    before, began = process_bytes("VmRSS"), time.perf_counter()
    reset_process_peak()

    def loss(states: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            log_p = softened(taught @ teacher.T, 2.0)
        return forward_kl(log_p, softened(states @ student.T, 2.0)).sum()

    value = loss(states, taught) if way == "plain" else chunked_sum(loss, (states, taught), chunk=chunk_rows(vocabulary))
    value.backward()
    peak, seconds = process_bytes("VmHWM") - before, time.perf_counter() - began
    queue.put((peak, seconds, value.item(), states.grad.double().norm().item()))


def memory(args: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for way in ("plain", "chunks"):
        found = []
        for _ in range(args.repeats):
            queue = context.Queue()
            process = context.Process(target=peak_of, args=(way, args.vocabulary, args.tokens, args.hidden, queue))
            process.start()
            found.append(queue.get())
            process.join()
        peak, seconds = (statistics.median(column) for column in list(zip(*found, strict=True))[:2])
        peaks[way] = peak
        print(f"{way:7} {peak / 1e6:8.0f} MB {seconds:6.1f} s   loss {found[0][2]:.6f}, gradient {found[0][3]:.8f}", flush=True)
    print(f"ratio {peaks['plain'] / peaks['chunks']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for function in (heal, questions, cache, memory):
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        if function in (heal, cache):
            command.add_argument("model")
            command.add_argument("--train")
        if function is not memory:
            command.add_argument("--blocks", type=int, default=4 if function is questions else 2)
            command.add_argument("--steps", type=int, default=60 if function is cache else 300)
        if function in (heal, questions):
            command.add_argument("--seeds", type=int, default=3)
        if function in (cache, memory):
            command.add_argument("--repeats", type=int, default=3)
        if function is heal:
            command.add_argument("--test")
            command.add_argument("--windows", type=int)
            command.add_argument("--adapt", type=int, default=0)
            command.add_argument("--set", nargs="*", default=[], help="settings of the distillation, such as loss=reverse")
            command.add_argument("--skip", nargs="*", default=[], help="lora or distilled")
        if function is memory:
            for name, size in (("vocabulary", 131072), ("tokens", 2048), ("hidden", 256)):
                command.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()

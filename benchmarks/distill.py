"""Distillation: what it heals beside tuning at equal steps, what a cached teacher saves, what
chunks save.

    python benchmarks/distill.py heal MODEL [--train FILE] [--test FILE] [--blocks 2] [--bits 0]
    [--steps 300] [--seeds 3]
                                      [--adapt 0] [--set loss=reverse temperature=2 ...]
    python benchmarks/distill.py questions [--blocks 4] [--steps 200] [--seeds 3]
    python benchmarks/distill.py dskd [--vocabulary 800] [--before 400] [--steps 200] [--seeds 3]
    [--set align=attention ...] python benchmarks/distill.py cache MODEL [--train FILE] [--blocks 2]
    [--steps 60] [--repeats 3] python benchmarks/distill.py memory [--vocabulary 131072] [--tokens
    2048] [--hidden 256] [--repeats 3]

heal: removes blocks by Taylor scores, then heals with adapters, once on the text alone and once on
the text and the whole model as teacher: same data, same steps, same adapters. Perplexity on other
text, mean and spread over seeds.
--bits: instead of removing blocks, round the model to so many bits; the adapters then stay beside
the quantised weights.
--adapt: first tune the whole model on the text for so many steps, so that it is at home there; that
is the source then.
questions: a pruned tiny model learns from the whole one's distributions on answers of its own or of
the teacher, never from the data's; facts that it gets right before and after, beside tuning on the
true answers.
dskd: a fresh model of half the depth with a vocabulary of its own (1536: the teacher's) learns the
tiny world from its text, and then goes on with the text alone, or with the tiny model as teacher:
perplexity in its own tokens.
cache: the second pass over the data with the teacher's distributions from disk and with the teacher
itself, seconds of processor time, medians; and the validation loss both reach.
memory: peak memory of the forward KL and its gradients in chunks and as one formula, each in a
    process of its own, medians.
MODEL: a checkpoint folder, or tiny. Without --train and --test, the tiny world's texts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import yaml
from distill_cost import cache, memory, pruned, run, text_data

from slim.checkpoints.source import EMBEDDED, Source
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.checkpoints.untrained import Untrained
from slim.data.examples import TinyChat, TinyText
from slim.distillation import stage as distillation
from slim.distillation.layer_map import Matching
from slim.distillation.questions import Generation
from slim.evaluation.perplexity import Perplexity, exponential, negative_log_likelihood
from slim.evaluation.tasks import Tasks
from slim.loading.load_model import load_model
from slim.quantization.methods.rtn import RTN
from slim.training import tune


def spread(values: list[float], digits: int = 3) -> str:
    """Show mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} +- {deviation:.{digits}f}"


# --- heal
# -----------------------------------------------------------------------------------------------------------


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    return exponential(
        negative_log_likelihood(load_model(folder), windows) / (windows.numel() - len(windows))
    )


def parsed(settings: list[str]) -> dict:
    """Turn ``loss=reverse match={hidden: 1}`` into settings of the distillation."""
    found = {
        name: yaml.safe_load(value)
        for name, value in (setting.split("=", 1) for setting in settings)
    }
    return {**found, "match": Matching(**found["match"])} if "match" in found else found


def harm(model: Path, args: argparse.Namespace, target: Path) -> str:
    """Write what is to be healed and say what was done to it."""
    if args.bits:
        run(RTN(bits=args.bits, group_size=64), model, target)
        return f"rounded to {args.bits} bits in groups of 64"
    return f"blocks {pruned(model, args.train or 'tiny:calibration', args.blocks, target)} removed"


def heal(args: argparse.Namespace) -> None:
    model = EMBEDDED.get(args.model, Path(args.model))
    protocol = Perplexity(text=args.test or "tiny:heldout", window=256, limit=args.windows)
    windows = protocol.windows(load_tokenizer(model), 256)
    common = dict(steps=args.steps, validate_every=max(1, args.steps // 6))
    with tempfile.TemporaryDirectory() as scratch:
        if args.adapt:
            run(
                tune.Lora(data=text_data(args.train, 99), steps=args.adapt, r=32, alpha=64),
                model,
                Path(scratch) / "source",
            )
            model = Path(scratch) / "source"
        start = Path(scratch) / "start"
        done = harm(model, args, start)
        common["merge"] = not args.bits
        print(
            f"{model.name}: {done}, {args.steps} steps, {len(windows)} windows of {windows.shape[1]}"
        )
        print(
            f"source        {perplexity(model, windows):.3f}\nharmed        {perplexity(start, windows):.3f}",
            flush=True,
        )
        ways = {
            "lora": lambda seed: tune.Lora(data=text_data(args.train, seed), seed=seed, **common),
            "distilled": lambda seed: distillation.Lora(
                data=text_data(args.train, seed),
                seed=seed,
                base=Source(str(model)),
                **common,
                **parsed(args.set),
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
                f"{name:13} {spread(found)}   validation loss {spread(losses, 4)}   {[round(x, 3) for x in found]}",
                flush=True,
            )


# --- questions
# ------------------------------------------------------------------------------------------------------


def facts_right(folder: Path) -> float:
    """Return the share of the tiny world's fact questions that a model answers rightly, in per
    cent."""
    found = Tasks(names=["tiny_facts"], batch_size=64).measure(
        load_model(folder), load_tokenizer(folder), 512
    )
    return 100 * found["metrics"]["tiny_facts/acc"]


def questions(args: argparse.Namespace) -> None:
    common = dict(steps=args.steps, validate_every=max(1, args.steps // 4), batch_tokens=1024)
    taught = dict(
        base=Source("tiny"),
        hard_weight=0.0,
        loss="symmetric",
        generation=Generation(questions=32, new_tokens=24),
        **common,
    )
    ways = {
        "student answers": lambda seed: distillation.Lora(
            data=TinyChat(seed=seed), seed=seed, answers="student", **taught
        ),
        "teacher answers": lambda seed: distillation.Lora(
            data=TinyChat(seed=seed), seed=seed, answers="teacher", **taught
        ),
        "true answers, no teacher": lambda seed: tune.Lora(
            data=TinyChat(seed=seed), seed=seed, **common
        ),
    }
    with tempfile.TemporaryDirectory() as scratch:
        start = Path(scratch) / "pruned"
        removed = pruned(EMBEDDED["tiny"], "tiny:calibration", args.blocks, start)
        print(
            f"tiny: blocks {removed} removed, {args.steps} steps; facts right, per cent (chance: 25)"
        )
        print(
            f"{'teacher':26} {facts_right(EMBEDDED['tiny']):.1f}\n{'pruned':26} {facts_right(start):.1f}",
            flush=True,
        )
        for name, make in ways.items():
            found, started = [], time.process_time()
            for seed in range(args.seeds):
                target = Path(scratch) / f"{name}{seed}"
                run(make(seed), start, target)
                found.append(facts_right(target))
            seconds = (time.process_time() - started) / args.seeds
            print(
                f"{name:26} {spread(found, 1)}   {seconds:.0f} s of processor time each", flush=True
            )


# --- dskd
# -----------------------------------------------------------------------------------------------------------


def dskd(args: argparse.Namespace) -> None:
    common = dict(steps=args.steps, validate_every=max(1, args.steps // 4), learning_rate=1e-3)
    guided = {**common, "base": Source("tiny"), "method": "dskd", **parsed(args.set)}
    ways = {
        "text alone": lambda seed: tune.Full(data=TinyText(seed=seed), seed=seed, **common),
        "dskd": lambda seed: distillation.Full(data=TinyText(seed=seed), seed=seed, **guided),
    }
    print(
        f"vocabulary {args.vocabulary}, 4 blocks, {args.before} steps, then {args.steps}; perplexity on tiny:heldout"
    )
    ways = {name: make for name, make in ways.items() if name not in args.skip}
    with tempfile.TemporaryDirectory() as scratch:
        fresh, start = Path(scratch) / "fresh", Path(scratch) / "start"
        fresh.mkdir()
        Untrained(vocab_size=args.vocabulary, blocks=4).run(None, fresh, Context())
        run(
            tune.Full(
                data=TinyText(seed=99), steps=args.before, learning_rate=2e-3, betas=(0.9, 0.95)
            ),
            fresh,
            start,
        )
        windows = Perplexity(text="tiny:heldout", window=256).windows(load_tokenizer(start), 256)
        print(f"before        {perplexity(start, windows):.3f}", flush=True)
        for name, make in ways.items():
            found = []
            for seed in range(args.seeds):
                run(make(seed), start, Path(scratch) / f"{name}{seed}")
                found.append(perplexity(Path(scratch) / f"{name}{seed}", windows))
            print(f"{name:13} {spread(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(spec=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    number, text = dict(type=int), dict()
    changes = dict(nargs="*", default=[], help="settings of the distillation, such as loss=reverse")
    options = {
        heal: {"model": text, "--train": text, "--test": text, "--blocks": number | {"default": 2},
               "--bits": number | {"default": 0}, "--steps": number | {"default": 300},
               "--seeds": number | {"default": 3}, "--windows": number,
               "--adapt": number | {"default": 0}, "--set": changes,
               "--skip": dict(nargs="*", default=[], help="lora or distilled")},
        questions: {"--blocks": number | {"default": 4}, "--steps": number | {"default": 200},
                    "--seeds": number | {"default": 3}},
        dskd: {"--vocabulary": number | {"default": 800}, "--before": number | {"default": 400},
               "--steps": number | {"default": 200}, "--seeds": number | {"default": 3}, "--set": changes,
               "--skip": dict(nargs="*", default=[], help="'text alone' or dskd")},
        cache: {"model": text, "--train": text, "--blocks": number | {"default": 2}, "--steps": number | {"default": 60},
                "--repeats": number | {"default": 3}},
        memory: {"--vocabulary": number | {"default": 131072}, "--tokens": number | {"default": 2048},
                 "--hidden": number | {"default": 256}, "--repeats": number | {"default": 3}},
    }  # fmt: skip
    for function, settings in options.items():
        command = commands.add_parser(function.__name__)
        command.set_defaults(function=function)
        for name, setting in settings.items():
            command.add_argument(name, **setting)
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()

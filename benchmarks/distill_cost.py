"""What distillation costs: time with a cached and with a live teacher, memory of a loss in chunks.
See ``distill.py``."""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import EMBEDDED, Source
from slim.checkpoints.stage import Context, Stage
from slim.data.calibration import Calibration
from slim.data.examples import TextData, TinyText, TrainingData
from slim.distillation import stage as distillation
from slim.evaluation.memory import process_bytes, reset_process_peak
from slim.pruning.taylor import Taylor
from slim.training import callbacks


def run(stage: Stage, source: Path, target: Path) -> dict:
    """Run a stage into a new folder and return its facts."""
    target.mkdir(parents=True)
    stage.check(open_checkpoint(source).spec)
    return stage.run(source, target, Context())


def pruned(model: Path, text: str, blocks: int, target: Path) -> list[int]:
    """Remove blocks by Taylor scores on ``text``; return those removed."""
    calibration = Calibration(text=text, samples=16, length=128)
    return run(Taylor(blocks=blocks, calibration=calibration), model, target)["removed_blocks"]


def text_data(path: str | None, seed: int) -> TrainingData:
    """Return the training text: a file's, or the tiny world's."""
    return TinyText(seed=seed) if path is None else TextData(text=path, seed=seed)


# --- cache
# ----------------------------------------------------------------------------------------------------------


def cache(args: argparse.Namespace) -> None:
    # speed by processor time: others work here too
    callbacks.time = SimpleNamespace(perf_counter=time.process_time)
    model = EMBEDDED.get(args.model, Path(args.model))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pruned(model, args.train or "tiny:calibration", args.blocks, folder / "pruned")
        taken: dict[str, list[float]] = {"live": [], "cached": []}
        losses = {}
        for number in range(args.repeats + 1):
            for name, seconds in taken.items():
                settings = dict(
                    cache=name == "cached", cache_folder=str(folder / "cache"), steps=args.steps
                )
                stage = distillation.Lora(
                    data=text_data(args.train, 0),
                    base=Source(str(model)),
                    validate_every=args.steps,
                    **settings,
                )
                facts = run(stage, folder / "pruned", folder / f"{name}{number}")
                losses[name] = facts["validation_loss_after"]
                if number:  # the first round asks the teacher, the later ones find its answers
                    seconds.append(args.steps * stage.batch_tokens / facts["tokens_per_second"])
        live, cached = (statistics.median(taken[name]) for name in ("live", "cached"))
        print(
            f"{args.steps} steps: live {live:.2f} s, cached {cached:.2f} s, ratio {live / cached:.2f}"
        )
        print(
            f"validation loss: {losses}, difference {abs(losses['cached'] / losses['live'] - 1):.3%}"
        )


# --- memory
# ---------------------------------------------------------------------------------------------------------


def peak_of(way: str, vocabulary: int, tokens: int, hidden: int, queue) -> None:
    """Put peak memory over the inputs, seconds, the loss and a sum over the gradient into
    ``queue``."""
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

    value = (
        loss(states, taught)
        if way == "plain"
        else chunked_sum(loss, (states, taught), chunk=chunk_rows(vocabulary))
    )
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
            process = context.Process(
                target=peak_of, args=(way, args.vocabulary, args.tokens, args.hidden, queue)
            )
            process.start()
            found.append(queue.get())
            process.join()
        peak, seconds = (statistics.median(column) for column in list(zip(*found, strict=True))[:2])
        peaks[way] = peak
        print(
            f"{way:7} {peak / 1e6:8.0f} MB {seconds:6.1f} s   loss {found[0][2]:.6f}, gradient {found[0][3]:.8f}",
            flush=True,
        )
    print(f"ratio {peaks['plain'] / peaks['chunks']:.1f}")

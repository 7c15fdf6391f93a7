"""Training speed: slim against a loop written by hand, against transformers' Trainer with PEFT, and
against padding.

    python benchmarks/train.py hand [FOLDER] [--steps 20] [--rounds 3] [--rows 8]
    python benchmarks/train.py trainer ../shared/ref-llama [...]
    python benchmarks/train.py padding ../shared/ref-llama [...]

``hand`` and ``trainer`` train the same weights on the same batches and validate on one batch before
and after; ``padding`` trains on the same short pairs of question and answer, packed as slim does it
into windows of 768 tokens, or each padded to 768. Rounds alternate and the medians are compared, so
that other work on the machine hits both alike. Prints tokens per second (``padding``: tokens of
pairs) and the ratio; with --cpu-time per second of processor time (one thread), for a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.data.packing import IGNORE, Example, Windows, separate
from slim.data.tiny import TinyChat
from slim.loading.load_model import load_model
from slim.training import batches, fit, forward, module
from slim.training.adapters import add_adapters

TINY = Path(__file__).parent.parent / "slim" / "assets" / "tiny"
WINDOW, PADDED = 256, 768
RATE = 1e-4
clock = time.perf_counter


def prepared(folder: Path, lora: bool = True) -> torch.nn.Module:
    model = load_model(folder, "float32")
    if lora:
        torch.manual_seed(0)
        return add_adapters(model, 8, 16, 0.0, list(open_checkpoint(folder).spec.block_linears()))
    return model.requires_grad_(True)


def random_windows(count: int, vocabulary: int) -> Windows:
    tokens = torch.randint(
        3, vocabulary, (count, WINDOW), generator=torch.Generator().manual_seed(0)
    ).int()
    return Windows(tokens, tokens)


# The loops: each returns seconds and the last step's loss


def by_hand(model: torch.nn.Module, windows: Windows, steps: int, rows: int) -> tuple[float, float]:
    """Train without any framework; the loss as transformers computes it."""
    held_out = batches.in_order(windows, rows)[:1]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    order = batches.window_order(len(windows), steps * rows, seed=0).view(steps, rows)
    begin = clock()
    forward.mean_nll(model, held_out)
    model.train()
    for chosen in order:
        tokens = windows.tokens[chosen].long()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    forward.mean_nll(model, held_out)
    return clock() - begin, loss.item()


def by_slim(model: torch.nn.Module, windows: Windows, steps: int, rows: int) -> tuple[float, float]:
    """Train as slim does, set-up of Lightning included."""
    learner = module.LanguageModeling(model, module.Optimization(steps, RATE, "constant"))
    order = batches.window_order(len(windows), steps * rows, seed=0)
    data = batches.WindowData(batches.MicroBatches(windows, order, rows))
    ignore = lambda *_: None  # noqa: E731
    begin = clock()
    outcome = fit.fit(
        learner, data, batches.in_order(windows, rows)[:1], fit.Loop(steps), ignore, ignore
    )
    return clock() - begin, outcome.train[-1]["loss"]


def by_trainer(
    model: torch.nn.Module, windows: Windows, steps: int, rows: int
) -> tuple[float, float]:
    """Train with transformers' Trainer, which is given what it needs to do the same: order,
    optimiser, clipping."""
    order = batches.window_order(len(windows), steps * rows, seed=0)
    labels = windows.labels[order].long()
    data = [
        {"input_ids": windows.tokens[number].long(), "labels": labels[place]}
        for place, number in enumerate(order)
    ]
    for row, mask in zip(data, attention_masks(windows, order), strict=True):
        row |= mask
    held_out = batches.in_order(Windows(windows.tokens, windows.labels), rows)[:1]
    return with_trainer(model, data, held_out, steps, rows)


def attention_masks(windows: Windows, order: torch.Tensor) -> list[dict]:
    """Return the mask of every padded window, or nothing where none is padded."""
    if windows.positions is None:
        return [{}] * len(order)
    return [{"attention_mask": (windows.positions[number] >= 0).long()} for number in order]


def with_trainer(
    model: torch.nn.Module, data: list[dict], held_out: list[dict], steps: int, rows: int
) -> tuple[float, float]:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_) -> SequentialSampler:
            return SequentialSampler(data)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=steps, per_device_train_batch_size=rows, learning_rate=RATE, lr_scheduler_type="constant",
            optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0, logging_steps=steps, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        begin = clock()
        forward.mean_nll(model, held_out)
        trainer = InOrder(model, arguments, train_dataset=data)
        trainer.log = lambda *_, **__: None
        trainer.train()
        forward.mean_nll(model, held_out)
        seconds = clock() - begin
    return seconds, last_loss(model, data[-rows:])


@torch.no_grad()
def last_loss(model: torch.nn.Module, rows: list[dict]) -> float:
    """Return the loss on the last batch."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return model.eval()(**batch, use_cache=False).loss.item()


# The comparisons


def compare(
    title: str, loops: dict[str, Callable[[], tuple[float, float]]], tokens: int, rounds: int
) -> None:
    """Time the loops in turn, and print tokens per second and the ratio of the second to the
    first."""
    taken: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        losses = {}
        for name, loop in loops.items():
            seconds, losses[name] = loop()
            taken[name].append(seconds)
    speeds = {name: tokens / statistics.median(seconds) for name, seconds in taken.items()}
    first, second = speeds.values()
    shown = ", ".join(
        f"{name} {speed:,.0f} tokens/s (loss {losses[name]:.3f})" for name, speed in speeds.items()
    )
    print(f"{title}: {shown}, ratio {second / first:.3f}", flush=True)


def same_batches(
    options: argparse.Namespace, other: Callable, name: str, kinds: tuple[bool, ...]
) -> None:
    steps, rows = options.steps, options.rows
    windows = random_windows(steps * rows, open_checkpoint(options.folder).spec.vocab_size)
    for lora in kinds:
        loops = {
            name: lambda lora=lora: other(prepared(options.folder, lora), windows, steps, rows),
            "slim": lambda lora=lora: by_slim(prepared(options.folder, lora), windows, steps, rows),
        }
        compare("lora" if lora else "full", loops, steps * rows * WINDOW, options.rounds)


def packed_or_padded(options: argparse.Namespace) -> None:
    """The same pairs, once in as few windows as hold them, once one per window."""
    found = pairs(options.folder, options.steps * options.rows)
    tokens = sum(len(example) for example in found)
    packed = separate(found, PADDED, 0)
    alone = [separate([example], PADDED, 0) for example in found]
    padded = Windows(
        torch.cat([one.tokens for one in alone]),
        torch.cat([one.labels for one in alone]),
        # a position below zero marks padding for the mask
        torch.stack(
            [
                torch.arange(PADDED) - PADDED * (torch.arange(PADDED) >= len(example))
                for example in found
            ]
        ).int(),
    )
    steps = max(1, len(packed) // options.rows)
    rows = -(-len(packed) // steps)
    print(
        f"{len(found)} pairs of {tokens / len(found):.0f} tokens: {len(packed)} windows of {PADDED}"
    )
    loops = {
        "padded": lambda: by_trainer(prepared(options.folder), padded, options.steps, options.rows),
        "slim": lambda: by_slim(prepared(options.folder), packed, steps, rows),
    }
    compare("lora", loops, tokens, options.rounds)


def pairs(folder: Path, count: int) -> list[Example]:
    """Return short questions with answers, loss on the answers."""
    tokenizer = load_tokenizer(folder)
    found = []
    for question, answer in islice(TinyChat().pairs("train"), count):
        asked, said = (
            tokenizer(text)["input_ids"]
            for text in (f"Question: {question}\nAnswer:", f" {answer}")
        )
        found.append(Example(asked + said, [IGNORE] * len(asked) + said))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(spec=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("hand", "trainer", "padding"))
    parser.add_argument("folder", nargs="?", type=Path, default=TINY)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock = time.process_time
        torch.set_num_threads(1)
    print(f"{options.folder.name}: {options.rows} rows per step, {torch.get_num_threads()} threads")
    if options.what == "padding":
        packed_or_padded(options)
    elif options.what == "trainer":
        same_batches(options, by_trainer, "transformers' Trainer", (True,))
    else:
        same_batches(options, by_hand, "by hand", (False, True))


if __name__ == "__main__":
    main()

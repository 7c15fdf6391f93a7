"""Training speed: slim's Lightning loop against the same steps written by hand in plain PyTorch.

    python benchmarks/train.py [FOLDER] [--steps 20] [--rounds 3] [--rows 8]

Both train the same weights on the same batches and validate on one batch before and after; rounds alternate and the
medians are compared, so that other work on the machine hits both alike. Prints tokens per second for full and LoRA
training, and the ratio; with --cpu-time per second of processor time (one thread), for a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from slim.checkpoint import load_model, open_checkpoint
from slim.data.packing import Windows
from slim.training import batches, fit, forward, module
from slim.training.adapters import add_adapters

TINY = Path(__file__).parent.parent / "slim" / "assets" / "tiny"
WINDOW = 256
clock = time.perf_counter


def prepared(folder: Path, lora: bool) -> torch.nn.Module:
    model = load_model(folder, "float32")
    if lora:
        torch.manual_seed(0)
        return add_adapters(model, 8, 16, 0.0, list(open_checkpoint(folder).description.block_linears()))
    return model.requires_grad_(True)


def random_windows(count: int, vocabulary: int) -> Windows:
    tokens = torch.randint(3, vocabulary, (count, WINDOW), generator=torch.Generator().manual_seed(0)).int()
    return Windows(tokens, tokens)


def by_hand(model: torch.nn.Module, windows: Windows, steps: int, rows: int) -> tuple[float, float]:
    """Return seconds and last loss of a loop without any framework; the loss as transformers computes it."""
    held_out = batches.in_order(windows, rows)[:1]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    order = batches.window_order(len(windows), steps * rows, seed=0).view(steps, rows)
    begin = clock()
    forward.mean_nll(model, held_out)
    model.train()
    for chosen in order:
        tokens = windows.tokens[chosen].long()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    forward.mean_nll(model, held_out)
    return clock() - begin, loss.item()


def by_slim(model: torch.nn.Module, windows: Windows, steps: int, rows: int) -> tuple[float, float]:
    """Return seconds and last loss of slim's training, set-up of Lightning included."""
    learner = module.LanguageModelling(model, module.Optimisation(steps, 1e-4, "constant"))
    order = batches.window_order(len(windows), steps * rows, seed=0)
    data = batches.WindowData(batches.MicroBatches(windows, order, rows))
    ignore = lambda *_: None  # noqa: E731
    begin = clock()
    outcome = fit.fit(learner, data, batches.in_order(windows, rows)[:1], steps, "cpu", "32-true", ignore, ignore)
    return clock() - begin, outcome.train[-1]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
    windows = random_windows(options.steps * options.rows, open_checkpoint(options.folder).description.vocab_size)
    tokens = options.steps * options.rows * WINDOW
    print(f"{options.folder.name}: {options.rows} x {WINDOW} tokens per step, {torch.get_num_threads()} threads")
    for lora in (False, True):
        taken = {by_hand: [], by_slim: []}
        for _ in range(options.rounds):
            results = {}
            for loop, seconds in taken.items():
                spent, results[loop] = loop(prepared(options.folder, lora), windows, options.steps, options.rows)
                seconds.append(spent)
            if abs(results[by_hand] - results[by_slim]) > 1e-3:
                raise SystemExit(f"the loops do not train the same: last losses {list(results.values())}")
        hand, slim = (tokens / statistics.median(taken[loop]) for loop in (by_hand, by_slim))
        name = "lora" if lora else "full"
        print(f"{name}: by hand {hand:,.0f} tokens/s, slim {slim:,.0f} tokens/s, ratio {slim / hand:.3f}", flush=True)


if __name__ == "__main__":
    main()

"""The order of the windows, and the Lightning data module that hands them out."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from slim.data.packing import Windows


def window_order(windows: int, needed: int, seed: int) -> torch.Tensor:
    """Return ``needed`` indices: all windows in random order, again in another order, and so on;
    int64."""
    generator = torch.Generator().manual_seed(seed)
    passes = [torch.randperm(windows, generator=generator) for _ in range(-(-needed // windows))]
    return torch.cat(passes)[:needed]


class MicroBatches(Dataset):
    """Micro-batches in the order of training: ``accumulation`` of them make an optimiser step.

    Each holds ``tokens``, ``labels`` and, for packed examples, ``positions``, int64 of shape [rows,
    window], ``windows``: the windows' numbers, int64 [rows], and ``loss_tokens``: how many tokens
    count in the *whole* step, so that every token weighs the same whichever micro-batch it is in.
    """

    def __init__(self, windows: Windows, order: torch.Tensor, rows: int, accumulation: int = 1):
        self.windows = windows
        self.rows = order.view(-1, rows)
        self.loss_tokens = windows.loss_tokens[order].view(-1, rows * accumulation).sum(1).tolist()
        self.accumulation = accumulation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        chosen = self.rows[number]
        batch = {
            "tokens": self.windows.tokens[chosen].long(),
            "labels": self.windows.labels[chosen].long(),
            "windows": chosen,
            "loss_tokens": self.loss_tokens[number // self.accumulation],
        }
        if self.windows.positions is not None:
            batch["positions"] = self.windows.positions[chosen].long()
        return batch


def in_order(windows: Windows, rows: int) -> list[dict]:
    """Return all windows as batches of at most ``rows``, in their order, for validation."""
    whole, rest = divmod(len(windows), rows)
    order = torch.arange(len(windows))
    parts = [MicroBatches(windows, order[: whole * rows], rows)] if whole else []
    parts += [MicroBatches(windows, order[whole * rows :], rest)] if rest else []
    return [part[number] for part in parts for number in range(len(part))]


class WindowData(pl.LightningDataModule):
    """Hands out micro-batches (:class:`MicroBatches` or the like) in their order.

    batches: a data set of whole micro-batches with an ``accumulation``: how many of them make an
        optimiser step.
    first: number of the micro-batch to begin with, where a training goes on.
    """

    def __init__(self, batches: Dataset, first: int = 0):
        super().__init__()
        self.batches, self.first = batches, first

    def train_dataloader(self) -> DataLoader:
        order = range(self.first, len(self.batches))
        # A generator of its own: the loader draws a number from it, and a training that goes on
        # must draw as before.
        return DataLoader(self.batches, batch_size=None, sampler=order, generator=torch.Generator())

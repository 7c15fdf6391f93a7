"""The order of the windows, and the Lightning data module that hands them out."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from slim.data.packing import Windows


def window_order(windows: int, needed: int, seed: int) -> torch.Tensor:
    """Return the order in which windows are trained on: all in random order, again in another
    order, and so on.

    Args:
        windows: How many there are.
        needed: How many the training takes.
        seed: Of the order.

    Returns:
        int64 [needed], numbers of windows.
    """
    generator = torch.Generator().manual_seed(seed)
    passes = -(-needed // windows)
    orders = [torch.randperm(windows, generator=generator) for _ in range(passes)]
    return torch.cat(orders)[:needed]


class MicroBatches(Dataset):
    """Micro-batches in the order of training: ``accumulation`` of them make an optimiser step.

    Each holds ``tokens``, ``labels`` and, for packed examples, ``positions``, int64 [rows, window],
    ``windows``: the windows' numbers, int64 [rows], and ``loss_tokens``: how many tokens count in
    the *whole* step, so that every token weighs the same whichever micro-batch it is in.
    """

    def __init__(self, windows: Windows, order: torch.Tensor, rows: int, accumulation: int = 1):
        """Cut the order into micro-batches.

        Args:
            windows: The data.
            order: int64 [micro-batches * rows], numbers of windows.
            rows: Windows per micro-batch.
            accumulation: Micro-batches per optimiser step.
        """
        self.windows = windows
        self.rows = order.view(-1, rows)
        self.loss_tokens = windows.loss_tokens[order].view(-1, rows * accumulation).sum(1).tolist()
        self.accumulation = accumulation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        chosen = self.rows[number]
        batch = self.windows.batch(chosen)
        batch["windows"] = chosen
        batch["loss_tokens"] = self.loss_tokens[number // self.accumulation]
        return batch


def in_order(windows: Windows, rows: int) -> list[dict]:
    """Return all windows as batches in their order, for validation.

    Args:
        windows: The data.
        rows: Windows per batch; the last one may have fewer.
    """
    batches: list[dict] = []
    for first in range(0, len(windows), rows):
        order = torch.arange(first, min(first + rows, len(windows)))
        batches.append(MicroBatches(windows, order, len(order))[0])
    return batches


class WindowData(pl.LightningDataModule):
    """Hands out micro-batches in their order."""

    def __init__(self, batches: Dataset, first: int = 0):
        """Hand nothing out yet.

        Args:
            batches: A data set of micro-batches (:class:`MicroBatches` or the like) with an
                ``accumulation``: how many of them make an optimiser step.
            first: Number of the micro-batch to begin with, where a training is resumed.
        """
        super().__init__()
        self.batches = batches
        self.first = first

    def train_dataloader(self) -> DataLoader:
        order = range(self.first, len(self.batches))
        # A generator of its own: the loader draws a number from it, and a training that is resumed
        # must draw as before.
        return DataLoader(self.batches, batch_size=None, sampler=order, generator=torch.Generator())

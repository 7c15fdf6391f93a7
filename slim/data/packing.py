"""Packing: variable-length token lists into full windows, so that no computation is spent on
padding.

Plain text is *concatenated*: documents follow each other with the end token between them, cut into
full windows. Examples with answers are packed *separately*: several fit into one window, each with
positions that start at 0. Given such positions, no attention mask and no cache, transformers lets
no token see another example (tested: losses equal those of the unpacked examples).

Labels follow the convention of transformers: ``labels[t]`` is the token at ``t`` or ``IGNORE``, and
the model's output at ``t - 1`` is what predicts it. The first token of a window or of an example
has no prediction and never counts."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

IGNORE = -100  # label of a token without loss, as in torch's cross entropy


@dataclass(frozen=True)
class Example:
    """Tokens of one example and as many labels: the token itself where it counts, ``IGNORE``
    elsewhere."""

    tokens: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def cut(self, length: int) -> Example:
        """Return the first ``length`` tokens with their labels."""
        return Example(self.tokens[:length], self.labels[:length])

    def followed_by(self, token: int) -> Example:
        """Return the example with one more token that counts."""
        return Example([*self.tokens, token], [*self.labels, token])

    def has_loss(self) -> bool:
        """Whether anything after the first token counts."""
        return any(label != IGNORE for label in self.labels[1:])


@dataclass(frozen=True)
class Windows:
    """Windows of equal length, ready to be batched.

    Attributes:
        tokens: int32 [windows, length].
        labels: int32 [windows, length]; ``IGNORE`` where there is no loss.
        positions: int32 [windows, length], from 0 in every sequence; None where each window is one
            sequence.
        counts: what went in and what did not: ``examples`` or ``documents``, ``cut``, ``dropped``,
            ``unanswered``, ``padding`` or ``left_over`` tokens, and lengths.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def loss_tokens(self) -> torch.Tensor:
        """Number of tokens per window that count in the loss: int64 of shape [windows]."""
        return (self.labels[:, 1:] != IGNORE).sum(1)

    def batch(self, chosen: torch.Tensor) -> dict:
        """Return some windows as a batch: ``tokens``, ``labels`` and, for packed examples,
        ``positions``, int64 [rows, length].

        Args:
            chosen: int64 [rows], numbers of windows.
        """
        batch = {"tokens": self.tokens[chosen].long(), "labels": self.labels[chosen].long()}
        if self.positions is not None:
            batch["positions"] = self.positions[chosen].long()
        return batch

    @property
    def utilisation(self) -> float:
        """Share of the window positions that hold a token of an example (the rest is padding)."""
        return 1 - self.counts.get("padding", 0) / max(1, self.tokens.numel())


def concatenate(
    documents: Iterable[Sequence[int]], window: int, end: int, limit: int | None = None
) -> Windows:
    """Join documents, each followed by the end token, and cut the stream into windows without
    padding.

    A document's rest is carried into the next window; what does not fill the last window is left
    over and counted.

    Args:
        documents: tokens of each; may be endless.
        window: tokens per window.
        end: the end token; a document that ends with it gets no second one.
        limit: stop reading once the windows hold this many tokens; None: read all.
    """
    stream = array("i")  # 4 bytes a token, where a list takes up to 36
    count = 0
    enough = None if limit is None else math.ceil(limit / window) * window
    for document in documents:
        if enough is not None and len(stream) >= enough:
            break
        stream.extend(document)
        if not document or document[-1] != end:
            stream.append(end)
        count += 1
    available = len(stream) if enough is None else min(enough, len(stream))
    full = available // window
    tokens = torch.empty(0, dtype=torch.int32)
    if full:  # an empty buffer cannot be wrapped
        tokens = torch.frombuffer(stream, dtype=torch.int32)[: full * window]
    tokens = tokens.view(full, window)
    counts = {"documents": count, "left_over": len(stream) - full * window}
    return Windows(tokens, tokens, counts=counts)


def best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Distribute items over bins: the longest first, each into the fullest bin that has room.

    (Best fit decreasing; needs at most 11/9 of the smallest possible number of bins, plus a
    constant.)

    Args:
        lengths: of the items.
        window: size of every bin.

    Returns:
        The indices of the items in each bin.

    Raises:
        ValueError: for an item longer than a bin.
    """
    if any(length > window for length in lengths):
        raise ValueError(f"an item of {max(lengths)} does not fit into {window}")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free space -> bins that have exactly this much
    spaces: list[int] = []  # the keys of with_room, sorted
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(spaces, lengths[item])
        if place == len(spaces):  # no bin has room
            number = len(bins)
            space = window
            bins.append([])
        else:
            space = spaces[place]
            number = with_room[space].pop()
            if not with_room[space]:
                del with_room[space], spaces[place]
        bins[number].append(item)
        left = space - lengths[item]
        if left not in with_room:
            with_room[left] = []
            insort(spaces, left)
        with_room[left].append(number)
    return bins


def separate(examples: Sequence[Example], window: int, pad: int) -> Windows:
    """Pack examples into windows in which each has its own positions, starting at 0.

    Args:
        examples: none longer than the window.
        window: tokens per window.
        pad: token that fills what is left of a window; it forms a sequence of its own without loss.

    Raises:
        ValueError: for an example longer than the window.
    """
    bins = best_fit([len(example.tokens) for example in examples], window)
    tokens: list[list[int]] = []
    labels: list[list[int]] = []
    positions: list[list[int]] = []
    padding = 0
    for members in bins:
        row, row_labels, row_positions = [], [], []
        for index in sorted(members):
            example = examples[index]
            row.extend(example.tokens)
            # nothing predicts an example's first token
            row_labels.extend([IGNORE, *example.labels[1:]][: len(example)])
            row_positions.extend(range(len(example)))
        free = window - len(row)
        padding += free
        tokens.append(row + [pad] * free)
        labels.append(row_labels + [IGNORE] * free)
        positions.append(row_positions + list(range(free)))
    return Windows(
        _as_rows(tokens, window),
        _as_rows(labels, window),
        _as_rows(positions, window),
        counts={"examples": len(examples), "padding": padding},
    )


def _as_rows(rows: list[list[int]], window: int) -> torch.Tensor:
    """Return rows as int32 [rows, window], also where there is none."""
    return torch.tensor(rows, dtype=torch.int32).view(-1, window)


def fit_length(
    examples: Iterable[Example], window: int, long: str, limit: int | None = None
) -> tuple[list[Example], dict[str, int]]:
    """Make every example fit into a window. What has no token with loss (left) is dropped.

    Args:
        examples: may be endless.
        window: tokens per window.
        long: ``"cut"`` or ``"drop"``: what to do with an example that is longer.
        limit: stop reading once the examples that fit have this many tokens; None: read all.

    Returns:
        The examples, and how many were ``cut`` and ``dropped``.
    """
    fitting: list[Example] = []
    counts = {"cut": 0, "dropped": 0}
    tokens = 0
    for example in examples:
        is_long = len(example.tokens) > window
        if is_long:
            example = example.cut(window)
        if (is_long and long == "drop") or not example.has_loss():
            counts["dropped"] += 1
            continue
        counts["cut"] += is_long
        fitting.append(example)
        tokens += len(example)
        if limit is not None and tokens >= limit:
            break
    return fitting, counts

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

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
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

    tokens, labels: int32 of shape [windows, length]. positions: the same, or None where each window
        is one sequence.
    counts: what went in and what did not: examples, cut, dropped, tokens left over.
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

    @property
    def utilisation(self) -> float:
        """Share of the window positions that hold a token of an example (the rest is padding)."""
        return 1 - self.counts.get("padding", 0) / max(1, self.tokens.numel())


def concatenate(
    documents: Iterable[Sequence[int]], window: int, end: int, limit: int | None = None
) -> Windows:
    """Join documents, each followed by the token ``end``, and cut the stream into windows without
    padding.

    A document's rest is carried into the next window; what does not fill the last window is left
    over and counted.
    limit: stop reading ``documents`` (which may be endless) once the windows hold this many tokens;
    None reads all."""
    stream = array("i")  # 4 bytes a token, where a list takes up to 36
    count = 0
    enough = None if limit is None else -(-limit // window) * window
    for document in documents:
        if enough is not None and len(stream) >= enough:
            break
        stream.extend(document)
        if not document or document[-1] != end:
            stream.append(end)
        count += 1
    full = (len(stream) if enough is None else min(enough, len(stream))) // window
    tokens = (
        torch.frombuffer(stream, dtype=torch.int32)[: full * window]
        if full
        else torch.empty(0, dtype=torch.int32)
    )
    tokens = tokens.view(full, window)
    return Windows(
        tokens, tokens, counts={"documents": count, "left_over": len(stream) - full * window}
    )


def best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Distribute items over bins of size ``window``: the longest first, each into the fullest bin
    that has room.

    (Best fit decreasing; needs at most 11/9 of the smallest possible number of bins, plus a
    constant.) Returns the indices in each bin. Raises ValueError for an item longer than a bin."""
    if any(length > window for length in lengths):
        raise ValueError(f"an item of {max(lengths)} does not fit into {window}")
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # free space -> bins that have exactly this much
    spaces: list[int] = []  # the keys of with_room, sorted
    for item in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(spaces, lengths[item])
        if place == len(spaces):
            number, space = len(bins), window
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

    pad: token that fills what is left of a window; it forms a sequence of its own without loss.
    Raises ValueError for an example longer than the window.
    """
    bins = best_fit([len(example.tokens) for example in examples], window)
    tokens, labels, positions = [], [], []
    padding = 0
    for members in bins:
        packed = [examples[index] for index in sorted(members)]
        free = window - sum(len(example.tokens) for example in packed)
        padding += free
        tokens.append(
            [*chain.from_iterable(example.tokens for example in packed), *repeat(pad, free)]
        )
        first_ignored = ([IGNORE, *example.labels[1:]] for example in packed)
        labels.append([*chain.from_iterable(first_ignored), *repeat(IGNORE, free)])
        sizes = [len(example.tokens) for example in packed] + [free]
        positions.append(list(chain.from_iterable(range(size) for size in sizes)))
    as_tensor = (
        torch.tensor(rows, dtype=torch.int32).view(-1, window)
        for rows in (tokens, labels, positions)
    )
    return Windows(*as_tensor, counts={"examples": len(examples), "padding": padding})


def fit_length(
    examples: Iterable[Example], window: int, long: str, limit: int | None = None
) -> tuple[list[Example], dict[str, int]]:
    """Make every example fit into a window: those that are longer are cut at the end or dropped.

    long: ``"cut"`` or ``"drop"``. What has no token with loss (left) is dropped as well.
    limit: stop reading ``examples`` (which may be endless) once those kept have this many tokens;
    None reads all. Returns the examples and the counts of those cut and dropped."""
    kept: list[Example] = []
    counts = {"cut": 0, "dropped": 0}
    tokens = 0
    for example in examples:
        too_long = len(example.tokens) > window
        fitting = example.cut(window) if too_long else example
        if (too_long and long == "drop") or not fitting.has_loss():
            counts["dropped"] += 1
        else:
            counts["cut"] += too_long
            kept.append(fitting)
            tokens += len(fitting)
            if limit is not None and tokens >= limit:
                break
    return kept, counts

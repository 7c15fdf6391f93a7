"""The bases of all training data: plain text (loss on every token) and conversations (loss on the
answers only).

Each choice of the ``data`` group gives windows of tokens for training and, kept apart from them,
for validation and for a test: from splits of their own, or from shares of the documents chosen by a
hash of their content, so that a document and its copies are always on the same side."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from slim.core.errors import SlimError
from slim.core.settings import dataclass_cache_key
from slim.data.chat import Message, turns
from slim.data.encoding import encode_conversations, encode_documents, end_token
from slim.data.packing import Windows, concatenate, fit_length, separate

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)

Sized = TypeVar("Sized")


class TrainingData:
    """Base of the data choices.

    Attributes:
        endless: whether training text never ends, so that epochs mean nothing.
        title: what to call the data in messages.
    """

    endless = False
    title = "The data"

    def cache_key(self) -> dict:
        return dataclass_cache_key(self)

    def windows(self, part: str, tokenizer, window: int, tokens: int | None = None) -> Windows:
        """Return a part of the data as windows of tokens.

        Args:
            part: ``"train"``, ``"validation"`` or ``"test"``.
            tokenizer: the model's.
            window: tokens per window.
            tokens: about how many are enough; None: all there are.

        Raises:
            SlimError: naming the data, when nothing is left to learn from.
        """
        windows = self.build(part, tokenizer, window, tokens)
        counts = _listed(windows.counts)
        if len(windows) == 0:
            raise SlimError(
                f"{self.title} gives no {part} window of {window} tokens ({counts}). "
                f"Give more data or a smaller tuner.window."
            )
        if not bool((windows.loss_tokens > 0).all()):
            raise SlimError(f"{self.title} has {part} windows without a token to learn ({counts}).")
        return windows

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        """Make the windows; arguments as in :meth:`windows`."""
        raise NotImplementedError


class PlainText(TrainingData):
    """Documents, concatenated into windows; every token counts."""

    def documents(self, part: str) -> Iterator[str]:
        """Yield the documents of a part."""
        raise NotImplementedError

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        lengths = array("q")
        encoded = _measured(encode_documents(tokenizer, self.documents(part)), lengths)
        packed = concatenate(encoded, window, end_token(tokenizer), tokens)
        return replace(packed, counts={**packed.counts, **length_counts(lengths)})


class Conversations(TrainingData):
    """Questions with answers, packed separately; only answers count.

    Attributes:
        long: what to do with a conversation longer than a window: ``"cut"`` its end off or
            ``"drop"`` it.
    """

    long: str

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of conversations that have one of each; the answer is empty where
        there is none."""
        raise NotImplementedError

    def conversations(self, part: str) -> Iterator[list[Message]]:
        """Yield the messages of every conversation, an answer last; an empty list where there is no
        answer."""
        for prompt, answer in self.pairs(part):
            yield turns(prompt, answer) if answer.strip() else []

    def questions(self, part: str) -> Iterator[str]:
        """Yield the prompts alone, for a model to answer."""
        return (prompt for prompt, _ in self.pairs(part))

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        lengths = array("q")
        unanswered = {"unanswered": 0}
        answered = _answered(self.conversations(part), unanswered)
        examples = _measured(encode_conversations(tokenizer, answered, self.title), lengths)
        fitting, counts = fit_length(examples, window, self.long, tokens)
        counts |= unanswered
        if not fitting:
            raise SlimError(
                f"{self.title} has no {part} example with an answer that fits into {window} tokens "
                f"({_listed(counts)}). "
                "Check the columns of prompt and answer, or raise tuner.window."
            )
        packed = separate(fitting, window, end_token(tokenizer))
        return replace(packed, counts={**packed.counts, **counts, **length_counts(lengths)})


def _answered(
    conversations: Iterable[list[Message]], counts: dict[str, int]
) -> Iterator[list[Message]]:
    """Yield conversations that have an answer, and count the others."""
    for messages in conversations:
        if messages:
            yield messages
        else:
            counts["unanswered"] += 1


def _measured(items: Iterable[Sized], lengths: array) -> Iterator[Sized]:
    """Yield the items (token lists or examples) and write their lengths down."""
    for item in items:
        lengths.append(len(item))
        yield item


def length_counts(lengths: array) -> dict[str, int]:
    """Return how long documents or examples are, in tokens.

    Returns:
        ``median_length``, ``p95_length`` (95th percentile, nearest rank) and ``longest``; empty
        where there are no lengths.
    """
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {
        "median_length": _percentile(ordered, 50),
        "p95_length": _percentile(ordered, 95),
        "longest": ordered[-1],
    }


def _percentile(ordered: list[int], percent: int) -> int:
    """Return the nearest-rank percentile of ascending numbers: the rank is rounded up."""
    rank = -(-percent * len(ordered) // 100)
    return ordered[rank - 1]


def share_of(text: str, seed: int) -> float:
    """Return where a document lies between 0 and 1 (not included): a fixed function of its text and
    the seed."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_validation(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation share."""
    return share_of(text, seed) < fraction


def is_test(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the test share, which lies at the other end."""
    return share_of(text, seed) >= 1 - fraction


def _listed(counts: dict[str, int]) -> str:
    """Return counts as text."""
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items())

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
from slim.data.encoding import Message, encode_conversations, encode_documents, end_token, turns
from slim.data.packing import Windows, concatenate, fit_length, separate

TRAIN, VALIDATION, TEST = "train", "validation", "test"
PARTS = (TRAIN, VALIDATION, TEST)

Sized = TypeVar("Sized")


class TrainingData:
    """Base of the data choices.

    endless: whether training text never ends, so that epochs mean nothing. title: what to call the
    data in messages."""

    endless = False
    title = "The data"

    def cache_key(self) -> dict:
        return dataclass_cache_key(self)

    def windows(self, part: str, tokenizer, window: int, tokens: int | None = None) -> Windows:
        """Return ``part`` (``"train"``, ``"validation"`` or ``"test"``) as windows of ``window``
        tokens.

        tokens: about how many are enough; None for all there are.
        Raises ``SlimError`` naming the data if nothing is left to learn from.
        """
        found = self.build(part, tokenizer, window, tokens)
        if len(found) == 0:
            raise SlimError(
                f"{self.title} gives no {part} window of {window} tokens ({_shown(found.counts)}). "
                f"Give more data or a smaller tuner.window."
            )
        if not bool((found.loss_tokens > 0).all()):
            raise SlimError(
                f"{self.title} has {part} windows without a token to learn ({_shown(found.counts)})."
            )
        return found

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        raise NotImplementedError


class PlainText(TrainingData):
    """Documents, concatenated into windows; every token counts."""

    def documents(self, part: str) -> Iterator[str]:
        raise NotImplementedError

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        lengths = array("q")
        encoded = _measured(encode_documents(tokenizer, self.documents(part)), lengths)
        packed = concatenate(encoded, window, end_token(tokenizer), tokens)
        return replace(packed, counts={**packed.counts, **length_counts(lengths)})


class Conversations(TrainingData):
    """Questions with answers, packed separately; only answers count.

    long: what to do with a conversation longer than a window: ``"cut"`` its end off or ``"drop"``
    it."""

    long: str

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        """Yield prompt and answer of conversations that have one of each; the answer is empty where
        there is none."""
        raise NotImplementedError

    def conversations(self, part: str) -> Iterator[list[Message]]:
        """Yield the messages of every conversation, an answer last; an empty list where there is no
        answer."""
        return (
            turns(prompt, answer) if answer.strip() else [] for prompt, answer in self.pairs(part)
        )

    def questions(self, part: str) -> Iterator[str]:
        """Yield the prompts alone, for a model to answer."""
        return (prompt for prompt, _ in self.pairs(part))

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        lengths, seen = array("q"), {"unanswered": 0}
        answered = _answered(self.conversations(part), seen)
        examples = _measured(encode_conversations(tokenizer, answered), lengths)
        kept, counts = fit_length(examples, window, self.long, tokens)
        counts |= seen
        if not kept:
            raise SlimError(
                f"{self.title} has no {part} example with an answer that fits into {window} tokens ({_shown(counts)}). "
                "Check the columns of prompt and answer, or raise tuner.window."
            )
        packed = separate(kept, window, end_token(tokenizer))
        return replace(packed, counts={**packed.counts, **counts, **length_counts(lengths)})


def _answered(found: Iterable[list[Message]], counts: dict[str, int]) -> Iterator[list[Message]]:
    """Yield conversations that have an answer, and count the others."""
    for messages in found:
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
    """Return how long documents or examples are, in tokens: median, 95th percentile (nearest rank)
    and longest."""
    if not lengths:
        return {}
    ordered = sorted(lengths)
    at = lambda percent: ordered[-(-percent * len(ordered) // 100) - 1]  # noqa: E731
    return {"median_length": at(50), "p95_length": at(95), "longest": ordered[-1]}


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


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items())

"""What a model is trained on: plain text (loss on every token) or conversations (loss on the answers only).

Each class is a choice of the ``data`` group. It gives windows of tokens for training and, kept apart from them, for
validation: from a split of its own, or from a share of the documents chosen by a hash of their content, so that a
document and its copies are always on the same side.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from slim.checkpoint import sha256
from slim.data.encoding import encode_documents, encode_pairs, end_token
from slim.data.packing import Windows, concatenate, fit_length, separate
from slim.data.text import Text
from slim.errors import SlimError
from slim.settings import dataclass_identity, require_choice, require_number

TRAIN, VALIDATION = "train", "validation"
WORLD = Path(__file__).parent.parent / "world"


class TrainingData:
    """Base of the data choices.

    endless: whether training text never ends, so that epochs mean nothing. title: what to call the data in messages.
    """

    endless = False
    title = "The data"

    def identity(self) -> dict:
        return dataclass_identity(self)

    def windows(self, part: str, tokenizer, window: int, tokens: int | None = None) -> Windows:
        """Return ``part`` (``"train"`` or ``"validation"``) as windows of ``window`` tokens.

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
            raise SlimError(f"{self.title} has {part} windows without a token to learn ({_shown(found.counts)}).")
        return found

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        raise NotImplementedError


class PlainText(TrainingData):
    """Documents, concatenated into windows; every token counts."""

    def documents(self, part: str) -> Iterator[str]:
        raise NotImplementedError

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        encoded = encode_documents(tokenizer, self.documents(part))
        return concatenate(encoded, window, end_token(tokenizer), tokens)


class Conversations(TrainingData):
    """Prompts with answers, packed separately; only answers count.

    long: what to do with a conversation longer than a window: ``"cut"`` its end off or ``"drop"`` it.
    """

    long: str

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        raise NotImplementedError

    def questions(self, part: str) -> Iterator[str]:
        """Yield the prompts alone, for a model to answer."""
        return (prompt for prompt, _ in self.pairs(part))

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> Windows:
        answered = ((prompt, answer) for prompt, answer in self.pairs(part) if answer.strip())
        examples = _up_to(encode_pairs(tokenizer, answered), tokens)
        kept, counts = fit_length(examples, window, self.long)
        if not kept:
            raise SlimError(
                f"{self.title} has no {part} example with an answer that fits into {window} tokens ({_shown(counts)}). "
                "Check the columns of prompt and answer, or raise tuner.window."
            )
        packed = separate(kept, window, end_token(tokenizer))
        return replace(packed, counts={**packed.counts, **counts})


def _up_to(examples: Iterable, tokens: int | None) -> Iterator:
    """Yield examples until they hold ``tokens`` tokens."""
    seen = 0
    for example in examples:
        if tokens is not None and seen >= tokens:
            return
        seen += len(example.tokens)
        yield example


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counts.items())


# The tiny world


def world_checksum() -> str:
    """Return the SHA-256 of the generator: another generator is another text."""
    digest = hashlib.sha256()
    for path in sorted(WORLD.glob("*.py")):
        digest.update(path.name.encode() + sha256(path).encode())
    return digest.hexdigest()


@dataclass
class TinyText(PlainText):
    """Documents of the tiny world, generated as they are needed; about one in seven is a conversation.

    world: seed of the world. seed: of the documents.
    Validation is text from the calibration split, in wordings that training never shows.
    """

    world: int = 0
    seed: int = 0
    endless = True
    title = "The text of the tiny world"

    def __post_init__(self) -> None:
        require_number("data.world", self.world, 0, integer=True)
        require_number("data.seed", self.seed, 0, integer=True)

    def identity(self) -> dict:
        return {**dataclass_identity(self), "generator": world_checksum()}

    def documents(self, part: str) -> Iterator[str]:
        from slim.world import World

        # One document seed further, so that validation is not the very text that quantisers calibrate on.
        split, seed = ("train", self.seed) if part == TRAIN else ("calibration", self.seed + 1)
        return World(self.world).documents(split, seed)


@dataclass
class TinyChat(Conversations):
    """Questions about the tiny world with their answers.

    world: seed of the world. seed: of the questions. long: ``cut`` or ``drop`` what exceeds the window.
    """

    world: int = 0
    seed: int = 0
    long: str = "drop"
    endless = True
    title = "The conversations of the tiny world"

    def __post_init__(self) -> None:
        require_number("data.world", self.world, 0, integer=True)
        require_number("data.seed", self.seed, 0, integer=True)
        require_choice("data.long", self.long, ("cut", "drop"))

    def identity(self) -> dict:
        return {**dataclass_identity(self), "generator": world_checksum()}

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        from slim.world import World

        return World(self.world).conversations(part, self.seed)


# Files and data sets


@dataclass
class TextData(PlainText):
    """Plain text from a file or a data set.

    text, subset, split, column: as in :class:`slim.data.text.Text`.
    validation_split: split of a data set to validate on; None takes ``validation_fraction`` of the documents instead.
    passage: characters; the text is joined and cut at line ends into documents of about this length. 0 leaves the
        documents as they are. A ``.txt`` file, being one document, is always cut.
    seed: of the order of the documents and of the choice of those for validation.
    """

    text: str = ""
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    validation_split: str | None = None
    validation_fraction: float = 0.05
    passage: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_source(self.text, "a .txt or .jsonl file, or the id of a hub data set")
        _require_split(self.validation_split, self.validation_fraction, self.seed)
        require_number("data.passage", self.passage, 0, integer=True)
        self.source(self.split)

    @property
    def title(self) -> str:
        return f"The text {self.text}"

    def source(self, split: str) -> Text:
        return Text(self.text, self.subset, split, self.column)

    def identity(self) -> dict:
        own = {name: getattr(self, name) for name in ("validation_split", "passage", "seed")}
        own["validation_fraction"] = None if self.validation_split else self.validation_fraction
        return {"class": type(self).__name__, **self._text_identity, **own}

    @cached_property
    def _text_identity(self) -> dict:
        return self.source(self.split).text_identity()

    def documents(self, part: str) -> Iterator[str]:
        split = self.validation_split if part == VALIDATION and self.validation_split else self.split
        source = self.source(split)
        documents: Iterable[str] = source.documents()
        single = source.path is not None and source.path.suffix == ".txt"
        if self.passage or single:
            documents = passages(documents, self.passage or 4000)
        chosen = [text for text in documents if text.strip()]
        if not self.validation_split:
            chosen = [text for text in chosen if self._belongs(text, part)]
        random.Random(f"{self.seed}/order").shuffle(chosen)
        return iter(chosen)

    def _belongs(self, text: str, part: str) -> bool:
        return is_validation(text, self.validation_fraction, self.seed) == (part == VALIDATION)


@dataclass
class Pairs(Conversations):
    """Prompts and answers from a JSONL file or a data set.

    text, subset, split: file or data set, as in :class:`slim.data.text.Text`.
    prompt, answer: names of the columns; without an answer (None) there are questions only.
    context: a column that is appended to the prompt where it is not empty.
    validation_split: split of a data set to validate on; None takes ``validation_fraction`` of the pairs instead.
    long: ``cut`` or ``drop`` what exceeds the window. seed: of the order and of the choice for validation.
    """

    text: str = ""
    subset: str | None = None
    split: str = "train"
    prompt: str = "prompt"
    answer: str | None = "answer"
    context: str | None = None
    validation_split: str | None = None
    validation_fraction: float = 0.05
    long: str = "drop"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_source(self.text, "a .jsonl file or the id of a hub data set")
        _require_split(self.validation_split, self.validation_fraction, self.seed)
        require_choice("data.long", self.long, ("cut", "drop"))
        path = self.source(self.split).path
        if path is not None and path.is_file() and path.suffix == ".txt":
            raise SlimError(f"{self.text} is plain text without answers. Use data=text for it, or give a .jsonl file.")

    @property
    def title(self) -> str:
        return f"The data {self.text}"

    def source(self, split: str) -> Text:
        return Text(self.text, self.subset, split, self.prompt)

    def identity(self) -> dict:
        own = {name: getattr(self, name) for name in ("answer", "context", "validation_split", "long", "seed")}
        own["validation_fraction"] = None if self.validation_split else self.validation_fraction
        return {"class": type(self).__name__, **self._text_identity, **own}

    @cached_property
    def _text_identity(self) -> dict:
        return self.source(self.split).text_identity()

    def pairs(self, part: str) -> Iterator[tuple[str, str]]:
        if self.answer is None:
            raise SlimError(
                f"{self.title} has no answers (data.answer=null). Use teacher=on_policy, which makes them, or name the column."
            )
        found = self._rows(part)
        if not any(answer.strip() for _, answer in found):
            raise SlimError(f"{self.title} has no answers: column '{self.answer}' is empty in all {len(found)} rows.")
        return self._chosen(found, part)

    def questions(self, part: str) -> Iterator[str]:
        return (prompt for prompt, _ in self._chosen(self._rows(part), part))

    def _rows(self, part: str) -> list[tuple[str, str]]:
        """Return all prompts of the part's split with their answers, empty where there are none."""
        split = self.validation_split if part == VALIDATION and self.validation_split else self.split
        return [self._pair(row) for row in self.source(split).rows()]

    def _chosen(self, found: list[tuple[str, str]], part: str) -> Iterator[tuple[str, str]]:
        """Yield those that belong to the part, in random order."""
        if not self.validation_split:
            found = [pair for pair in found if self._belongs(pair[0], part)]
        random.Random(f"{self.seed}/order").shuffle(found)
        return iter(found)

    def _belongs(self, prompt: str, part: str) -> bool:
        return is_validation(prompt, self.validation_fraction, self.seed) == (part == VALIDATION)

    def _pair(self, row: dict) -> tuple[str, str]:
        for column in filter(None, (self.prompt, self.answer, self.context)):
            if column not in row:
                raise SlimError(
                    f"{self.title} has no column '{column}' (has: {', '.join(row)}). "
                    "Set data.prompt=... and data.answer=... to the columns of the question and of the answer."
                )
        prompt, answer = (str(row[column] or "") if column else "" for column in (self.prompt, self.answer))
        context = str(row[self.context] or "").strip() if self.context else ""
        return (f"{prompt}\n\n{context}" if context else prompt), answer


def passages(documents: Iterable[str], length: int) -> Iterator[str]:
    """Join documents and cut them again at line ends into pieces of about ``length`` characters."""
    lines: list[str] = []
    size = 0
    for document in documents:
        for line in (document if document.endswith("\n") else document + "\n").splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= length:
                yield "".join(lines)
                lines, size = [], 0
    if lines:
        yield "".join(lines)


def is_validation(text: str, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation share: a fixed function of its text and the seed."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _require_source(text: str, allowed: str) -> None:
    if not isinstance(text, str) or not text:
        raise SlimError(f"This data needs data.text=...: {allowed}.")


def _require_split(validation_split: str | None, fraction: float, seed: int) -> None:
    require_number("data.seed", seed, 0, integer=True)
    if validation_split is None:
        require_number("data.validation_fraction", fraction, 0.001, 0.5)

"""Texts with labels: what a classifier learns and is measured on.

A label is a class. Which classes there are and in which order is the model's matter once it has a
head (``id2label`` in its ``config.json``); the data only names them.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError, did_you_mean
from slim.core.lazy import LazyModule
from slim.core.settings import dataclass_cache_key, require_choice, require_number
from slim.data.base import TEST, TRAIN, VALIDATION, TrainingData, share_of
from slim.data.calibration import SHORTEST
from slim.data.cells import as_text
from slim.data.corpus import Corpus
from slim.data.packing import IGNORE, Windows

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.checkpoint import Checkpoint
else:
    torch = LazyModule("torch")

BALANCED = "balanced"
MOST_CLASSES = 1000  # more are numbers or names that nobody learns as classes
NAMED = 8  # classes in a message


@dataclass(frozen=True)
class LabelledText:
    """One example.

    Attributes:
        text: What is read.
        label: Its class.
        second: What is read with it, for pairs; None: there is no second text.
    """

    text: str
    label: str
    second: str | None = None


@dataclass(frozen=True)
class LabelledWindows(Windows):
    """Texts of a classifier, one a row.

    ``tokens`` is int32 [texts, window], filled up with ``pad``; ``labels`` int32 [texts, 2]:
    nothing and the class, since a first token counts nowhere.

    Attributes:
        pad: The token that fills up.
        types: int32 [texts, window], 1 for tokens of a second text; None without second texts.
        names: Of the classes.
        weights: float32 [classes], what an example of each class counts in the loss; None: 1.
        texts: The first ones, for people.
    """

    pad: int = 0
    types: torch.Tensor | None = None
    names: Sequence[str] = ()
    weights: torch.Tensor | None = None
    texts: Sequence[str] = ()

    def batch(self, chosen: torch.Tensor) -> dict:
        tokens = self.tokens[chosen].long()
        mask = tokens != self.pad
        longest = max(1, int(mask.sum(1).max()))
        batch = {
            "tokens": tokens[:, :longest],
            "mask": mask[:, :longest],
            "labels": self.labels[chosen].long(),
        }
        if self.types is not None:
            batch["types"] = self.types[chosen, :longest].long()
        if self.weights is not None:
            batch["weights"] = self.weights[batch["labels"][:, 1]]
        return batch

    def shown(self, count: int) -> list[str]:
        """Return the first texts with their classes, for people.

        Args:
            count: How many at most.
        """
        lines = []
        for text, (_, label) in zip(self.texts[:count], self.labels.tolist(), strict=False):
            lines.append(f"«{text}» {self.names[label]}")
        return lines


class Labelled(TrainingData):
    """Base of texts with labels.

    Attributes:
        class_weights: ``balanced``: rare classes count more, so that all classes together count the
            same; class -> weight; None: every text counts the same.
    """

    class_weights: str | dict[str, float] | None = None

    def examples(self, part: str) -> Iterator[LabelledText]:
        """Yield the examples of a part, those to train on in random order."""
        raise NotImplementedError

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes of the training part, in order.

        Raises:
            SlimError: There is one only, or so many that they are no classes.
        """
        names = sorted({example.label for example in self.examples(TRAIN)}, key=_by_number)
        if len(names) < 2:
            shown = f"one class only ('{names[0]}')" if names else "no text with a label"
            raise SlimError(
                f"{self.title} has {shown} to train on, and a classifier needs two or more.\n"
                f"Give other data, or another column: data.label=..."
            )
        if len(names) > MOST_CLASSES:
            raise SlimError(
                f"{self.title} has {len(names)} different labels, such as '{names[0]}', "
                f"'{names[1]}': more than {MOST_CLASSES} are no classes.\n"
                "Set data.label=... to the column of the classes, or data.threshold=NUMBER to make "
                "two classes of numbers."
            )
        return names

    def check_classes(self, names: Sequence[str], model: str) -> None:
        """Check that a model knows all classes of the data.

        Args:
            names: The model's.
            model: What to call it.

        Raises:
            SlimError: It does not.
        """
        unknown = [name for name in self.classes if name not in names]
        if unknown:
            raise SlimError(
                f"{self.title} has the class '{unknown[0]}', and {model} knows "
                f"{listed(names)}.{did_you_mean(unknown[0], list(names))}\n"
                "Use data with the same classes, or a model without a head, which then gets one."
            )

    def labelled(
        self,
        part: str,
        tokenizer,
        window: int,
        tokens: int | None = None,
        names: Sequence[str] | None = None,
    ) -> LabelledWindows:
        """Return a part as tokens and numbers of classes.

        Args:
            part: ``train``, ``validation`` or ``test``.
            tokenizer: The model's.
            window: Tokens of a text at most; longer ones are cut.
            tokens: About how many are enough, each text counted as a window; None: all.
            names: The model's classes, in the order of its outputs; None: those of the data.

        Raises:
            SlimError: There is no text, or one of a class that the model does not know.
        """
        names = list(names or self.classes)
        limit = None if tokens is None else max(1, tokens // window)
        examples = list(itertools.islice(self.examples(part), limit))
        if not examples:
            raise SlimError(
                f"{self.title} has no {part} texts. Give more data, or another "
                f"data.{'validation' if part == VALIDATION else part}_fraction."
            )
        labels = []
        for example in examples:
            if example.label not in names:
                raise SlimError(
                    f"{self.title} has the class '{example.label}' in its {part} texts, and the "
                    f"model knows {listed(names)}.{did_you_mean(example.label, names)}"
                )
            labels.append([IGNORE, names.index(example.label)])
        encoded = encode(tokenizer, examples, window)
        counts = {"examples": len(examples), "cut": encoded.cut, "padding": encoded.padding}
        return LabelledWindows(
            encoded.tokens,
            torch.tensor(labels, dtype=torch.int32),
            counts=counts,
            pad=tokenizer.pad_token_id,
            types=encoded.types,
            names=names,
            weights=self._weights(names),
            texts=[example.text for example in examples[:3]],
        )

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> LabelledWindows:
        return self.labelled(part, tokenizer, window, tokens)

    def _weights(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return the weight of each class, of mean 1 over the training texts."""
        if self.class_weights is None:
            return None
        counts = Counter(example.label for example in self.examples(TRAIN))
        weights = dict.fromkeys(names, 0.0)
        total = 0.0
        for name, count in counts.items():
            weights[name] = 1 / count
            if self.class_weights != BALANCED:
                weights[name] = self.class_weights.get(name, 1.0)
            total += weights[name] * count
        mean = total / sum(counts.values())
        return torch.tensor([weights[name] for name in names]) / mean

    def _check_weights(self) -> None:
        if isinstance(self.class_weights, dict):
            for name, weight in self.class_weights.items():
                require_number(f"data.class_weights.{name}", weight, 0)
        else:
            require_choice("data.class_weights", self.class_weights, (None, BALANCED))


@dataclass(frozen=True)
class Encoded:
    """Texts as rows of tokens.

    Attributes:
        tokens: int32 [texts, window].
        types: int32 [texts, window], or None without second texts.
        cut: How many texts were longer.
        padding: Tokens that only fill up.
    """

    tokens: torch.Tensor
    types: torch.Tensor | None
    cut: int
    padding: int


def encode(tokenizer, examples: Sequence[LabelledText], window: int) -> Encoded:
    """Return texts as rows of tokens, with the special tokens that the tokenizer adds.

    Args:
        tokenizer: The model's.
        examples: One or two texts each.
        window: Tokens of a row.

    Raises:
        SlimError: The tokenizer has no token to fill up with.
    """
    if tokenizer.pad_token_id is None:
        raise SlimError(
            "The model's tokenizer has no padding token. Set pad_token in its "
            "tokenizer_config.json."
        )
    first = [example.text for example in examples]
    second = None
    if examples[0].second is not None:
        second = [example.second or "" for example in examples]
    encoded = tokenizer(
        first,
        second,
        truncation=True,
        max_length=window,
        padding="max_length",
        padding_side="right",
        return_token_type_ids=True,
        verbose=False,
    )
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int32)
    types = None
    if second is not None:
        types = torch.tensor(encoded["token_type_ids"], dtype=torch.int32)
        if not bool(types.any()):  # RoBERTa and others have none
            types = None
    filled = tokens != tokenizer.pad_token_id
    cut = int(filled.all(1).sum())
    return Encoded(tokens, types, cut, int((~filled).sum()))


@dataclass
class LabelledTexts(Labelled, Corpus):
    """Texts with labels of a file (CSV, JSON Lines, Parquet) or a data set of the hub.

    Attributes:
        column: Column of the text, or several that are joined by ``separator``.
        second: Column of a second text that is read with it; None: none.
        label: Column of the class.
        threshold: Where the column holds numbers: texts with at least so much are ``many``, others
            ``few``; None: the column holds classes.
        separator: Between the texts of several columns.
        class_weights: See :class:`Labelled`.
    """

    cache_name: ClassVar[str] = "LabelledTexts"

    column: str | list[str] = "text"
    second: str | None = None
    label: str = "label"
    threshold: float | None = None
    separator: str = " - "
    class_weights: str | dict[str, float] | None = None

    noun = "The data"
    allowed = "a .csv, .jsonl or .parquet file, or the id of a hub data set"

    def __post_init__(self) -> None:
        super().__post_init__()
        columns = [self.column] if isinstance(self.column, str) else list(self.column)
        if not columns or not all(isinstance(name, str) for name in columns):
            raise SlimError(
                f"data.column={self.column}: must be a column or a list, such as [title,text]."
            )
        self.columns = columns
        if self.threshold is not None:
            require_number("data.threshold", self.threshold, float("-inf"))
        self._check_weights()

    def cache_key(self) -> dict:
        names = ("second", "label", "threshold", "separator", "class_weights")
        return {**self.part_identity(*names), "column": self.columns}

    def check_row(self, row: dict, where: str) -> None:
        self._example(row, where)

    @cached_property
    def _parts(self) -> dict[str, list[LabelledText]]:
        return {}

    def examples(self, part: str) -> Iterator[LabelledText]:
        if part not in self._parts:
            chosen = []
            for example in self._all(part):
                if self.belongs(example.text, part):
                    chosen.append(example)
            self._parts[part] = list(self.shuffled(chosen))
        return iter(self._parts[part])

    def _all(self, part: str) -> Iterator[LabelledText]:
        for where, row in self.opened(part).located_rows():
            example = self._example(row, where)
            if example.text.strip() and example.label:
                yield example

    def _example(self, row: dict, where: str) -> LabelledText:
        """Return the text and the class of a row."""
        texts = [self._cell(row, name, "column", where) for name in self.columns]
        second = None
        if self.second is not None:
            second = self._cell(row, self.second, "second", where)
        label = self._cell(row, self.label, "label", where).strip()
        if self.threshold is not None and label:
            label = self._above(label, where)
        return LabelledText(self.separator.join(texts), label, second)

    def _cell(self, row: dict, column: str, setting: str, where: str) -> str:
        if column not in row:
            raise SlimError(
                f"{where}: no column '{column}' (has: {', '.join(map(str, row))}).\n"
                f"Set data.{setting}=... to one of them."
            )
        return as_text(row[column], f"{where}: column '{column}'")

    def _above(self, label: str, where: str) -> str:
        try:
            number = float(label.replace(",", "."))
        except ValueError:
            raise SlimError(
                f"{where}: data.threshold={self.threshold:g} needs numbers in column "
                f"'{self.label}', and '{label}' is none. Leave data.threshold at null for classes."
            ) from None
        return "many" if number >= self.threshold else "few"


TOPICS = {
    "politics": (("tax", "refugees", "the election", "the pension", "the budget"), 1.1),
    "climate": (("the speed limit", "heat pumps", "wind farms", "meat", "flights"), 1.4),
    "football": (("the derby", "the coach", "the penalty", "the transfer"), 0.7),
    "health": (("vaccines", "the hospital", "sugar", "sleep"), 0.3),
    "culture": (("the museum", "the opera", "a novel", "the festival"), -1.0),
    "science": (("a comet", "a fossil", "the telescope", "bees"), -0.9),
    "weather": (("rain", "the storm", "snow", "sunshine"), -1.2),
    "travel": (("the night train", "the island", "the harbour", "a lighthouse"), -0.6),
}
FORMS = (
    ("{thing}: what changes now", 0.0),
    ("Minister wants to ban {thing}", 1.2),
    ("Should {thing} be banned?", 1.5),
    ("Why we must talk about {thing}", 0.9),
    ("Outrage over {thing}", 1.3),
    ("{thing} in pictures", -1.2),
    ("A day with {thing}", -0.9),
    ("New figures on {thing}", -0.2),
    ("Who pays for {thing}?", 1.0),
    ("How {thing} came to {town}", -0.7),
    ("Experts disagree on {thing}", 0.6),
    ("{town} celebrates {thing}", -0.8),
)
TOWNS = ("Kiel", "Bremen", "Jena", "Ulm", "Trier", "Passau", "Emden", "Fulda")
MANY, FEW = "many", "few"
SHARES = {TRAIN: (0.0, 0.7), VALIDATION: (0.7, 0.8), TEST: (0.8, 1.0)}


@dataclass
class Headlines(Labelled):
    """Made-up headlines of a newspaper with its section and hour, and whether readers wrote many
    comments. About one in eight labels is chance: no model can know them.

    Attributes:
        count: How many there are, all parts together.
        many: Share of headlines with many comments, 0.05 to 0.95.
        noise: Spread of the chance in what readers do; the sections and forms have effects of 0.2
            to 1.5.
        seed: Of the headlines, 0 or more.
        class_weights: See :class:`Labelled`.
    """

    cache_name: ClassVar[str] = "Headlines"

    count: int = 4000
    many: float = 0.3
    noise: float = 0.5
    seed: int = 0
    class_weights: str | dict[str, float] | None = None
    title = "The set of made-up headlines"

    def __post_init__(self) -> None:
        require_number("data.count", self.count, 20, 10**6, integer=True)
        require_number("data.many", self.many, 0.05, 0.95)
        require_number("data.noise", self.noise, 0, 100)
        require_number("data.seed", self.seed, 0, integer=True)
        self._check_weights()

    def cache_key(self) -> dict:
        return dataclass_cache_key(self)

    @cached_property
    def rows(self) -> list[dict]:
        """All headlines: ``section``, ``hour``, ``headline``, ``comments`` (a number)."""
        draw = random.Random(f"headlines/{self.seed}")
        rows = []
        for _ in range(self.count):
            section = draw.choice(list(TOPICS))
            things, heat = TOPICS[section]
            form, effect = draw.choice(FORMS)
            text = form.format(thing=draw.choice(things), town=draw.choice(TOWNS))
            hour = draw.randrange(5, 24)
            evening = 0.4 if hour >= 17 else 0.0
            score = heat + effect + evening + draw.gauss(0, self.noise)
            comments = round(20 * 2.2**score)
            headline = text[0].upper() + text[1:]
            rows.append(
                {"section": section, "hour": hour, "headline": headline, "comments": comments}
            )
        return rows

    @cached_property
    def limit(self) -> int:
        """Comments from which on they are many."""
        ordered = sorted(row["comments"] for row in self.rows)
        return max(1, ordered[int(len(ordered) * (1 - self.many))])

    def examples(self, part: str) -> Iterator[LabelledText]:
        low, high = SHARES[part]
        for number, row in enumerate(self.rows):
            # by the number too: the same words come more than once
            if low <= share_of(f"{number}/{row['headline']}", self.seed) < high:
                label = MANY if row["comments"] >= self.limit else FEW
                text = f"{row['section']} | {row['hour']} h | {row['headline']}"
                yield LabelledText(text, label)


@dataclass
class LabelledCalibration:
    """Calibration samples for an encoder: the training texts of the task, one after another as the
    model reads them, cut into windows at random places.

    Attributes:
        data: The texts.
        samples: Number of windows, 1 or more.
        length: Tokens of a window, 8 or more; at most the model's context counts.
        seed: Of the places.
    """

    cache_name: ClassVar[str] = "LabelledCalibration"

    data: TrainingData = field(default_factory=TrainingData)
    samples: int = 128
    length: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        require_number("calibration.samples", self.samples, 1, integer=True)
        require_number("calibration.length", self.length, SHORTEST, integer=True)

    def cache_key(self) -> dict:
        return dataclass_cache_key(self)

    def tokens_for(self, source: Checkpoint) -> torch.Tensor:
        """Return the samples as tokens of a checkpoint, int64 [samples, length]."""
        from slim.checkpoints.tokenizer import load_tokenizer

        return self.tokens(load_tokenizer(source.folder), source.spec.context_length)

    def tokens(self, tokenizer, context_length: int) -> torch.Tensor:
        """Return the samples as tokens, int64 [samples, min(length, context_length)].

        Args:
            tokenizer: The model's.
            context_length: The model's, in tokens.

        Raises:
            SlimError: The texts fill no window.
        """
        length = min(self.length, context_length)
        texts = itertools.islice(self.data.examples(TRAIN), self.samples * length)
        stream: list[int] = []
        for ids in tokenizer([example.text for example in texts], verbose=False)["input_ids"]:
            stream.extend(ids)
        if len(stream) < length:
            raise SlimError(
                f"{self.data.title} has {len(stream)} tokens to calibrate on, fewer than one "
                f"sample of {length}. Give more data, or a smaller calibration.length."
            )
        ids = torch.tensor(stream)
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(0, len(ids) - length + 1, (self.samples,), generator=generator)
        return torch.stack([ids[start : start + length] for start in starts.tolist()])


def listed(names: Iterable[str]) -> str:
    """Return the names of classes for a message, the first few of many."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _by_number(name: str) -> tuple:
    """Order classes that are numbers as numbers."""
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)

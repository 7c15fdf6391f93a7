"""Pairs of texts with a score from 0 (unrelated) to 1 (the same): what bi-encoders and
cross-encoders learn and are measured on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import dataclass_cache_key, require_number
from slim.data.base import TEST, TRAIN, VALIDATION, TrainingData, share_of
from slim.data.cells import as_text
from slim.data.corpus import Corpus
from slim.data.labelled import LabelledText, encode
from slim.data.packing import IGNORE, Windows

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

SHOWN = 3  # pairs for people


@dataclass(frozen=True)
class Pair:
    """Two texts and how much they say the same.

    Attributes:
        text: The first, a query in a search.
        second: The second, a document in a search.
        score: From 0 to 1.
    """

    text: str
    second: str
    score: float


@dataclass(frozen=True)
class PairWindows(Windows):
    """Pairs of texts, one a row, filled up with ``pad``.

    ``tokens`` is int32 [pairs, window]: the first texts, or for a cross-encoder both; ``labels``
    int32 [pairs, 2] counts every pair once.

    Attributes:
        pad: The token that fills up.
        scores: float32 [pairs].
        second: int32 [pairs, window], the second texts; None for a cross-encoder.
        types: int32 [pairs, window], 1 for tokens of a second text, for a cross-encoder whose
            family has them; else None.
        pools_first: Whether a bi-encoder's vector of a text is that of its first token.
        texts: The first ones, for people.
    """

    pad: int = 0
    scores: torch.Tensor | None = None
    second: torch.Tensor | None = None
    types: torch.Tensor | None = None
    pools_first: bool = False
    texts: Sequence[str] = ()

    def batch(self, chosen: torch.Tensor) -> dict:
        tokens, mask = self._shortened(self.tokens[chosen])
        batch = {
            "tokens": tokens,
            "mask": mask,
            "labels": self.labels[chosen].long(),
            "scores": self.scores[chosen],
        }
        if self.second is not None:
            batch["second"], batch["second_mask"] = self._shortened(self.second[chosen])
            batch["pools_first"] = torch.tensor([self.pools_first] * len(chosen))
        if self.types is not None:
            batch["types"] = self.types[chosen, : tokens.shape[1]].long()
        return batch

    def _shortened(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and mask without columns that only fill up."""
        mask = tokens != self.pad
        longest = max(1, int(mask.sum(1).max()))
        return tokens[:, :longest].long(), mask[:, :longest]

    def shown(self, count: int) -> list[str]:
        """Return the first pairs with their scores, for people."""
        return list(self.texts[:count])


class Scored(TrainingData):
    """Base of pairs with scores."""

    def pairs(self, part: str) -> Iterator[Pair]:
        """Yield the pairs of a part."""
        raise NotImplementedError

    def examples(self, part: str) -> Iterator[LabelledText]:
        """Yield all texts of a part one by one, for calibration."""
        for pair in self.pairs(part):
            yield LabelledText(pair.text, "")
            yield LabelledText(pair.second, "")

    def scored(
        self,
        part: str,
        tokenizer,
        window: int,
        tokens: int | None,
        together: bool,
        pools_first: bool = False,
    ) -> PairWindows:
        """Return a part as tokens.

        Args:
            part: ``train``, ``validation`` or ``test``.
            tokenizer: The model's.
            window: Tokens of a text at most, of a cross-encoder of both.
            tokens: About how many are enough, each pair counted as a window; None: all.
            together: Whether both texts are read together, by a cross-encoder.
            pools_first: Whether a bi-encoder's vector of a text is that of its first token.

        Raises:
            SlimError: There is no pair.
        """
        limit = None if tokens is None else max(1, tokens // window)
        pairs = list(itertools.islice(self.pairs(part), limit))
        if not pairs:
            raise SlimError(f"{self.title} has no {part} pairs. Give more data.")
        second = types = None
        firsts, seconds, shown = [], [], []
        for pair in pairs:
            firsts.append(LabelledText(pair.text, "", pair.second if together else None))
            seconds.append(LabelledText(pair.second, ""))
            if len(shown) < SHOWN:
                shown.append(f"«{pair.text} / {pair.second}» {pair.score:g}")
        first = encode(tokenizer, firsts, window)
        if together:
            types = first.types
        else:
            second = encode(tokenizer, seconds, window).tokens
        return PairWindows(
            first.tokens,
            torch.tensor([[IGNORE, 0]] * len(pairs), dtype=torch.int32),
            counts={"examples": len(pairs), "cut": first.cut, "padding": first.padding},
            pad=tokenizer.pad_token_id,
            scores=torch.tensor([pair.score for pair in pairs]),
            second=second,
            types=types,
            pools_first=pools_first,
            texts=shown,
        )

    def build(self, part: str, tokenizer, window: int, tokens: int | None) -> PairWindows:
        return self.scored(part, tokenizer, window, tokens, together=False)


@dataclass
class ScoredPairs(Scored, Corpus):
    """Pairs with scores of a file (CSV, JSON Lines, Parquet) or a data set of the hub.

    Attributes:
        first: Column of the first text.
        second: Column of the second.
        score: Column of the score; None: all pairs belong together.
        highest: The score that means the same, such as 5 in STS-B.
    """

    cache_name: ClassVar[str] = "ScoredPairs"

    first: str = "sentence1"
    second: str = "sentence2"
    score: str | None = "score"
    highest: float = 1.0

    noun = "The data"
    allowed = "a .csv, .jsonl or .parquet file, or the id of a hub data set"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("data.highest", self.highest, 1e-9)

    def cache_key(self) -> dict:
        return {**self.part_identity("second", "score", "highest"), "column": self.first}

    def check_row(self, row: dict, where: str) -> None:
        self._pair(row, where)

    def pairs(self, part: str) -> Iterator[Pair]:
        chosen = []
        for where, row in self.opened(part).located_rows():
            pair = self._pair(row, where)
            if pair.text.strip() and pair.second.strip() and self.belongs(pair.text, part):
                chosen.append(pair)
        return self.shuffled(chosen)

    def _pair(self, row: dict, where: str) -> Pair:
        texts = []
        for setting, column in (("first", self.first), ("second", self.second)):
            if column not in row:
                raise SlimError(
                    f"{where}: no column '{column}' (has: {', '.join(map(str, row))}).\n"
                    f"Set data.{setting}=... to one of them."
                )
            texts.append(as_text(row[column], f"{where}: column '{column}'"))
        return Pair(*texts, self._score(row, where))

    def _score(self, row: dict, where: str) -> float:
        if self.score is None:
            return 1.0
        if self.score not in row:
            raise SlimError(
                f"{where}: no column '{self.score}' (has: {', '.join(map(str, row))}).\n"
                "Set data.score=... to one of them, or data.score=null where all pairs belong "
                "together."
            )
        try:
            value = float(row[self.score]) / self.highest
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value <= 1:
            raise SlimError(
                f"{where}: column '{self.score}' holds {row[self.score]!r}, no number from 0 to "
                f"{self.highest:g}. Set data.highest to the score that means the same."
            )
        return value


# what a sentence is made of, each with two wordings
WHO = (("A child", "A kid"), ("A woman", "A lady"), ("An old man", "A pensioner"),
       ("A doctor", "A physician"), ("A soldier", "A trooper"), ("A teacher", "A schoolmaster"),
       ("A policeman", "A cop"), ("A farmer", "A man who grows crops"))  # fmt: skip
DOES = (("is cooking", "prepares"), ("is buying", "purchases"), ("is painting", "draws"),
        ("is repairing", "fixes"), ("is carrying", "holds"), ("is selling", "offers for sale"),
        ("is washing", "cleans"), ("is hiding", "conceals"))  # fmt: skip
WHAT = (("a bicycle", "a bike"), ("soup", "a broth"), ("a sofa", "a couch"),
        ("a car", "an automobile"),
        ("a boat", "a small ship"), ("a picture", "an image"), ("a stone", "a rock"),
        ("a coat", "a jacket"), ("bread", "a loaf"), ("a lamp", "a light"))  # fmt: skip
WHERE = (("in the forest", "in the woods"), ("on the beach", "by the sea"),
         ("at home", "in the house"),
         ("in the city", "downtown"), ("in the garden", "in the yard"),
         ("at the station", "where trains stop"))  # fmt: skip
SLOTS = (WHO, DOES, WHAT, WHERE)
# how much of the meaning a slot is
WEIGHTS = (0.2, 0.25, 0.35, 0.2)
SHARES = {TRAIN: (0.0, 0.7), VALIDATION: (0.7, 0.8), TEST: (0.8, 1.0)}


@dataclass
class MadePairs(Scored):
    """Made-up pairs of sentences: who does what with which thing where, the second one worded
    otherwise, with some of the four changed. The score is the share that stayed, of weights 0.2,
    0.25, 0.35 and 0.2.

    Attributes:
        count: How many there are, all parts together.
        seed: Of the pairs, 0 or more.
    """

    cache_name: ClassVar[str] = "MadePairs"

    count: int = 2000
    seed: int = 0
    title = "The set of made-up pairs"

    def __post_init__(self) -> None:
        require_number("data.count", self.count, 20, 10**6, integer=True)
        require_number("data.seed", self.seed, 0, integer=True)

    def cache_key(self) -> dict:
        return dataclass_cache_key(self)

    @cached_property
    def _all(self) -> list[Pair]:
        draw = random.Random(f"pairs/{self.seed}")
        pairs = []
        for _ in range(self.count):
            meaning = [draw.randrange(len(slot)) for slot in SLOTS]
            changed = draw.choices((0, 1, 2, 3, 4), (3, 2, 2, 1, 1))[0]
            places = draw.sample(range(len(SLOTS)), changed)
            other = list(meaning)
            for place in places:
                step = draw.randrange(1, len(SLOTS[place]))
                other[place] = (meaning[place] + step) % len(SLOTS[place])
            score = 1.0 - sum(WEIGHTS[place] for place in places)
            pairs.append(Pair(sentence(meaning, 0), sentence(other, 1), round(score, 2)))
        return pairs

    def pairs(self, part: str) -> Iterator[Pair]:
        low, high = SHARES[part]
        for number, pair in enumerate(self._all):
            if low <= share_of(f"{number}/{pair.text}", self.seed) < high:
                yield pair


def sentence(meaning: Sequence[int], wording: int) -> str:
    """Return a sentence.

    Args:
        meaning: Number of the entry of each slot.
        wording: 0 or 1.
    """
    words = [slot[number][wording] for slot, number in zip(SLOTS, meaning, strict=True)]
    return f"{' '.join(words)}."

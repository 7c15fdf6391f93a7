"""How well an encoder tells which texts mean the same: rank correlation with given scores, and
search.

Spearman is the correlation of the ranks of predicted and given scores, ties sharing their mean
rank. For the search, the first text of every pair that means the same (score of at least
``relevant``) is a query, and the second texts of all pairs are the documents. With graded relevance
g (the given score of a pair; others count 0):

    recall@k   share of queries whose document is among the first k
    nDCG@k     sum over ranks r <= k of g_r / log2(r + 1), divided by that of the best order
               (Järvelin & Kekäläinen, 2002)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import cache_key, require_choice, require_number
from slim.data.base import PARTS, TEST
from slim.data.scored import Pair, Scored
from slim.loading.sentence import BiEncoder, CrossEncoder, require_bi_encoder, require_cross_encoder
from slim.models.encoders import CLASSES

if TYPE_CHECKING:
    import torch

    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")


@dataclass
class Retrieval:
    """Measures a bi-encoder or a cross-encoder on pairs with scores.

    Attributes:
        data: The pairs.
        part: Which of them: ``test``, ``validation`` or ``train``.
        limit: Pairs from the start, 2 or more; None: all.
        queries: Queries of the search, 1 or more; None: all.
        relevant: Least score of a pair that means the same, 0 to 1.
        k: Places of the search that count, for recall and nDCG.
        batch_size: Texts at once; changes figures by rounding only.
    """

    cache_name: ClassVar[str] = "Retrieval"

    data: object = field(default=None)
    part: str = TEST
    limit: int | None = None
    queries: int | None = 100
    relevant: float = 1.0
    k: int = 10
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.data, Scored):
            raise SlimError(
                "eval=similarity measures on pairs with scores. Use data=made_pairs or "
                "data=scored data.text=FILE.csv."
            )
        group = "eval.extra.retrieval"
        require_choice(f"{group}.part", self.part, PARTS)
        for name, low in (("k", 1), ("batch_size", 1)):
            require_number(f"{group}.{name}", getattr(self, name), low, integer=True)
        for name, low in (("limit", 2), ("queries", 1)):
            if getattr(self, name) is not None:
                require_number(f"{group}.{name}", getattr(self, name), low, integer=True)
        require_number(f"{group}.relevant", self.relevant, 0, 1)

    def cache_key(self) -> dict:
        names = ("part", "limit", "queries", "relevant", "k")
        settings = {name: getattr(self, name) for name in names}
        return {"data": cache_key(self.data), **settings}

    def check(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for a model that is neither a bi-encoder nor a cross-encoder."""
        if spec.top == CLASSES:
            require_cross_encoder(spec)
        else:
            require_bi_encoder(spec)

    def chosen(self) -> list[Pair]:
        """Return the pairs that are measured on. Raises ``SlimError`` for fewer than two, or scores
        that are all the same."""
        pairs = list(self.data.pairs(self.part))[: self.limit]
        if len(pairs) < 2:
            raise SlimError(
                f"{self.data.title} has {len(pairs)} {self.part} pairs; give two or more."
            )
        return pairs

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Return ``metrics``, ``protocol`` and ``records`` (predicted and given score of every
        pair)."""
        pairs = self.chosen()
        documents = list(dict.fromkeys(pair.second for pair in pairs))
        same = [pair for pair in pairs if pair.score >= self.relevant][: self.queries]
        queries = list(dict.fromkeys(pair.text for pair in same))
        if hasattr(model, "classifier"):
            predicted, rankings = self._crossed(model, tokenizer, pairs, queries, documents)
        else:
            predicted, rankings = self._embedded(model, tokenizer, pairs, queries, documents)
        given = [pair.score for pair in pairs]
        metrics = {"spearman": spearman(predicted, given)}
        if queries:
            metrics.update(self._search(pairs, queries, documents, rankings))
        protocol = {
            "data": cache_key(self.data).get("class"),
            "part": self.part,
            "pairs": len(pairs),
            "queries": len(queries),
            "documents": len(documents),
            "k": self.k,
        }
        records = {"predicted": [round(value, 6) for value in predicted], "given": given}
        return {"metrics": metrics, "protocol": protocol, "records": records}

    def _embedded(self, model, tokenizer, pairs, queries, documents) -> tuple[list, torch.Tensor]:
        """Return the cosine of every pair, and of queries with documents, by a bi-encoder."""
        encoder = BiEncoder(model, tokenizer, Path(tokenizer.name_or_path))
        first = encoder.encode([pair.text for pair in pairs], self.batch_size)
        vectors = encoder.encode(documents, self.batch_size)
        place = {text: number for number, text in enumerate(documents)}
        second = vectors[[place[pair.second] for pair in pairs]]
        cosines = (first * second).sum(1).tolist()
        if not queries:
            return cosines, torch.empty(0)
        return cosines, encoder.encode(queries, self.batch_size) @ vectors.T

    def _crossed(self, model, tokenizer, pairs, queries, documents) -> tuple[list, torch.Tensor]:
        """Return the score of every pair, and of queries with documents, by a cross-encoder."""
        encoder = CrossEncoder(model, tokenizer)
        texts = [(pair.text, pair.second) for pair in pairs]
        predicted = encoder.scores(texts, self.batch_size).tolist()
        rows = []
        for query in queries:
            rows.append(encoder.scores([(query, text) for text in documents], self.batch_size))
        return predicted, torch.stack(rows) if rows else torch.empty(0)

    def _search(
        self,
        pairs: list[Pair],
        queries: list[str],
        documents: list[str],
        rankings: torch.Tensor,
    ) -> dict[str, float]:
        """Return recall and nDCG over the queries."""
        place = {text: number for number, text in enumerate(documents)}
        gains: dict[str, dict[int, float]] = {query: {} for query in queries}
        for pair in pairs:
            if pair.text in gains:
                number = place[pair.second]
                gains[pair.text][number] = max(pair.score, gains[pair.text].get(number, 0.0))
        hits = {1: 0, self.k: 0}
        total = 0.0
        for query, row in zip(queries, rankings, strict=True):
            order = row.argsort(descending=True, stable=True).tolist()
            relevant = {n for n, score in gains[query].items() if score >= self.relevant}
            for k in hits:
                hits[k] += bool(relevant & set(order[:k]))
            total += ndcg([gains[query].get(n, 0.0) for n in order], self.k)
        metrics = {"ndcg": total / len(queries), "recall_at_1": hits[1] / len(queries)}
        metrics["recall_at_k"] = hits[self.k] / len(queries)
        return metrics


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of every value from 1; equal values share the mean of theirs.

    Args:
        values: One or more numbers.
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    result = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            result[index] = (start + end) / 2 + 1
        start = end + 1
    return result


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the rank correlation of two lists; NaN where one has no order.

    Args:
        first: Numbers.
        second: As many.
    """
    if any(math.isnan(value) for value in (*first, *second)):
        return math.nan
    a, b = ranks(first), ranks(second)
    mean = (len(a) + 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return covariance / spread if spread else math.nan


def ndcg(gains: Sequence[float], k: int) -> float:
    """Return the normalised discounted cumulative gain of a ranking; 0 where nothing is relevant.

    Args:
        gains: Of all documents, in the order of the ranking.
        k: Places that count.
    """

    def dcg(values: Sequence[float]) -> float:
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(values[:k], 1))

    best = dcg(sorted(gains, reverse=True))
    return dcg(gains) / best if best else 0.0

"""Pages that say what an earlier page says: near-duplicates by MinHash (Broder 1997), through
datasketch (MIT)."""

from __future__ import annotations

import re
from typing import Any

SHINGLE = 3  # words
FEW_WORDS = 8  # of a page that is a duplicate only if it is equal
PERMUTATIONS = 128  # the standard error of a similarity s is sqrt(s (1 - s) / 128)


class Duplicates:
    """Remembers pages, and says which earlier one a page repeats.

    Args:
        similarity: Jaccard similarity of the sets of ``SHINGLE`` words from which pages count as
            the same; 1: only equal words; None: no page counts as one.
    """

    def __init__(self, similarity: float | None):
        self.similarity = similarity
        self._equal: dict[tuple[str, ...], str] = {}
        self._index: Any = None
        self._sketches: dict[str, Any] = {}

    def original(self, text: str, name: str) -> str | None:
        """Return the name of an earlier page that says the same; None for a new page, which is
        remembered.

        Args:
            text: of the page.
            name: of the page.
        """
        if self.similarity is None:
            return None
        words = tuple(re.findall(r"\w+", text.lower()))
        if words in self._equal:
            return self._equal[words]
        self._equal[words] = name
        if self.similarity == 1 or len(words) < FEW_WORDS:
            return None
        return self._similar(words, name)

    def _similar(self, words: tuple[str, ...], name: str) -> str | None:
        from datasketch import MinHash, MinHashLSH

        if self._index is None:
            self._index = MinHashLSH(threshold=self.similarity, num_perm=PERMUTATIONS)
        shingles = set()
        for start in range(len(words) - SHINGLE + 1):
            shingles.add(" ".join(words[start : start + SHINGLE]).encode())
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch(sorted(shingles))
        nearest = sorted(self._index.query(sketch))
        for candidate in nearest:
            if sketch.jaccard(self._sketches[candidate]) >= self.similarity:
                return candidate
        self._index.insert(name, sketch)
        self._sketches[name] = sketch
        return None

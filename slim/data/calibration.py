"""Calibration samples: windows of a text at random places, as in GPTQ (arXiv:2210.17323) and AWQ
(arXiv:2306.00978)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.data.text import Text

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


@dataclass
class Calibration(Text):
    """Which tokens the statistics of a method are taken over.

    samples: number of windows. length: tokens per window, at most the model's context. seed: of the
        places.
    first_documents: number of documents from the start that are read; None for all. separator: what
    stands between them."""

    cache_name: ClassVar[str] = "Calibration"

    samples: int = 128
    length: int = 512
    seed: int = 0
    first_documents: int | None = None
    separator: str = "\n\n"

    def __post_init__(self) -> None:
        require_number("calibration.samples", self.samples, 1, integer=True)
        require_number("calibration.length", self.length, 8, integer=True)
        if self.first_documents is not None:
            require_number("calibration.first_documents", self.first_documents, 1, integer=True)
        super().__post_init__()

    def cache_key(self) -> dict:
        found = {
            **self.text_identity(),
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
        }
        if self.first_documents is not None:
            found["first_documents"] = self.first_documents
        return found if self.separator == "\n\n" else {**found, "separator": self.separator}

    def joined(self) -> str:
        """Return the documents that count as one text."""
        return self.separator.join(itertools.islice(self.documents(), self.first_documents))

    def tokens(self, tokenizer, context_length: int) -> torch.Tensor:
        """Return int64 tokens of shape [samples, min(length, context_length)].

        Raises ``SlimError`` if the text is shorter than one window.
        """
        length = min(self.length, context_length)
        ids = torch.tensor(encode_long(tokenizer, self.joined()), dtype=torch.long)
        if len(ids) < length:
            raise SlimError(
                f"The calibration text {self.text} has {len(ids)} tokens, fewer than one sample of {length}. "
                f"Give a longer text or calibration.length={max(8, len(ids))}."
            )
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(0, len(ids) - length + 1, (self.samples,), generator=generator)
        return torch.stack([ids[start : start + length] for start in starts.tolist()])


def encode_long(tokenizer, text: str) -> list[int]:
    """Tokenise a text longer than the model's context, without the tokenizer's warning about
    that."""
    return tokenizer(text, verbose=False)["input_ids"]

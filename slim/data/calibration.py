"""Calibration samples: windows of a text at random places, as in GPTQ (arXiv:2210.17323) and AWQ
(arXiv:2306.00978)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.console import warn
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.core.text import counted
from slim.data.encoding import encode_long
from slim.data.text import Text

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

SHORTEST = 8  # tokens per window at least
SEPARATOR = "\n\n"  # between documents, as the GPTQ and AWQ papers join them


@dataclass
class Calibration(Text):
    """Which tokens the statistics of a method are taken over.

    Attributes:
        samples: number of windows, 1 or more.
        length: tokens per window, 8 or more; at most the model's context counts.
        seed: of the windows' places.
        first_documents: number of documents from the start that are read; None: all.
        separator: what stands between the documents.
    """

    cache_name: ClassVar[str] = "Calibration"
    group: ClassVar[str] = "calibration"
    # what a user types to change them; a pruner may have its own, see slim.pruning.calibrated
    samples_setting: ClassVar[str] = "calibration.samples"
    length_setting: ClassVar[str] = "calibration.length"

    samples: int = 128
    length: int = 512
    seed: int = 0
    first_documents: int | None = None
    separator: str = SEPARATOR

    def __post_init__(self) -> None:
        require_number("calibration.samples", self.samples, 1, integer=True)
        require_number("calibration.length", self.length, SHORTEST, integer=True)
        if self.first_documents is not None:
            require_number("calibration.first_documents", self.first_documents, 1, integer=True)
        super().__post_init__()

    def cache_key(self) -> dict:
        settings = {
            **self.text_identity(),
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
        }
        if self.first_documents is not None:
            settings["first_documents"] = self.first_documents
        if self.separator != SEPARATOR:
            settings["separator"] = self.separator
        return settings

    def joined(self) -> str:
        """Return the documents that count as one text."""
        return self.separator.join(itertools.islice(self.documents(), self.first_documents))

    def tokens_for(self, source: Checkpoint) -> torch.Tensor:
        """Return the samples as tokens of a checkpoint, see :meth:`tokens`."""
        return self.tokens(load_tokenizer(source.folder), source.spec.context_length)

    def tokens(self, tokenizer, context_length: int) -> torch.Tensor:
        """Return the samples as tokens.

        Args:
            tokenizer: the model's.
            context_length: the model's, in tokens; longer windows are cut to it.

        Returns:
            int64 [samples, min(length, context_length)].

        Raises:
            SlimError: when the text is shorter than one window.
        """
        length = min(self.length, context_length)
        ids = torch.tensor(encode_long(tokenizer, self.joined()), dtype=torch.long)
        self._require_window(len(ids), length)
        generator = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(0, len(ids) - length + 1, (self.samples,), generator=generator)
        self._warn_of_overlap(len(ids), starts.tolist(), length)
        return torch.stack([ids[start : start + length] for start in starts.tolist()])

    def _require_window(self, available: int, length: int) -> None:
        """Require at least one window of text, and say how to get one."""
        if available >= length:
            return
        advice = "Give a longer text"
        if available >= SHORTEST:
            advice += f" or {self.length_setting}={available}"
        raise SlimError(
            f"The calibration text {self.text} has {counted(available, 'token')}, fewer than one "
            f"sample of {length}. {advice}."
        )

    def _warn_of_overlap(self, available: int, starts: list[int], length: int) -> None:
        """Say how much of the samples is repeated, where the text is too short for all of them."""
        drawn = len(starts) * length
        if drawn <= available:
            return
        distinct, covered_to = 0, 0
        for start in sorted(starts):
            distinct += start + length - max(start, covered_to)
            covered_to = start + length
        # the number of windows that fit next to one another
        apart = max(1, available // length)
        warn(
            f"The calibration text {self.text} has {counted(available, 'token')}, too few for "
            f"{counted(len(starts), 'sample')} of {length}: "
            f"{1 - distinct / drawn:.0%} of the sampled tokens are repeats. "
            f"Give a longer text or {self.samples_setting}={apart}."
        )

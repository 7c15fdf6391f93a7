"""How fast an encoder reads: texts per second in batches, and the time for one text alone."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.data.encoding import encode_long
from slim.evaluation.memory import MemoryMeter
from slim.evaluation.speed import CHARACTERS_PER_TOKEN, quartile_distance
from slim.evaluation.timing import Stopwatch

if TYPE_CHECKING:
    import torch

    from slim.data.text import Text
    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")


@dataclass
class EncoderSpeed:
    """How many texts of which length are read at once, and how often that is timed. The result is
    the median.

    Attributes:
        prompt_length: Tokens of a text; at most the model's context counts.
        batch_size: Texts at once.
        repeats: Timed runs.
        warmup: Runs before them that are not counted.
    """

    cache_name: ClassVar[str] = "EncoderSpeed"

    prompt_length: int = 32
    batch_size: int = 32
    repeats: int = 10
    warmup: int = 2

    encodes: ClassVar[bool] = True
    # what a generation's speed has besides
    prompts: ClassVar[tuple] = ()
    new_tokens: ClassVar[int] = 0
    max_length: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name in ("prompt_length", "batch_size", "repeats"):
            require_number(f"eval.speed.{name}", getattr(self, name), 1, integer=True)
        require_number("eval.speed.warmup", self.warmup, 0, integer=True)

    @property
    def count(self) -> int:
        """Texts of a batch, for estimates of time."""
        return self.batch_size

    def check(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` for a decoder, or texts that are longer than its context."""
        if not spec.is_encoder:
            raise SlimError(
                f"eval.speed times an encoder here, and {spec.name} is a decoder. Use another eval."
            )
        if self.prompt_length > spec.context_length:
            raise SlimError(
                f"eval.speed.prompt_length={self.prompt_length} exceeds the context of "
                f"{spec.context_length} tokens of {spec.name}. Use at most that many."
            )

    def prompt_ids(self, tokenizer, text: Text) -> list[list[int]]:
        """Return the tokens of the texts of a batch, cut from one text, which is repeated where it
        is too short."""
        needed = self.batch_size * self.prompt_length
        ids = encode_long(tokenizer, text.joined()[: CHARACTERS_PER_TOKEN * needed])
        endless = itertools.cycle(ids)
        rows = []
        for _ in range(self.batch_size):
            rows.append(list(itertools.islice(endless, self.prompt_length)))
        return rows

    def measure(self, model, prompt_ids: list[list[int]]) -> dict:
        """Time the batch and one text alone.

        Args:
            model: An encoder of transformers.
            prompt_ids: Tokens of the texts.

        Returns:
            ``metrics``: texts per second, seconds for one text; ``protocol``: what they depend on.
        """
        rows = torch.tensor(prompt_ids, device=model.device)
        with torch.inference_mode():
            batch = self._times(model, rows)
            single = self._times(model, rows[:1])
        rates = [len(prompt_ids) / seconds for seconds in batch]
        metrics = {
            "texts_per_second": statistics.median(rates),
            "texts_per_second_iqr": quartile_distance(rates),
            "text_latency": statistics.median(single),
            "text_latency_iqr": quartile_distance(single),
        }
        protocol = {
            "tokens": self.prompt_length,
            "batch_size": self.batch_size,
            "runs": self.repeats,
            "warmup_runs": self.warmup,
        }
        return {"metrics": metrics, "protocol": protocol}

    def _times(self, model, rows: torch.Tensor) -> list[float]:
        """Warm up, and return the seconds of every timed run."""
        for _ in range(self.warmup):
            model(input_ids=rows)
        watch = Stopwatch(rows.device)
        for _ in track(range(self.repeats), "speed"):
            model(input_ids=rows)
            watch.lap()
        return watch.seconds()

    def measure_use(self, model, prompt_ids: list[list[int]]) -> dict[str, float]:
        """Return ``prefill_peak_bytes``: the most held on top of the idle model while the batch is
        read; nothing where the machine cannot tell."""
        rows = torch.tensor(prompt_ids, device=model.device)
        with torch.inference_mode(), MemoryMeter(model.device.type) as meter:
            model(input_ids=rows)
        if meter.peak is None:
            return {}
        return {"prefill_peak_bytes": float(meter.peak)}

"""Generation speed: the prompt (prefill) and the generated tokens (decode) timed apart, warm-up dropped.

Prefill is the time from the prompt to the first new token, so its rate is prompt tokens per second and its inverse the
time to first token; decode is the time of all further tokens, one forward pass each with the key/value cache. Counting
prompt tokens as generated ones makes every model look several times as fast as it is.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.data.calibration import encode_long
from slim.errors import SlimError
from slim.evaluation.generation import decode, prefill
from slim.lazy import LazyModule
from slim.progress import track
from slim.settings import require_number

if TYPE_CHECKING:
    import torch

    from slim.architecture import ModelDescription
    from slim.data.text import Text
else:
    torch = LazyModule("torch")

CHARACTERS_PER_TOKEN = 8  # read from the text per token wanted: more than tokenizers need on average


@dataclass
class Speed:
    """How long prompts and answers are, and how often each is timed.

    prompts: texts to use as they are; empty: ``count`` prompts of ``prompt_length`` tokens from the evaluation's text.
    new_tokens: generated per prompt, always all of them.
    repeats: timed runs per prompt. warmup: runs before them that are not counted. The result is the median of all runs.
    """

    prompts: list[str] = field(default_factory=list)
    count: int = 5
    prompt_length: int = 128
    new_tokens: int = 32
    repeats: int = 1
    warmup: int = 1

    def __post_init__(self) -> None:
        self.prompts = list(self.prompts or [])
        lowest = {"count": 1, "prompt_length": 1, "new_tokens": 2, "repeats": 1, "warmup": 0}
        for name, low in lowest.items():
            require_number(f"eval.speed.{name}", getattr(self, name), low, integer=True)
        if not all(isinstance(prompt, str) and prompt for prompt in self.prompts):
            raise SlimError("eval.speed.prompts takes texts that are not empty, such as eval.speed.prompts=['Hello'].")

    def check(self, model: ModelDescription) -> None:
        """Raise ``SlimError`` if prompt and answer do not fit into the model's context."""
        room = model.context_length - self.new_tokens
        if room < (1 if self.prompts else self.prompt_length):
            raise SlimError(
                f"eval.speed.prompt_length={self.prompt_length} and new_tokens={self.new_tokens} exceed the context of "
                f"{model.context_length} tokens of {model.name}. "
                f"Take prompt_length up to {max(room, 0)}, or fewer new tokens."
            )

    def prompt_ids(self, tokenizer, text: Text) -> list[list[int]]:
        """Return the tokens of each prompt. A text that is too short is repeated: speed does not depend on sense."""
        if self.prompts:
            return [tokenizer(prompt)["input_ids"] for prompt in self.prompts]
        needed = self.count * self.prompt_length
        ids = encode_long(tokenizer, text.joined()[: CHARACTERS_PER_TOKEN * needed])
        if not ids:
            raise SlimError(f"The text {text.text} is empty. Give another, or eval.speed.prompts.")
        endless = itertools.cycle(ids)
        return [list(itertools.islice(endless, self.prompt_length)) for _ in range(self.count)]

    def measure(self, model, prompt_ids: list[list[int]]) -> dict:
        """Return ``{"metrics": {...}, "protocol": {...}}``; rates in tokens per second, median over all runs."""
        prompts = [torch.tensor([ids], device=model.device) for ids in prompt_ids]
        with torch.inference_mode():
            for prompt in itertools.islice(itertools.cycle(prompts), self.warmup):
                timed_run(model, prompt, self.new_tokens)
            runs = [timed_run(model, prompt, self.new_tokens) for prompt in track(prompts * self.repeats, "speed")]
        lengths = [prompt.shape[1] for prompt in prompts] * self.repeats
        metrics = {
            "prefill_tokens_per_second": statistics.median(n / run[0] for n, run in zip(lengths, runs, strict=True)),
            "decode_tokens_per_second": statistics.median((self.new_tokens - 1) / run[1] for run in runs),
        }
        protocol = {
            "prompt_tokens": lengths[: len(prompts)],
            "new_tokens": self.new_tokens,
            "runs": len(runs),
            "warmup_runs": self.warmup,
            "batch_size": 1,
        }
        return {"metrics": metrics, "protocol": protocol}


def timed_run(model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Generate greedily after ``prompt``, int64 [1, tokens]; return the seconds of prefill and of decode.

    Prefill gives the first token, decode the other ``new_tokens - 1``. An end-of-text token does not stop it.
    """
    start = clock(prompt.device)
    token, cache = prefill(model, prompt)
    middle = clock(prompt.device)
    for _ in itertools.islice(decode(model, token, cache), new_tokens - 1):
        pass
    return middle - start, clock(prompt.device) - middle


def clock(device: torch.device) -> float:
    """Return the time in seconds, after all work given to a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

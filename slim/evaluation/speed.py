"""Generation speed: the prompt (prefill) and the generated tokens (decode) timed apart, warm-up
dropped.

Prefill is the time from the prompt to the first new token, so its rate is prompt tokens per second
and its time the time to first token; decode is the time of all further tokens, one forward pass
each with the key/value cache. Counting prompt tokens as generated ones makes every model look
several times as fast as it is."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_flag, require_number
from slim.data.encoding import encode_long
from slim.evaluation.timing import Run, compiled, timed_run

if TYPE_CHECKING:
    import torch

    from slim.data.text import Text
    from slim.models.spec import ModelSpec
else:
    torch = LazyModule("torch")

# read from the text per token wanted: more than tokenizers need on average
CHARACTERS_PER_TOKEN = 8
# those of the inference tables of the thesis, which time texts of 200 tokens, prompt included
THESIS_PROMPTS = (
    "Once upon a time",
    "Why should I eat healthy?",
    "Is there a second life after death?",
    "What is the most common injury?",
    "Who is Konrad Zuse?",
)


@dataclass
class Speed:
    """How long prompts and answers are, how many are run at once, and how often each is timed.

    The result is the median of all runs, with the distance between their quartiles.

    Attributes:
        prompts: texts to use as they are; empty: ``count`` prompts of ``prompt_length`` tokens from
            the evaluation's text.
        count: number of prompts cut from that text.
        prompt_length: tokens of a prompt: a number, or a list of them. With ``batch_size`` every
            combination is timed; the first is the one in tables.
        new_tokens: tokens generated per prompt, always all of them.
        repeats: timed runs per prompt.
        warmup: runs before them that are not counted.
        batch_size: prompts at once: a number, or a list of them. A batch holds the same prompt
            several times, and its rates count the tokens of all rows.
        max_length: tokens of prompt and answer together, instead of ``new_tokens``; None: that.
        compile: run the forward pass through torch.compile, with a cache of fixed size; the warm-up
            compiles.
    """

    cache_name: ClassVar[str] = "Speed"

    prompts: list[str] = field(default_factory=list)
    count: int = 5
    prompt_length: int | list[int] = 128
    new_tokens: int = 32
    repeats: int = 1
    warmup: int = 1
    batch_size: int | list[int] = 1
    max_length: int | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self.prompts = list(self.prompts or [])
        for name in ("prompt_length", "batch_size"):
            values = getattr(self, name)
            # a list of OmegaConf is no list
            several = isinstance(values, Sequence) and not isinstance(values, str)
            setattr(self, name, list(values) if several else [values])
            for value in getattr(self, name) or [None]:
                require_number(f"eval.speed.{name}", value, 1, integer=True)
        lowest = {"count": 1, "new_tokens": 2, "repeats": 1, "warmup": 0, "max_length": 3}
        for name, low in lowest.items():
            if name != "max_length" or self.max_length is not None:
                require_number(f"eval.speed.{name}", getattr(self, name), low, integer=True)
        require_flag("eval.speed.compile", self.compile)
        for prompt in self.prompts:
            if not isinstance(prompt, str) or not prompt:
                raise SlimError(
                    "eval.speed.prompts takes texts that are not empty, such as "
                    "eval.speed.prompts=['Hello']."
                )

    def check(self, spec: ModelSpec) -> None:
        """Raise ``SlimError`` if prompt and answer do not fit into the model's context."""
        context = f"the context of {spec.context_length} tokens of {spec.name}"
        if self.max_length is not None:
            if self.max_length > spec.context_length:
                raise SlimError(
                    f"eval.speed.max_length={self.max_length} exceeds {context}. "
                    "Use at most that many."
                )
            return
        room = spec.context_length - self.new_tokens
        needed = 1 if self.prompts else max(self.prompt_length)
        if room < needed:
            raise SlimError(
                f"eval.speed.prompt_length={max(self.prompt_length)} and "
                f"new_tokens={self.new_tokens} exceed {context}. "
                f"Use prompt_length up to {max(room, 0)}, or fewer new tokens."
            )

    def prompt_ids(self, tokenizer, text: Text) -> list[list[int]]:
        """Return the tokens of each prompt.

        Args:
            tokenizer: of the checkpoint.
            text: where prompts are cut from, unless there are ``prompts``. One that is too short is
                repeated: speed does not depend on sense.
        """
        if self.prompts:
            return [tokenizer(prompt)["input_ids"] for prompt in self.prompts]
        length = max(self.prompt_length)
        needed = self.count * length
        ids = encode_long(tokenizer, text.joined()[: CHARACTERS_PER_TOKEN * needed])
        if not ids:
            raise SlimError(f"The text {text.text} is empty. Give another, or eval.speed.prompts.")
        # the prompts follow one another in the text, so they differ where it is long enough
        endless = itertools.cycle(ids)
        return [list(itertools.islice(endless, length)) for _ in range(self.count)]

    def cases(self, prompt_ids: list[list[int]]) -> dict[str, tuple[int, list[list[int]]]]:
        """Return suffix of the metrics -> (batch size, prompts); the first case has none: it is the
        one in tables."""
        lengths = self.prompt_length
        if self.prompts:  # texts keep their own lengths
            lengths = [None]
        cases = {}
        for length, batch in itertools.product(lengths, self.batch_size):
            suffix = ""
            if cases:  # all but the first
                suffix = f"/p{length}_b{batch}" if length else f"/b{batch}"
            cases[suffix] = (batch, [ids[:length] for ids in prompt_ids])
        return cases

    def measure(self, model, prompt_ids: list[list[int]]) -> dict:
        """Time all cases.

        Args:
            model: a torch module of transformers.
            prompt_ids: tokens of each prompt.

        Returns:
            ``metrics``: times in seconds, rates in tokens per second; ``protocol``: what they
            depend on.
        """
        metrics: dict[str, float] = {}
        # each case has its own warm-up: other shapes take other kernels
        cases = self.cases(prompt_ids)
        with torch.inference_mode(), compiled(model, self.compile):
            for suffix, (batch, prompts) in cases.items():
                rates = self.summary(self._runs(model, batch, prompts))
                for name, value in rates.items():
                    metrics[name + suffix] = value
        return {"metrics": metrics, "protocol": self.protocol(cases[""][1])}

    def protocol(self, prompts: list[list[int]]) -> dict:
        """Return what the metrics of the case in tables depend on.

        Args:
            prompts: its tokens.
        """
        new_tokens = self.new_tokens
        if self.max_length:
            new_tokens = self.max_length - max(map(len, prompts))
        return {
            "prompt_tokens": [len(ids) for ids in prompts],
            "new_tokens": new_tokens,
            "max_length": self.max_length,
            "runs": len(prompts) * self.repeats,
            "warmup_runs": self.warmup,
            "batch_size": self.batch_size[0],
            "compile": self.compile,
        }

    def new_after(self, prompt: list[int]) -> int:
        """Return how many tokens are generated after ``prompt``: two at least, so that there is a
        decode step."""
        if self.max_length:
            return max(2, self.max_length - len(prompt))
        return self.new_tokens

    def _runs(self, model, batch: int, prompts: list[list[int]]) -> list[Run]:
        """Warm up, then time every prompt; return the timed runs."""
        cases = []
        for ids in prompts:
            rows = torch.tensor([ids] * batch, device=model.device)
            cases.append((rows, self.new_after(ids)))
        for rows, count in itertools.islice(itertools.cycle(cases), self.warmup):
            timed_run(model, rows, count, self.compile)
        runs = []
        for rows, count in track(cases * self.repeats, "speed"):
            runs.append(timed_run(model, rows, count, self.compile))
        return runs

    def summary(self, runs: list[Run]) -> dict[str, float]:
        """Return the median of every rate and time, and the distance between its quartiles.

        Args:
            runs: as they were timed.
        """
        samples: dict[str, list[float]] = {}
        for run in runs:
            rates = {
                "time_to_first_token": run.prefill,
                "prefill_tokens_per_second": run.prompt_tokens / run.prefill,
                "decode_tokens_per_second": run.decode_tokens / run.decode,
            }
            # prompt counted with the answer, as nobody should: to compare with tables that do
            if self.max_length:
                seconds = run.prefill + run.decode
                rates["whole_length_tokens_per_second"] = run.all_tokens / seconds
            for name, value in rates.items():
                samples.setdefault(name, []).append(value)
        # a median: one run that the machine was busy in does not shift it
        metrics = {name: statistics.median(values) for name, values in samples.items()}
        for name, values in samples.items():
            metrics[f"{name}_iqr"] = quartile_distance(values)
        return metrics


def quartile_distance(values: list[float]) -> float:
    """Return the distance between the first and the third quartile; 0 for a single value."""
    if len(values) < 2:  # quantiles need two
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


PRESETS = {"thesis": Speed(prompts=list(THESIS_PROMPTS), max_length=200, repeats=3, warmup=2)}


def preset(name: str) -> Speed:
    """Return the settings called ``name`` (``eval.speed=thesis``). Raises ``SlimError`` if there
    are none."""
    require_choice("eval.speed", name, tuple(PRESETS))
    return replace(PRESETS[name])

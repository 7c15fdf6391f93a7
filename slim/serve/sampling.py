"""How the next token is chosen: greedily, or at random from the likely ones."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_number

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

STOPS = 4  # most stop texts, as in OpenAI's interface
STOP_LENGTH = 200  # characters of one
# name -> least, most, whether a whole number
LIMITS = {
    "max_tokens": (1, float("inf"), True),
    "temperature": (0, 2, False),
    "top_p": (0, 1, False),
    "top_k": (0, float("inf"), True),
    "min_p": (0, 1, False),
    "repetition_penalty": (0.1, 10, False),
    "frequency_penalty": (-2, 2, False),
    "presence_penalty": (-2, 2, False),
    "seed": (-(2**63), 2**63 - 1, True),
}
OPTIONAL = ("max_tokens", "seed")  # None has a meaning


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer.

    Attributes:
        max_tokens: most tokens of the answer; None: as many as there is room for.
        temperature: logits are divided by it, 0 to 2; 0 takes the most likely token.
        top_p: draw from the most likely tokens that together have this probability (nucleus
            sampling, arXiv:1904.09751), 0 to 1; 1 leaves none out.
        top_k: draw from that many of the most likely tokens; 0 leaves none out.
        min_p: leave out tokens less likely than this share of the most likely one
            (arXiv:2407.01082), 0 to 1.
        repetition_penalty: logits of tokens that occurred, in the prompt too, are divided by it if
            positive and else multiplied (CTRL, arXiv:1909.05858); 1 changes nothing.
        frequency_penalty: is subtracted from a token's logit for each time it was generated.
        presence_penalty: is subtracted once from that of every generated token.
        seed: the same one gives the same answer on the same machine; None: drawn anew.
        stop: texts that end the answer, which does not contain them.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, (low, high, whole) in LIMITS.items():
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue
            require_number(name, value, low, high, integer=whole)
        if len(self.stop) > STOPS:
            raise SlimError(f"stop: has {len(self.stop)} texts. Give at most {STOPS}.")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= STOP_LENGTH:
                raise SlimError(
                    f"stop: must be texts of 1 to {STOP_LENGTH} characters, such as ['User:']."
                )

    def changed(self, settings: dict) -> Sampling:
        """Return the same with other values.

        Args:
            settings: name -> value; None keeps what there is.

        Raises:
            SlimError: there is no such setting, or it cannot have the value.
        """
        known = setting_names()
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise SlimError(f"There is no setting {unknown[0]}. There are: {', '.join(known)}.")
        given = {name: value for name, value in settings.items() if value is not None}
        return replace(self, **given)


def setting_names() -> list[str]:
    """Return the names of all settings of :class:`Sampling`."""
    return [entry.name for entry in fields(Sampling)]


def recommended(generation_config) -> Sampling:
    """Return what a checkpoint's ``generation_config.json`` recommends; greedy where it does not
    ask for sampling.

    Args:
        generation_config: of transformers, or None.
    """
    if generation_config is None or not getattr(generation_config, "do_sample", None):
        return Sampling()
    settings = {"temperature": 1.0}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        value = getattr(generation_config, name, None)
        if value is not None:
            settings[name] = value
    return Sampling().changed(settings)


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        sampling: its settings.
        prompt: tokens before the answer.
    """

    def __init__(self, sampling: Sampling, prompt: list[int]):
        self.sampling = sampling
        self.counts: dict[int, int] = {}  # generated token -> how often
        self.seen = set(prompt)
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed % 2**63)

    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token.

        Args:
            logits: [vocabulary], of any type.

        Raises:
            SlimError: they are no numbers: the model is damaged.
        """
        logits = logits.float().cpu()
        if not torch.isfinite(logits).any() or torch.isnan(logits).any():
            raise SlimError(
                "The model computes no numbers (NaN or infinity). evaluate.py names the layer that "
                "is damaged."
            )
        logits = self._penalized(logits)
        if self.sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            token = self._drawn(logits / self.sampling.temperature)
        self.counts[token] = self.counts.get(token, 0) + 1
        self.seen.add(token)
        return token

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits with those of tokens that occurred lowered."""
        settings = self.sampling
        if settings.repetition_penalty != 1 and self.seen:
            index = torch.tensor(sorted(self.seen))
            values = logits[index]
            lowered = values / settings.repetition_penalty
            raised = values * settings.repetition_penalty
            logits = logits.index_copy(0, index, torch.where(values > 0, lowered, raised))
        if self.counts and (settings.frequency_penalty or settings.presence_penalty):
            index = torch.tensor(list(self.counts))
            counts = torch.tensor(list(self.counts.values()), dtype=torch.float32)
            penalty = settings.frequency_penalty * counts + settings.presence_penalty
            logits = logits.index_add(0, index, -penalty)
        return logits

    def _drawn(self, logits: torch.Tensor) -> int:
        """Draw a token from the likely ones."""
        settings = self.sampling
        probabilities, tokens = logits.softmax(-1).sort(descending=True)
        kept = torch.ones_like(probabilities, dtype=torch.bool)
        if settings.top_k:
            kept[settings.top_k :] = False
        # what comes before a token decides: the one that crosses the limit still belongs to it
        before = probabilities.cumsum(-1) - probabilities
        kept &= before < max(settings.top_p, 1e-9)
        kept &= probabilities >= settings.min_p * probabilities[0]
        weights = probabilities * kept
        place = torch.multinomial(weights, 1, generator=self.generator)
        return int(tokens[place])

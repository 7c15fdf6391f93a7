"""Divergences between a teacher's distribution p and a student's q over the vocabulary, one number
per token.

All take log-probabilities: ``log_p`` and ``log_q``, float [tokens, classes], finite, with exp
summing to 1 along the last dimension. All give nats, float [tokens], are zero where p = q, and are
differentiable in ``log_q``. The classes are the tokens of the vocabulary, or the most likely ones
and a bucket for all others.

The factor T^2 that keeps the gradients of softened distributions at the size of hard labels'
(Hinton et al., arXiv:1503.02531, section 2) is the caller's: see :func:`softened`.

A loss is a function with :func:`loss` above it. Its name is what ``teacher.loss`` takes, the first
paragraph of its docstring is what messages and ``docs/distillation.md`` say of it, and a parameter
after ``log_p`` and ``log_q`` is its setting, whose default and range are checked before any work.
Nothing here needs torch before a divergence is computed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")

Divergence = Callable[["Tensor", "Tensor"], "Tensor"]  # log_p, log_q -> one number per token
# Shares in a mixture exclude both ends, where one of the distributions would be alone.
OPEN = (1e-6, 1 - 1e-6)


@dataclass(frozen=True)
class Loss:
    """A divergence that ``teacher.loss`` can name.

    Attributes:
        name: What the user types.
        function: ``function(log_p, log_q)`` or ``function(log_p, log_q, setting)``.
        formula: What it is, for the table in the docs.
        source: Where it comes from.
        setting: Name of its setting; None where it has none.
        default: Of the setting.
        low: The setting's smallest value.
        high: The setting's largest value.
    """

    name: str
    function: Callable[..., Tensor]
    formula: str
    source: str
    setting: str | None = None
    default: float | None = None
    low: float = 0.0
    high: float = 1.0

    def divergence(self, value: float | None = None) -> Divergence:
        """Return the function of ``log_p`` and ``log_q`` alone.

        Args:
            value: Of the setting; None takes its default.
        """
        if self.setting is None or value is None:
            return self.function
        return partial(self.function, **{self.setting: value})


LOSSES: dict[str, Loss] = {}


def loss(
    formula: str, source: str, limits: tuple[float, float] = (0.0, 1.0), name: str | None = None
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Register the function below as a loss.

    Args:
        formula: What it is, for the table in the docs.
        source: Where it comes from: authors or name, and arXiv id.
        limits: Smallest and largest value of its setting, which is its third parameter.
        name: What the user types; None: the function's name.

    Returns:
        A decorator that leaves the function as it is.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        settings = list(inspect.signature(function).parameters.values())[2:]
        setting = settings[0].name if settings else None
        default = settings[0].default if settings else None
        key = name or function.__name__
        LOSSES[key] = Loss(key, function, formula, source, setting, default, *limits)
        return function

    return register


def losses_table() -> str:
    """Return the losses as the Markdown table of ``docs/distillation.md``."""
    lines = ["| `teacher.loss=` | D(p, q) | setting | source |", "| --- | --- | --- | --- |"]
    for entry in LOSSES.values():
        setting = f"`{entry.setting}` = {entry.default}" if entry.setting else ""
        lines.append(f"| `{entry.name}` | {entry.formula} | {setting} | {entry.source} |")
    return "\n".join(lines) + "\n"


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / T).

    A divergence of two such takes a factor T^2 where it stands next to hard labels.

    Args:
        logits: [tokens, classes].
        temperature: T, above 0.

    Returns:
        float32 [tokens, classes].
    """
    return (logits.float() / temperature).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) = sum a (log a - log b), float [tokens].

    Args:
        log_a: float [tokens, classes].
        log_b: float [tokens, classes].
    """
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log((1 - share) a + share b), float [tokens, classes].

    Args:
        log_a: float [tokens, classes].
        log_b: float [tokens, classes].
        share: Of b, above 0 and below 1.
    """
    return torch.logaddexp(log_a + math.log1p(-share), log_b + math.log(share))


@loss("KL(p, q)", "Hinton et al., arXiv:1503.02531", name="forward")
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q): the student covers all that the teacher thinks possible.

    Args:
        log_p: float [tokens, classes], the teacher's.
        log_q: float [tokens, classes], the student's.
    """
    return kl(log_p, log_q)


@loss(
    "KL(q, p)",
    "MiniLLM, arXiv:2306.08543 (token by token, not its policy gradient)",
    name="reverse",
)
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || p): the student keeps to what the teacher finds likely.

    Args:
        log_p: float [tokens, classes], the teacher's.
        log_q: float [tokens, classes], the student's.
    """
    return kl(log_q, log_p)


@loss(
    "beta KL(p, m) + (1 - beta) KL(q, m), m = beta p + (1 - beta) q",
    "GKD, arXiv:2306.13649",
    limits=OPEN,
)
def symmetric(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence, eq. 1 of Agarwal et al.

    Args:
        log_p: float [tokens, classes], the teacher's.
        log_q: float [tokens, classes], the student's.
        beta: Share of the teacher in the mixture m, above 0 and below 1.
    """
    log_m = mixed(log_p, log_q, 1 - beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


@loss("KL(p, s p + (1 - s) q), s: skew", "DistiLLM, arXiv:2402.03898", limits=OPEN)
def skewed(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Return KL(p || skew p + (1 - skew) q), which is bounded where q vanishes.

    Args:
        log_p: float [tokens, classes], the teacher's.
        log_q: float [tokens, classes], the student's.
        skew: Share of the teacher in the mixture, above 0 and below 1.
    """
    return kl(log_p, mixed(log_p, log_q, 1 - skew))


@loss("KL(q, s q + (1 - s) p)", "the same", limits=OPEN)
def skewed_reverse(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Return KL(q || skew q + (1 - skew) p).

    Args:
        log_p: float [tokens, classes], the teacher's.
        log_q: float [tokens, classes], the student's.
        skew: Share of the student in the mixture, above 0 and below 1.
    """
    return kl(log_q, mixed(log_q, log_p, 1 - skew))


@loss(
    "g KL(p, q) + (1 - g) KL(q, p), g: share of the difference that lies in the teacher's head",
    "AKL, arXiv:2404.02657",
)
def adaptive(log_p: Tensor, log_q: Tensor, head: float = 0.5) -> Tensor:
    """Return a mean of forward and reverse KL, weighted by where p and q are apart (Wu et al.).

    The teacher's most likely classes that together reach a probability of ``head`` are the head,
    the others the tail; g = sum |p - q| over each is the gap there, taken as a constant:

    AKL = g_head / (g_head + g_tail) KL(p || q) + g_tail / (g_head + g_tail) KL(q || p)

    Args:
        log_p: float [tokens, classes], the teacher's.
        log_q: float [tokens, classes], the student's.
        head: Probability of the head, 0 to 1.
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = p.cumsum(-1) - p < head
        g_head = (gap * in_head).sum(-1)
        g_total = gap.sum(-1)
        # Equal distributions have no gap anywhere.
        share = torch.where(g_total > 0, g_head / g_total, 0.5)
    return share * forward_kl(log_p, log_q) + (1 - share) * reverse_kl(log_p, log_q)

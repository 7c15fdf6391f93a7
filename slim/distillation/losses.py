"""Divergences between a teacher's distribution p and a student's q over the vocabulary, one number
per token.

All take log-probabilities: ``log_p`` and ``log_q``, float [tokens, classes], finite, with exp
summing to 1 along the last dimension. All give nats, float [tokens], are zero where p = q, and are
differentiable in ``log_q``. The classes are the tokens of the vocabulary, or the most likely ones
and a bucket for all others.

The factor T^2 that keeps the gradients of softened distributions at the size of hard labels'
(Hinton et al., arXiv:1503.02531, section 2) is the caller's: see :func:`softened`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]


def softened(logits: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / T) in float32; a divergence of two such wants a factor T^2 beside
    hard labels."""
    return (logits.float() / temperature).log_softmax(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b) = sum a (log a - log b)."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q): the student covers all that the teacher thinks possible (Hinton et al.,
    arXiv:1503.02531)."""
    return kl(log_p, log_q)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(q || p): the student keeps to what the teacher finds likely (Gu et al., MiniLLM,
    arXiv:2306.08543)."""
    return kl(log_q, log_p)


def mixed(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    """Return log((1 - share) a + share b), for 0 < share < 1."""
    return torch.logaddexp(log_a + math.log1p(-share), log_b + math.log(share))


def symmetric(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """Return the generalised Jensen-Shannon divergence with m = beta p + (1 - beta) q, 0 < beta <
    1:

    JSD(p, q) = beta KL(p || m) + (1 - beta) KL(q || m)    (Agarwal et al., arXiv:2306.13649, eq. 1)
    """
    log_m = mixed(log_p, log_q, 1 - beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def skewed(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Return KL(p || skew p + (1 - skew) q), 0 < skew < 1: bounded where q vanishes (Ko et al.,
    arXiv:2402.03898)."""
    return kl(log_p, mixed(log_p, log_q, 1 - skew))


def skewed_reverse(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """Return KL(q || skew q + (1 - skew) p), 0 < skew < 1 (Ko et al., arXiv:2402.03898)."""
    return kl(log_q, mixed(log_q, log_p, 1 - skew))


def adaptive(log_p: Tensor, log_q: Tensor, head: float = 0.5) -> Tensor:
    """Return a mean of forward and reverse KL, weighted by where p and q are apart (Wu et al.,
    arXiv:2404.02657).

    The teacher's most likely classes that together reach a probability of ``head`` (0 to 1) are the
    head, the others the tail; g = sum |p - q| over each is the gap there, taken as a constant:

    AKL = g_head / (g_head + g_tail) KL(p || q) + g_tail / (g_head + g_tail) KL(q || p)
    """
    with torch.no_grad():
        p, order = log_p.exp().sort(-1, descending=True)
        gap = (p - log_q.exp().gather(-1, order)).abs()
        in_head = p.cumsum(-1) - p < head
        g_head, g_total = (gap * in_head).sum(-1), gap.sum(-1)
        share = torch.where(g_total > 0, g_head / g_total, 0.5)
    return share * forward_kl(log_p, log_q) + (1 - share) * reverse_kl(log_p, log_q)

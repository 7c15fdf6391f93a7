"""A sum over tokens, computed a few tokens at a time, so that nothing of size [all tokens,
vocabulary] ever exists.

With hidden size 4096 and 128k tokens in the vocabulary a logit row is 31 times as large as the
hidden state it comes from. So the head, the softmax and the loss run on a chunk of tokens, and so
does their backward pass, at once, while the chunk's logits are there; only the gradients of the
hidden states and of the head are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slim.distillation import CHUNK_ELEMENTS


def chunked_sum(
    function: Callable[..., Tensor],
    rows: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    chunk: int = 1024,
) -> Tensor:
    """Return the sum over chunks of ``function(*rows of the chunk)``, a scalar in float32,
    differentiable once.

    rows: tensors with the same first dimension, cut into pieces of ``chunk`` rows.
    parameters: tensors that ``function`` uses itself and that get gradients (the head's weights).
    """
    if torch.is_grad_enabled():
        return _ChunkedSum.apply(function, chunk, len(rows), *rows, *parameters)
    pieces = zip(*(row.split(chunk) for row in rows), strict=True)
    return sum((function(*piece) for piece in pieces), torch.zeros((), device=rows[0].device))


def chunk_rows(classes: int) -> int:
    """Return how many tokens a chunk may have where each has ``classes`` logits."""
    return max(1, CHUNK_ELEMENTS // classes)


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, chunk: int, count: int, *tensors: Tensor) -> Tensor:
        rows, parameters = tensors[:count], tensors[count:]
        needed = ctx.needs_input_grad[3:]
        wanted = [
            parameter for parameter, need in zip(parameters, needed[count:], strict=True) if need
        ]
        grads = [
            torch.empty_like(row) if need else None
            for row, need in zip(rows, needed[:count], strict=True)
        ]
        sums = [torch.zeros_like(parameter) for parameter in wanted]
        total = torch.zeros((), device=rows[0].device)
        for start in range(0, len(rows[0]), chunk):
            pieces = [
                row[start : start + chunk].detach().requires_grad_(need)
                for row, need in zip(rows, needed[:count], strict=True)
            ]
            with torch.enable_grad():
                value = function(*pieces)
            total += value.detach()
            leaves = [piece for piece in pieces if piece.requires_grad]
            found = list(torch.autograd.grad(value, [*leaves, *wanted])) if leaves or wanted else []
            for grad in filter(lambda grad: grad is not None, grads):
                grad[start : start + chunk] = found.pop(0)
            for sum_, grad in zip(sums, found, strict=True):
                sum_ += grad
        remaining = iter(sums)
        ctx.save_for_backward(
            *grads, *(next(remaining) if need else None for need in needed[count:])
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return (
            None,
            None,
            None,
            *(None if grad is None else grad * gradient for grad in ctx.saved_tensors),
        )

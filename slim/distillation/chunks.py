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
    """Return the sum over chunks of ``function(*rows of the chunk)``.

    Args:
        function: Gives a scalar.
        rows: Tensors with the same first dimension.
        parameters: Tensors that ``function`` uses itself and that get gradients (the head's
            weights).
        chunk: Rows at a time.

    Returns:
        A scalar in float32, differentiable once.
    """
    if torch.is_grad_enabled():
        return _ChunkedSum.apply(function, chunk, len(rows), *rows, *parameters)
    pieces = zip(*(row.split(chunk) for row in rows), strict=True)
    return sum((function(*piece) for piece in pieces), torch.zeros((), device=rows[0].device))


def chunk_rows(classes: int) -> int:
    """Return how many tokens a chunk may have.

    Args:
        classes: Logits per token.
    """
    return max(1, CHUNK_ELEMENTS // classes)


class _ChunkedSum(torch.autograd.Function):
    """Computes the gradients in the forward pass, while each chunk's logits are there."""

    @staticmethod
    def forward(ctx, function, chunk: int, count: int, *tensors: Tensor) -> Tensor:
        rows, parameters = tensors[:count], tensors[count:]
        needs = ctx.needs_input_grad[3:]
        rows_need, parameters_need = needs[:count], needs[count:]
        row_grads = [
            torch.empty_like(row) if need else None
            for row, need in zip(rows, rows_need, strict=True)
        ]
        parameter_grads = [
            torch.zeros_like(parameter) if need else None
            for parameter, need in zip(parameters, parameters_need, strict=True)
        ]
        total = torch.zeros((), device=rows[0].device)
        for start in range(0, len(rows[0]), chunk):
            pieces = [
                row[start : start + chunk].detach().requires_grad_(need)
                for row, need in zip(rows, rows_need, strict=True)
            ]
            with torch.enable_grad():
                value = function(*pieces)
            total += value.detach()
            grads = _gradients(value, [*pieces, *parameters], [*rows_need, *parameters_need])
            for row_grad, grad in zip(row_grads, grads[:count], strict=True):
                if row_grad is not None:
                    row_grad[start : start + chunk] = grad
            for parameter_grad, grad in zip(parameter_grads, grads[count:], strict=True):
                if parameter_grad is not None:
                    parameter_grad += grad
        ctx.save_for_backward(*row_grads, *parameter_grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        grads = [None if grad is None else grad * gradient for grad in ctx.saved_tensors]
        return (None, None, None, *grads)


def _gradients(value: Tensor, tensors: list[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradient of a scalar in each tensor that needs one, None for the others."""
    wanted = [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    if not wanted:
        return [None] * len(tensors)
    gradients = iter(torch.autograd.grad(value, wanted))
    return [next(gradients) if need else None for need in needs]

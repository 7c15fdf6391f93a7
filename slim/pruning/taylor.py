"""Block scores by first-order Taylor expansion: how much the loss changes, to first order, when a
weight becomes zero.

    score(block) = sum over its weight tensors W of sum_ij |W_ij * dL/dW_ij|

with L the mean negative log-likelihood of all calibration tokens. Kim et al., "Shortened LLaMA"
(arXiv:2402.02834), section 2.1, equation 1; "Taylor+" there keeps the first four and last two
blocks. The criterion is LLM-Pruner's (arXiv:2305.11627). Weight tensors are those named
``*.weight``, norms included (9 per Llama block; a norm of Gemma that stores w multiplies by 1 + w,
and that is its W).

No second copy of the model is made for gradients. The backward pass goes block by block: a block's
forward is repeated from its stored input (gradient checkpointing, done by hand), and each weight's
gradient is scored the moment it appears and dropped before the next one does. Peak over the
weights: the blocks' inputs, the activations of one block, and the largest gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.loaded_blocks import BlockChain
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.console import progress_bar
from slim.core.lazy import LazyModule
from slim.models.spec import DTYPE_BYTES, ModelSpec, resolve_dtype
from slim.pruning.calibrated import forward_bytes
from slim.pruning.depth import CalibratedDepthPruning

if TYPE_CHECKING:
    import torch

    from slim.models.spec import Family
else:
    torch = LazyModule("torch")

CHUNK = 2**20  # numbers per product, so that scoring a tensor needs no further copy of it


def taylor_score(weight: torch.Tensor, grad: torch.Tensor, offset: float = 0.0) -> float:
    """Return sum |(w + offset) g|: products in float32, total in float64.

    Args:
        weight: of any shape.
        grad: its gradient, of the same shape.
        offset: added to the weight, as a norm does that stores its factor minus 1.
    """
    total = 0.0
    with torch.no_grad():
        for w, g in zip(weight.flatten().split(CHUNK), grad.flatten().split(CHUNK), strict=True):
            total = total + ((w.float() + offset) * g.float()).abs().sum().double()
    return float(total)


def block_taylor_scores(
    model, family: Family, tokens: torch.Tensor, advance: Callable[[], object] = lambda: None
) -> list[float]:
    """Return the Taylor score of every block.

    Args:
        model: loaded; its weights are left as they were.
        family: of the model.
        tokens: int64 [samples, length].
        advance: called after every block, forward and backward.
    """
    model.requires_grad_(False)
    chain = BlockChain(model, family)
    states = block_inputs(chain, tokens, advance)
    gradient = output_gradient(chain, states.pop(), tokens)
    scores = [0.0] * len(chain)
    for index in reversed(range(len(chain))):
        scores[index], gradient = block_backward(chain, index, states.pop(), gradient)
        advance()
    return scores


def block_inputs(
    chain: BlockChain, tokens: torch.Tensor, advance: Callable[[], object]
) -> list[torch.Tensor]:
    """Return the inputs of all blocks and the output of the last.

    Args:
        chain: the model's blocks.
        tokens: int64 [samples, length].
        advance: called after every block.

    Returns:
        [samples, length, hidden] each, on the CPU.
    """
    hidden = chain.enter(tokens)
    states = [hidden.cpu()]
    with torch.no_grad():
        for index in range(len(chain)):
            hidden = chain.step(index, hidden)
            states.append(hidden.cpu())
            advance()
    return states


def output_gradient(chain: BlockChain, output: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the loss, the mean over all predicted tokens, with respect to the
    output of the last block.

    Args:
        chain: the model's blocks.
        output: [samples, length, hidden].
        tokens: int64 [samples, length].

    Returns:
        [samples, length, hidden].
    """
    output = output.to(chain.model.device).requires_grad_()
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    for loss in chain.losses(output, tokens):  # each has its own logits, freed by its backward
        (loss / predicted).backward()
    return output.grad


def block_backward(
    chain: BlockChain, index: int, state: torch.Tensor, gradient: torch.Tensor
) -> tuple[float, torch.Tensor]:
    """Return a block's score and its input's gradient.

    Args:
        chain: the model's blocks.
        index: of the block.
        state: its input, [samples, length, hidden].
        gradient: its output's gradient, [samples, length, hidden].
    """
    offsets: dict[torch.Tensor, float] = {}  # of the weight tensors
    for name, parameter in chain.blocks[index].named_parameters():
        if name.endswith("weight"):
            offsets[parameter] = chain.family.offset(name)
    scores = []

    def score(weight: torch.Tensor) -> None:
        scores.append(taylor_score(weight, weight.grad, offsets[weight]))
        weight.grad = None

    state = state.to(gradient.device).requires_grad_()
    with called_with_gradients(offsets, score):
        chain.step(index, state).backward(gradient)
    return sum(scores), state.grad


@contextmanager
def called_with_gradients(
    weights: Iterable[torch.Tensor], use: Callable[[torch.Tensor], None]
) -> Iterator[None]:
    """Make weights require gradients for a while.

    Args:
        weights: of the model.
        use: called with a weight as soon as its gradient is complete.
    """
    weights = list(weights)
    handles = []
    for weight in weights:
        weight.requires_grad_()
        handles.append(weight.register_post_accumulate_grad_hook(use))
    try:
        yield
    finally:
        for weight, handle in zip(weights, handles, strict=True):
            handle.remove()
            weight.requires_grad_(False)


@dataclass(kw_only=True)
class Taylor(CalibratedDepthPruning):
    """``pruner=taylor``. Other settings: see :class:`CalibratedDepthPruning`.

    Attributes:
        samples: windows for the scores; 10 as in Shortened LLaMA.
        length: tokens per window for the scores; 128 as in Shortened LLaMA.
    """

    cache_name: ClassVar[str] = "Taylor"

    samples: int | None = 10
    length: int | None = 128

    criterion: ClassVar[str] = "taylor"
    score_label: ClassVar[str] = "sum of |w dL/dw|"
    needs_loss: ClassVar[bool] = True

    def scores(self, source: Checkpoint, context: Context) -> list[float]:
        model, tokens = self.load(source, context)
        with progress_bar("Taylor scores of blocks", total=2 * source.spec.blocks) as advance:
            return block_taylor_scores(model, source.spec.family, tokens, advance)

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        return backward_bytes(
            spec, device, self.windows.samples, self.windows.samples, self.windows.length
        )


def backward_bytes(spec: ModelSpec, device: str, samples: int, together: int, length: int) -> int:
    """Estimate the peak memory of a backward pass block by block, in bytes: inputs of all blocks,
    one block's graph, the largest gradient.

    Args:
        spec: the model.
        device: torch device, which decides the type of the weights.
        samples: windows in all.
        together: windows that go back through a block at once.
        length: tokens per window.
    """
    width = DTYPE_BYTES.get(resolve_dtype(spec, "auto", device), 4)
    tokens = samples * min(length, spec.context_length)
    states = (spec.blocks + 1) * tokens * spec.hidden_size * width
    largest = max(rows * columns for rows, columns in spec.block_linears().values())
    # all samples go forward at once; one block's graph and gradients take about twice what its
    # plain forward pass holds
    forward = forward_bytes(spec, device, max(samples, 2 * together), length)
    return forward + states + largest * width

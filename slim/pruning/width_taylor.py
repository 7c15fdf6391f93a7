"""Width scores by Taylor expansion: how much the loss changes when a head or an MLP channel becomes
zero.

With g = dL/dw the gradient of the mean loss of all calibration samples, g_s that of sample s, and f
= mean_s g_s^2 the diagonal of the empirical Fisher matrix, which stands for the second derivative,
per channel of a coupled tensor:

    first       sum |w g|
    second      sum w^2 f
    mixed       sum |w g - w^2 f / 2|
    vectorised  |sum w g|

Ma et al., "LLM-Pruner" (arXiv:2305.11627), equations 3 to 5 and its code ("param_first",
"param_second", "param_mix", "vectorize").

Gradients go block by block, as in ``taylor.py``: each is used the moment it appears and dropped
before the next one. Only ``mixed`` has to keep two sums of the size of one block's weights, since
its absolute value needs both g and f."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.calibration.loaded_blocks import BlockChain
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.stage import Context
from slim.core.console import progress_bar
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice
from slim.models.spec import Family, ModelSpec
from slim.pruning.taylor import backward_bytes, block_inputs, called_with_gradients, output_gradient
from slim.pruning.width import CalibratedWidthPruning
from slim.pruning.width_scores import (
    Coupled,
    UnitScores,
    coupled_tensors,
    sum_per_unit,
    unit_scores,
)

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

FIRST, SECOND, MIXED, VECTORISED = ORDERS = ("first", "second", "mixed", "vectorised")


class FirstOrder:
    """Scores of one block from the gradient of the loss over all samples."""

    def __init__(self, order: str, samples: int):
        self.order = order
        self.scores: dict[str, torch.Tensor] = {}

    def add(self, tensor: Coupled, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Take the gradient of the whole loss.

        Args:
            tensor: which coupled tensor.
            weight: w, [out, in].
            grad: g, [out, in].
        """
        if self.order == VECTORISED:
            total = sum_per_unit(lambda w, g: w * g, tensor.rows, weight, grad)
            self.scores[tensor.name] = total.abs()
        else:
            self.scores[tensor.name] = sum_per_unit(
                lambda w, g: (w * g).abs(), tensor.rows, weight, grad
            )

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the scores per channel of every coupled tensor."""
        return self.scores


class SecondOrder:
    """Scores of one block from the gradients of single samples: sum w^2 f needs no more than sums
    per channel."""

    def __init__(self, order: str, samples: int):
        self.samples = samples
        self.scores: dict[str, torch.Tensor] = {}

    def add(self, tensor: Coupled, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Take one sample's share of the gradient.

        Args:
            tensor: which coupled tensor.
            weight: w, [out, in].
            grad: g_s / samples, [out, in].
        """
        squares = sum_per_unit(lambda w, g: (w * g).square(), tensor.rows, weight, grad)
        self.scores[tensor.name] = self.scores.get(tensor.name, 0) + squares * self.samples

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the scores per channel of every coupled tensor."""
        return self.scores


class Mixed:
    """Scores of one block from both, for which g and f of all its weights are kept."""

    def __init__(self, order: str, samples: int):
        self.samples = samples
        self.sums: dict[Coupled, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def add(self, tensor: Coupled, weight: torch.Tensor, grad: torch.Tensor) -> None:
        """Take one sample's share of the gradient.

        Args:
            tensor: which coupled tensor.
            weight: w, [out, in].
            grad: g_s / samples, [out, in].
        """
        if tensor not in self.sums:
            zeros = torch.zeros_like(weight).float()
            self.sums[tensor] = (weight, zeros, zeros.clone())
        _, gradient, fisher = self.sums[tensor]
        gradient.add_(grad)
        fisher.addcmul_(grad.float(), grad.float(), value=self.samples)

    def finish(self) -> dict[str, torch.Tensor]:
        """Return the scores per channel of every coupled tensor."""
        scores = {}
        for tensor, sums in self.sums.items():
            scores[tensor.name] = sum_per_unit(
                lambda w, g, f: (w * g - 0.5 * w * f * w).abs(), tensor.rows, *sums
            )
        return scores


RULES = {FIRST: FirstOrder, VECTORISED: FirstOrder, SECOND: SecondOrder, MIXED: Mixed}


def channel_taylor_scores(
    model, family: Family, tokens: torch.Tensor, blocks: Sequence[int], order: str,
    advance: Callable[[], object] = lambda: None,
) -> dict[int, dict[str, torch.Tensor]]:  # fmt: skip
    """Return the scores per channel of every coupled tensor.

    Args:
        model: loaded; its weights are left as they were.
        family: of the model.
        tokens: int64 [samples, length].
        blocks: that are scored.
        order: one of ``ORDERS``.
        advance: called after every block, forward and backward.

    Returns:
        Block -> name of the tensor within it -> float32 [channels], on the CPU.
    """
    model.requires_grad_(False)
    chain = BlockChain(model, family)
    states = block_inputs(chain, tokens, advance)
    gradient = output_gradient(chain, states.pop(), tokens)
    together = len(tokens) if order in (FIRST, VECTORISED) else 1
    # so that blocks are called as for as many samples as go back together
    chain.enter(tokens[:together])
    scores = {}
    for index in reversed(range(min(blocks), len(chain))):
        rule = RULES[order](order, len(tokens)) if index in blocks else None
        gradient = block_backward(chain, index, states.pop(), gradient, together, rule)
        if rule is not None:
            scores[index] = {name: score.cpu() for name, score in rule.finish().items()}
        advance()
    return scores


def block_backward(
    chain: BlockChain, index: int, state, gradient, together: int, rule
) -> torch.Tensor:
    """Go back through a block, some samples at a time.

    Args:
        chain: the model's blocks.
        index: of the block.
        state: its input, [samples, length, hidden].
        gradient: its output's gradient, [samples, length, hidden].
        together: samples that go back at once.
        rule: gets the gradients of the block's coupled weights; None: they are not needed.

    Returns:
        Its input's gradient, [samples, length, hidden].
    """
    weights: dict[torch.Tensor, Coupled] = {}
    if rule is not None:
        for tensor in coupled_tensors(chain.family):
            weights[chain.blocks[index].get_submodule(tensor.name).weight] = tensor

    def use(weight: torch.Tensor) -> None:
        rule.add(weights[weight], weight.detach(), weight.grad)
        weight.grad = None

    inputs = []
    with called_with_gradients(weights, use):
        for part, back in zip(state.split(together), gradient.split(together), strict=True):
            part = part.to(gradient.device).requires_grad_()
            chain.step(index, part).backward(back)
            inputs.append(part.grad)
    return torch.cat(inputs)


@dataclass(kw_only=True)
class WidthTaylor(CalibratedWidthPruning):
    """``pruner=width_taylor``. Other settings: see :class:`CalibratedWidthPruning`.

    Attributes:
        order: ``first``, ``second``, ``mixed`` or ``vectorised``, see above.
        samples: windows for the scores; 10 as in LLM-Pruner.
        length: tokens per window for the scores; 64 as in LLM-Pruner.
    """

    cache_name: ClassVar[str] = "WidthTaylor"

    order: str = FIRST
    samples: int | None = 10
    length: int | None = 64

    criterion: ClassVar[str] = "taylor"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("pruner.order", self.order, ORDERS)

    def scores(self, source: Checkpoint, blocks: range, context: Context) -> dict[int, UnitScores]:
        model, tokens = self.load(source, context)
        spec = source.spec
        steps = 2 * spec.blocks - min(blocks)
        with progress_bar("Taylor scores of heads and channels", total=steps) as advance:
            channels = channel_taylor_scores(
                model, spec.family, tokens, blocks, self.order, advance
            )
        scores = {}
        for block, sizes in channels.items():
            scores[block] = unit_scores(sizes, spec, block, self.folding)
        return scores

    def scoring_bytes(self, spec: ModelSpec, device: str) -> int:
        together = self.windows.samples if self.order in (FIRST, VECTORISED) else 1
        kept = 8 * spec.block_parameters() if self.order == MIXED else 0
        return (
            backward_bytes(spec, device, self.windows.samples, together, self.windows.length) + kept
        )

"""What a model may take: memory, known from the plan before any work, and a rate, which only
measuring tells.

Memory is that of serving one text: the weights as they are stored, plus the keys and values of
``context`` tokens in the type that plain weights are stored in. What an engine needs besides them
(its code, activations, a GPU's context) is not in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.settings import require_number
from slim.models.families import SLIDING
from slim.models.spec import DTYPE_BYTES
from slim.quantization.storage import weight_bytes
from slim.search.metrics import DECODE, offered, require_metric

if TYPE_CHECKING:
    from slim.evaluation.evaluation import Evaluation
    from slim.models.spec import ModelSpec

GIGABYTE = 1e9  # bytes, as everywhere in slim
# families in which every block attends to the window, where there is one
WINDOWED = ("mistral", "phi3")


class OverBudget(SlimError):
    """A point that the budget rules out before any work. ``skipped`` tells trackers that nothing
    was tried.

    Args:
        message: what is over which limit.
        needed: the memory that the model would take, bytes.
    """

    skipped = True

    def __init__(self, message: str, needed: float = 0.0):
        super().__init__(message)
        self.needed = needed


@dataclass
class Budget:
    """Limits of every point of a search; None limits nothing.

    Attributes:
        memory_gb: weights and keys and values in 10^9 bytes.
        context: tokens the keys and values are for; at most what the model was built for counts.
        tokens_per_second: least decode rate, measured (``eval.speed``).
        quality: the metric that is the best within the limits, which then have to be given; None
            where ``search.objectives`` alone says what counts.
    """

    memory_gb: float | None = None
    context: int = 2048
    tokens_per_second: float | None = None
    quality: str | None = None

    def __post_init__(self) -> None:
        # here, not at the first point: a mistake in a limit is known at once
        for name in ("memory_gb", "tokens_per_second"):
            if getattr(self, name) is not None:
                require_number(f"budget.{name}", getattr(self, name), 0)
        require_number("budget.context", self.context, 0, integer=True)
        if self.quality is not None and self.memory_gb is None and self.tokens_per_second is None:
            raise SlimError(
                "hparams_search=budget needs a budget: budget.memory_gb=4 (weights and cache, "
                "10^9 bytes) or budget.tokens_per_second=20, or both."
            )

    def check(self, evaluation: Evaluation | None) -> None:
        """Raise ``SlimError`` if what is needed to judge a point will not be measured."""
        if self.quality is not None:
            require_metric(f"budget.quality={self.quality}", self.quality, evaluation)
        if self.tokens_per_second is not None and DECODE not in offered(evaluation):
            raise SlimError(
                "budget.tokens_per_second is measured, and eval.speed=null measures no speed. "
                "Choose eval=quick."
            )

    def memory(self, weights: float, spec: ModelSpec) -> float:
        """Return the memory of a model in bytes.

        Args:
            weights: bytes of its weights.
            spec: its description.
        """
        return weights + cache_bytes(spec, self.context)

    def check_plan(self, spec: ModelSpec) -> None:
        """Raise :class:`OverBudget` if the model that a plan ends in takes more memory than there
        may be."""
        needed = self.memory(weight_bytes(spec), spec)
        if self.memory_gb is not None and needed > self.memory_gb * GIGABYTE:
            raise OverBudget(
                f"over budget.memory_gb={self.memory_gb:g} by its plan: {size(needed)}", needed
            )

    def problem(self, memory: float, rate: float | None) -> str | None:
        """Say which limit a finished model misses, None if none.

        Args:
            memory: in bytes.
            rate: tokens per second, None where it was not measured.
        """
        if self.memory_gb is not None and memory > self.memory_gb * GIGABYTE:
            return f"takes {size(memory)}"
        # "not >=": a rate of NaN misses the limit
        if self.tokens_per_second is not None and not (rate or 0.0) >= self.tokens_per_second:
            return f"decodes {rate or 0.0:.1f} tokens/s"
        return None


def cache_bytes(spec: ModelSpec, context: int) -> float:
    """Return the bytes of keys and values of all blocks.

    A block that attends to a window keeps no more than the window. Keys and values have the type of
    the plain weights.

    Args:
        spec: of the model.
        context: tokens; at most the model's own context counts.
    """
    total = 0  # numbers, not bytes: all have one type
    tokens = min(context, spec.context_length)
    sliding = sliding_blocks(spec)
    for block in range(spec.blocks):
        shape = spec.at(block)  # pruning may have left blocks with different numbers of heads
        kept = tokens
        if block in sliding:
            kept = min(tokens, spec.entry("sliding_window"))
        # a key and a value per token
        total += 2 * shape.kv_heads * shape.head_dim * kept
    return float(total * DTYPE_BYTES.get(spec.dtype, 4))


def sliding_blocks(spec: ModelSpec) -> set[int]:
    """Return the numbers of the blocks that attend to a window only."""
    if not spec.entry("sliding_window"):
        return set()
    types = spec.entry("layer_types")
    if not types and spec.known:
        types = spec.family.layer_types(spec.config)
    elif not types:
        types = None  # an empty list says nothing
    if types is not None:
        return {block for block, kind in enumerate(types) if kind == SLIDING}
    if spec.config.get("model_type") in WINDOWED:
        return set(range(spec.blocks))
    return set()


def size(count: float) -> str:
    """Show bytes so that they can be compared with a budget: four digits that count."""
    if count >= 1e8:
        return f"{count / 1e9:.4g} GB"
    return f"{count / 1e6:.4g} MB"

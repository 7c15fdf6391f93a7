"""What a search looks for: one objective, or several between which there is a compromise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.search.budget import Budget
from slim.search.metrics import is_better_high, require_metric

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from slim.evaluation.evaluation import Evaluation

MOST = 3  # objectives: the front of more is nearly every point


@dataclass
class Search:
    """The objectives of a search and what its points may take.

    Attributes:
        objectives: metrics of the final checkpoint, such as ``perplexity`` and ``bytes_on_disk``:
            the best of one, the front of several.
        budget: what every point has to meet.
    """

    objectives: list[str] = field(default_factory=lambda: ["perplexity", "bytes_on_disk"])
    budget: Budget = field(default_factory=Budget)

    def __post_init__(self) -> None:
        if isinstance(self.objectives, str):
            self.objectives = [self.objectives]
        self.objectives = list(self.objectives or [])
        # a front of a metric against itself is that metric alone
        repeated = len(set(self.objectives)) < len(self.objectives)
        if repeated or not 1 <= len(self.objectives) <= MOST:
            raise SlimError(
                f"search.objectives={self.objectives}: must be one to {MOST} different metrics, "
                "such as [perplexity,bytes_on_disk]."
            )

    @property
    def directions(self) -> list[str]:
        """``"maximize"`` or ``"minimize"`` per objective."""
        directions = []
        for name in self.objectives:
            directions.append("maximize" if is_better_high(name) else "minimize")
        return directions

    @property
    def worst(self) -> list[float]:
        """The values of a point that is no good, so that the search stays away from it."""
        infinite = {"maximize": float("-inf"), "minimize": float("inf")}
        return [infinite[direction] for direction in self.directions]

    def check(self, evaluation: Evaluation | None) -> None:
        """Raise ``SlimError`` if the evaluation will not measure what is looked for. Needs no
        model."""
        for metric in self.objectives:
            require_metric(f"search.objectives={metric}", metric, evaluation)
        self.budget.check(evaluation)


def read_search(config: DictConfig) -> Search | None:
    """Return the search that a configuration belongs to, or None. Raises ``SlimError`` for settings
    that cannot be."""
    from hydra.utils import instantiate

    if not config.get("search"):
        return None
    search = instantiate(config.search)
    search.budget = instantiate(config.budget)
    return search

"""Distillation on Lightning: the student of :class:`slim.training.module.LanguageModeling` with
another objective."""

from __future__ import annotations

from torch import Tensor, nn

from slim.training.module import LanguageModeling, Optimization


class Distilling(LanguageModeling):
    """Trains a model by ``objective(model, batch)``, a loss summed over tokens, and what the
    objective itself learns."""

    def __init__(
        self, model: nn.Module, optimisation: Optimization, objective: nn.Module, rate: float = 0.0
    ):
        """Put the parts together.

        Args:
            model: The student.
            optimisation: How it is trained.
            objective: A module with the frozen teacher in it.
            rate: Highest learning rate of the objective's own parameters, such as projectors
                between both models; they are no part of the result.
        """
        super().__init__(model, optimisation)
        self.objective = objective
        self.rate = rate

    def parameter_groups(self) -> list[dict]:
        groups = super().parameter_groups()
        learned = [value for value in self.objective.parameters() if value.requires_grad]
        if learned:
            groups.append({"params": learned, "weight_decay": 0.0, "lr": self.rate})
        return groups

    def train(self, mode: bool = True) -> Distilling:
        """Set the mode of all but what is frozen: a teacher has no dropout when it teaches.

        Args:
            mode: Whether to train.
        """
        super().train(mode)
        for module in self.objective.modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def total(self, batch: dict) -> Tensor:
        return self.objective(self.model, batch)

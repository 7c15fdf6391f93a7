"""Distillation on Lightning: the student of :class:`slim.training.module.LanguageModeling` with
another objective."""

from __future__ import annotations

from torch import Tensor, nn

from slim.training.module import LanguageModeling, Optimization


class Distilling(LanguageModeling):
    """Trains ``model`` by ``objective(model, batch)``, a loss summed over tokens, and what the
    objective itself learns.

    objective: a module with the frozen teacher in it. rate: highest learning rate of the
    objective's own parameters, such as projectors between both models; they are no part of the
    result."""

    def __init__(
        self, model: nn.Module, optimisation: Optimization, objective: nn.Module, rate: float = 0.0
    ):
        super().__init__(model, optimisation)
        self.objective, self.rate = objective, rate

    def parameter_groups(self) -> list[dict]:
        own = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        groups = super().parameter_groups()
        return [*groups, {"params": own, "weight_decay": 0.0, "lr": self.rate}] if own else groups

    def train(self, mode: bool = True) -> Distilling:
        """Set the mode of all but what is frozen: a teacher has no dropout when it teaches."""
        super().train(mode)
        for module in self.objective.modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def total(self, batch: dict) -> Tensor:
        return self.objective(self.model, batch)

"""The training objective: a causal language model's negative log-likelihood of the tokens that count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from slim.training.forward import sequence_nll
from slim.training.schedule import learning_rate_factor


class NotFinite(ArithmeticError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True)
class Optimisation:
    """AdamW (arXiv:1711.05101) and its schedule.

    warmup: in steps. floor: factor on the learning rate at the end. betas: decay of the two moments.
    clip: largest norm of the gradient over all parameters; 0 for no limit.
    """

    steps: int
    learning_rate: float
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0


class LanguageModelling(pl.LightningModule):
    """Trains the parameters of ``model`` that require gradients to predict the tokens with labels.

    model: a causal language model of transformers, plain or wrapped by PEFT. optimisation: None to evaluate only.
    """

    def __init__(self, model: nn.Module, optimisation: Optimisation | None = None):
        super().__init__()
        self.model = model
        self.optimisation = optimisation
        self.step_nll = 0.0  # summed over the micro-batches of the current step

    def nll(self, batch: dict) -> Tensor:
        """Return the summed negative log-likelihood, in nats, of the tokens with labels."""
        return sequence_nll(self.model, batch["tokens"], batch["labels"], batch.get("positions"))

    def total(self, batch: dict) -> Tensor:
        """Return what is minimised, summed over the tokens of the micro-batch that count."""
        return self.nll(batch)

    def training_step(self, batch: dict, index: int) -> Tensor:
        total = self.total(batch)
        if not torch.isfinite(total):
            raise NotFinite(f"The loss is {total.item()} at step {self.trainer.global_step + 1}")
        first = index % self.trainer.accumulate_grad_batches == 0
        self.step_nll = total.detach() + (0 if first else self.step_nll)
        # Lightning divides by the number of micro-batches; here the step's number of tokens is the only denominator.
        return total * (self.trainer.accumulate_grad_batches / batch["loss_tokens"])

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clip here, since Lightning refuses to together with a fused optimiser in mixed precision."""
        if self.optimisation.clip:
            trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
            nn.utils.clip_grad_norm_(trained, self.optimisation.clip)

    def parameter_groups(self) -> list[dict]:
        """Return what is trained, as the optimiser wants it."""
        return decay_groups(self.model.named_parameters(), self.optimisation.weight_decay)

    def configure_optimizers(self) -> dict:
        o = self.optimisation
        optimiser = torch.optim.AdamW(self.parameter_groups(), lr=o.learning_rate, betas=o.betas, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, o.steps, o.schedule, o.warmup, o.floor)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Return the optimiser's groups: matrices with weight decay, norms and biases without."""
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]

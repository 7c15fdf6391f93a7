"""The training objective: a causal language model's negative log-likelihood of the tokens that
count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from slim.core import processes
from slim.training import distributed, optimizers
from slim.training.forward import batch_nll
from slim.training.schedule import learning_rate_factor

SCALED = "16-mixed"  # the precision in which the loss is scaled


class NotFinite(ArithmeticError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True)
class Optimization:
    """An optimiser and its schedule.

    Attributes:
        steps: Of the whole training.
        learning_rate: The highest.
        schedule: A name in ``schedule.py``.
        warmup: Steps over which the rate rises.
        weight_decay: On matrices only.
        floor: Factor on the learning rate at the end.
        betas: Decay of the two moments.
        clip: Largest norm of the gradient over all parameters; 0 for no limit.
        optimizer: A name in ``optimizers.py``.
    """

    steps: int
    learning_rate: float
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    floor: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    optimizer: str = "adamw"


class LanguageModeling(pl.LightningModule):
    """Trains the parameters that require gradients to predict the tokens with labels."""

    def __init__(self, model: nn.Module, optimisation: Optimization | None = None):
        """Wrap the model.

        Args:
            model: A causal language model of transformers, plain or wrapped by PEFT.
            optimisation: How it is trained; None to evaluate only.
        """
        super().__init__()
        self.model = model
        self.optimisation = optimisation
        # summed over the micro-batches of the current step and over the processes
        self.step_nll = 0.0

    def nll(self, batch: dict) -> Tensor:
        """Return the summed negative log-likelihood, in nats, of the tokens with labels, or of the
        classes of texts.

        Args:
            batch: ``tokens``, ``labels`` and perhaps ``positions``, int64 [rows, length]; or those
                of a classifier.
        """
        return batch_nll(self.model, batch)

    def total(self, batch: dict) -> Tensor:
        """Return what is minimised, summed over the tokens of the micro-batch that count.

        Args:
            batch: As for :meth:`nll`.
        """
        return self.nll(batch)

    def forward(self, batch: dict, held_out: bool = False) -> Tensor:
        """Return what is minimised, or, for validation, the negative log-likelihood; both summed
        over tokens.

        Args:
            batch: As for :meth:`nll`.
            held_out: Whether this is validation.
        """
        return self.nll(batch) if held_out else self.total(batch)

    def configure_model(self) -> None:
        """Shard the model where the strategy asks for it."""
        if self.device_mesh is not None:
            distributed.shard(self)

    def training_step(self, batch: dict, index: int) -> Tensor:
        parts = self.trainer.accumulate_grad_batches
        total = self(distributed.rows_of(batch))
        everywhere = distributed.sum_over_processes(total.detach())
        if not torch.isfinite(everywhere):
            step = self.trainer.global_step + 1
            raise NotFinite(f"The loss is {everywhere.item()} at step {step}{where(batch)}")
        if index % parts == 0:  # the first micro-batch of a step
            self.step_nll = 0.0
        self.step_nll = self.step_nll + everywhere
        # Lightning divides by the number of micro-batches, DeepSpeed does so again, and gradients
        # are averaged over processes; here the step's number of tokens is the only denominator.
        divided = parts**2 if self.trainer.strategy.handles_gradient_accumulation else parts
        return total * (divided * processes.world_size() / batch["loss_tokens"])

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip here, since Lightning refuses to together with a fused optimiser in mixed precision.

        Args:
            optimizer: Whose parameters' gradients are clipped.
            gradient_clip_val: Given where DeepSpeed clips, which alone has the whole gradient then.
            gradient_clip_algorithm: Not used.
        """
        if not self.optimisation.clip or gradient_clip_val:
            return
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.optimisation.clip)

    def parameter_groups(self) -> list[dict]:
        """Return what is trained, as the optimiser wants it."""
        return decay_groups(self.model.named_parameters(), self.optimisation.weight_decay)

    def configure_optimizers(self) -> dict:
        chosen = self.optimisation
        optimizer = optimizers.build(
            chosen.optimizer, self.parameter_groups(), chosen.learning_rate, chosen.betas
        )
        if self.trainer.precision == SCALED:
            unfused(optimizer)

        def factor(step: int) -> float:
            return learning_rate_factor(
                step, chosen.steps, chosen.schedule, chosen.warmup, chosen.floor
            )

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def where(batch: dict) -> str:
    """Name the windows of a batch, for a message.

    Args:
        batch: A micro-batch, perhaps with the numbers of its ``windows``.
    """
    if "windows" not in batch:
        return ""
    numbers = ", ".join(str(number) for number in batch["windows"].tolist())
    return f", in windows {numbers} of the training data"


def unfused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let the scaler of a float16 training undo its scale before gradients are clipped: a fused
    step does so inside.

    Args:
        optimizer: Changed in place, and returned.
    """
    for group in optimizer.param_groups:
        if group.get("fused"):
            group["fused"] = False
    optimizer._step_supports_amp_scaling = False
    return optimizer


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Return the optimiser's groups: matrices with weight decay, norms and biases without.

    Args:
        parameters: Of a model, by name.
        weight_decay: Of the matrices.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.dim() > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]

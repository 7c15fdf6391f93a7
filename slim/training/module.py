"""The training objective: a causal language model's negative log-likelihood of the tokens that count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.data.packing import IGNORE
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

    def training_step(self, batch: dict, index: int) -> Tensor:
        total = self.nll(batch)
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

    def configure_optimizers(self) -> dict:
        o = self.optimisation
        groups = decay_groups(self.model.named_parameters(), o.weight_decay)
        optimiser = torch.optim.AdamW(groups, lr=o.learning_rate, betas=o.betas, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: learning_rate_factor(step, o.steps, o.schedule, o.warmup, o.floor)
        )
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def sequence_nll(model: nn.Module, tokens: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return the summed negative log-likelihood, in nats, of the tokens whose label is not ``IGNORE``.

    tokens, labels, positions: int64 [rows, length]. With positions that start again at 0 inside a row, each such piece
    is a sequence of its own: no mask and no cache may be given then, or transformers lets them see each other.
    The head runs on the outputs that predict a label only, which saves most of it where answers are short.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = plain.base_model(input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False)[0]
    target = labels[:, 1:]
    counts = target != IGNORE
    logits = plain.get_output_embeddings()(hidden[:, :-1][counts])
    return F.cross_entropy(logits.float(), target[counts], reduction="sum")


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Return the optimiser's groups: matrices with weight decay, norms and biases without."""
    trained = [parameter for _, parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    vectors = [parameter for parameter in trained if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def mean_nll(model: nn.Module, batches: Iterable[dict], device: str | torch.device = "cpu") -> float:
    """Return the mean negative log-likelihood per counted token over ``batches``, in nats; the model's mode is kept."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        moved = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        total += sequence_nll(model, moved["tokens"], moved["labels"], moved.get("positions")).double().item()
        count += int((batch["labels"][:, 1:] != IGNORE).sum())
    model.train(training)
    return total / count

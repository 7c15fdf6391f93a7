"""How good a quantised model is: perplexity of a test text, and divergence from the unquantised
model's predictions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from slim.checkpoints.tokenizer import load_tokenizer
from slim.evaluation.perplexity import Perplexity, exponential, negative_log_likelihood
from slim.loading.load_model import load_model

BATCH = 16  # windows in one forward


@dataclass
class Quality:
    """Token perplexity, and the mean Kullback-Leibler divergence from the unquantised predictions
    in nats per token."""

    perplexity: float
    divergence: float


class Yardstick:
    """Measures checkpoints that share a tokenizer over windows of one text, in float32.

    source: the unquantised checkpoint. windows: how many, from the start of the text; None: all.
    compared: how many of them the divergence is taken over; two models run there."""

    def __init__(self, source: Path, text: Path, length: int, windows: int | None, compared: int):
        protocol = Perplexity(str(text), window=length, limit=windows)
        self.windows = protocol.windows(load_tokenizer(source), length)
        self.compared = min(compared, len(self.windows))
        self.reference = load_model(source, "float32")

    @property
    def cache_key(self) -> dict:
        """What figures must share to be compared."""
        digest = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        return {"windows": list(self.windows.shape), "sha256": digest, "compared": self.compared}

    def measure(self, folder: Path) -> Quality:
        return self.measure_model(load_model(folder, "float32"))

    def measure_model(self, model) -> Quality:
        count, length = self.windows.shape
        nll = negative_log_likelihood(model, self.windows, BATCH) / (count * (length - 1))
        return Quality(
            exponential(nll), divergence(self.reference, model, self.windows[: self.compared])
        )


@torch.inference_mode()
def divergence(reference, model, windows: torch.Tensor) -> float:
    """Return mean KL(p_reference || p_model) in nats over all but the last position of windows,
    int64 [n, length]."""
    total = 0.0
    for batch in windows.split(BATCH):
        expected, found = (
            each(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            for each in (reference, model)
        )
        total += torch.nn.functional.kl_div(
            found, expected, reduction="sum", log_target=True
        ).item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))

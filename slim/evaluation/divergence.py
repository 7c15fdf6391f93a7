"""How far a checkpoint's predictions are from those of the checkpoint that its chain began with.

With P the reference's distribution of the next token and Q the checkpoint's, in nats::

    KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))

for every token that the perplexity predicts: the mean, the value that 99 % of the tokens stay
below, the largest one, and the share of tokens where both find the same one most likely.

What is kept of the reference is what its head reads, not what it says: h numbers per token instead
of the vocabulary's many, 85 times fewer for SmolLM2. The product with the head is computed again
for every checkpoint, a slice of the tokens at a time.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.store import digest, reraise_full_disk
from slim.core.console import track
from slim.core.io import atomic_path
from slim.core.lazy import LazyModule
from slim.models.logits import soft_cap

if TYPE_CHECKING:
    import torch

    from slim.checkpoints.result import Result
    from slim.checkpoints.store import Store
else:
    torch = LazyModule("torch")


@dataclass
class Reference:
    """The checkpoint that others are compared with.

    Attributes:
        label: what tables call it.
        folder: its files.
        content: hash of what it holds.
        store: keeps its hidden states, next to the evaluations.
    """

    label: str
    folder: Path
    content: str
    store: Store

    @classmethod
    def of(cls, result: Result, store: Store) -> Reference:
        """Return a result as a reference.

        Args:
            result: the first checkpoint of a chain or of a comparison.
            store: where its hidden states are kept.
        """
        return cls(result.label, result.checkpoint.folder, result.content, store)

    def states_file(self, windows: torch.Tensor, dtype: str, device: str) -> Path:
        """Return where the hidden states for some text are kept.

        Args:
            windows: int64 [windows, tokens].
            dtype: type that the reference computes in, such as ``"float32"``.
            device: ``"cpu"`` or ``"cuda"``.
        """
        name = digest(["reference", self.content, tokens_sha256(windows), dtype, device])
        return self.store.evaluation_file(name).with_suffix(".safetensors")


@dataclass(frozen=True)
class KeptReference:
    """What is kept of a reference for one text.

    Attributes:
        path: the file with its hidden states, from :func:`keep_states`.
        windows: int64 [windows, tokens], the text that they are of.
    """

    path: Path
    windows: torch.Tensor


def tokens_sha256(windows: torch.Tensor) -> str:
    """Return a checksum of tokens, int64 of any shape on the CPU."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


class KeptStates:
    """The last hidden states of a reference and its head, read from a file as they are needed.

    Args:
        path: the file, from :func:`keep_states`.
        device: ``"cpu"`` or ``"cuda"``: where the products are computed.
        cap: Gemma's soft cap of the logits; None for none.
    """

    def __init__(self, path: Path, device: str, cap: float | None):
        from safetensors import safe_open

        self._file = safe_open(path, framework="pt", device=device)
        self._states = self._file.get_slice("hidden")
        self._head = self._file.get_tensor("head")
        self._cap = cap

    def logits(self, start: int, end: int) -> torch.Tensor:
        """Return the logits of predictions ``start`` to ``end``, [tokens, vocabulary]."""
        states = self._states[start:end]
        return soft_cap(torch.nn.functional.linear(states, self._head), self._cap)


def keep_states(path: Path, model, windows: torch.Tensor, batch_size: int) -> None:
    """Write what the head of a model reads, and the head.

    Args:
        path: safetensors file to write, complete or not at all: ``hidden``, [predictions, hidden],
            after the final norm, and ``head``, [vocabulary, hidden], in the type of the model.
        model: a torch module of transformers.
        windows: int64 [windows, tokens].
        batch_size: windows in one forward pass.
    """
    from safetensors.torch import save_file

    states = []
    for batch in track(windows.split(batch_size), "what the reference says"):
        output = model.base_model(input_ids=batch[:, :-1].to(model.device), use_cache=False)
        states.append(output.last_hidden_state.flatten(0, 1).cpu())
    head = model.get_output_embeddings()
    size = model.config.hidden_size
    # a packed head has no matrix to copy: the rows of the identity show it as it computes
    rows = torch.eye(size, dtype=states[0].dtype, device=model.device)
    tensors = {"hidden": torch.cat(states), "head": head(rows).T.cpu().contiguous()}
    try:
        with atomic_path(path) as partial:
            save_file(tensors, partial)
    except OSError as error:
        reraise_full_disk(error, path)
        raise


class DivergenceMeter:
    """Compares the predictions of a checkpoint with those kept of the reference, in their order.

    Args:
        kept: the reference's.
    """

    def __init__(self, kept: KeptStates):
        self._kept = kept
        self._kl: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []
        self._seen = 0

    def add(self, logits: torch.Tensor) -> None:
        """Take the logits of the next predictions, [tokens, vocabulary]."""
        end = self._seen + len(logits)
        kl, same = divergence(self._kept.logits(self._seen, end), logits)
        self._kl.append(kl.double().cpu())
        self._same.append(same.double().cpu())
        self._seen = end

    def result(self, windows: int) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Return the metrics, and the records: the mean of every window.

        Args:
            windows: their number.
        """
        kl, same = torch.cat(self._kl), torch.cat(self._same)
        metrics = {
            "kl": kl.mean().item(),
            "kl_p99": torch.quantile(kl, 0.99).item(),
            "kl_max": kl.max().item(),
            "same_top": same.mean().item(),
        }
        per_window = {
            "kl": kl.view(windows, -1).mean(1),
            "same_top": same.view(windows, -1).mean(1),
        }
        records = {}
        for name, means in per_window.items():
            records[name] = means.tolist()
            # neighbouring tokens resemble each other, windows hardly do
            if windows > 1:
                metrics[f"{name}_stderr"] = (means.std() / windows**0.5).item()
        return metrics, records


def divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare two predictions of the same tokens.

    Args:
        p_logits: [tokens, vocabulary], the reference's.
        q_logits: [tokens, vocabulary], the checkpoint's.

    Returns:
        KL(P || Q) in nats, float32 [tokens]; and whether both find the same token most likely,
        bool [tokens].
    """
    log_p = p_logits.float().log_softmax(-1)
    log_q = q_logits.float().log_softmax(-1)
    same = log_p.argmax(-1) == log_q.argmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    # rounding can leave a little below nought where both are equal
    return kl.clamp_min(0.0), same

"""Token perplexity, as the GPTQ (arXiv:2210.17323) and AWQ (arXiv:2306.00978) papers report it.

The documents are joined to one text, tokenised once, and cut into windows of w tokens that do not
overlap; the tail that fills no window is dropped. With the tokens x of window j::

    NLL_j = -1/(w-1) * sum_{i=2..w} log p(x_i | x_1 .. x_{i-1})
    perplexity = exp(mean_j NLL_j)

Each window starts without context, so a shorter window gives a higher perplexity: figures compare
only where the window and the tokens are the same. The protocol next to the figure states both, the
tokens by their checksum.

The papers join WikiText-2's lines by empty lines, PTB's sentences and the first 1100 documents of
C4's first validation file by spaces, and take 256 windows of C4 (``slim/conf/eval/ptb.yaml``,
``slim/conf/eval/c4.yaml``)."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.data.encoding import encode_long
from slim.data.text import Text, load_dataset_files
from slim.models.logits import head_logits
from slim.models.spec import FAMILIES

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

# entries of the logits held at a time: 64 MiB in float32, whatever the vocabulary
LOGITS_AT_ONCE = 2**24
TOKENS_AT_ONCE = 1024  # tokens in one forward pass where no batch size is given


@dataclass
class Perplexity(Text):
    """Which text, in which windows. ``text``, ``subset``, ``split`` and ``column`` are those of
    :class:`Text`.

    window: tokens per window, at most the model's context.
    limit: number of windows from the start of the text; None for all.
    separator: what stands between the documents when they are joined.
    first_documents: number of documents from the start that are joined; None for all.
    files: one data file inside a hub data set, read instead of the whole set; ``split`` and
        ``subset`` do not matter then.
    revision: branch, tag or commit of the hub data set; used with ``files`` only.
    batch_size: windows in one forward pass; None for as many as make 1024 tokens. Changes the
        speed, and the result only by rounding.
    """

    cache_name: ClassVar[str] = "Perplexity"

    window: int = 2048
    limit: int | None = None
    batch_size: int | None = field(default=None, metadata={"cache_key": False})
    separator: str = "\n\n"
    first_documents: int | None = None
    files: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        require_number("eval.perplexity.window", self.window, 2, integer=True)
        for name in ("limit", "batch_size", "first_documents"):
            if getattr(self, name) is not None:
                require_number(f"eval.perplexity.{name}", getattr(self, name), 1, integer=True)
        super().__post_init__()

    def cache_key(self) -> dict:
        source = {"files": self.files, "revision": self.revision} if self.files else {}
        joined = {"separator": self.separator, "first_documents": self.first_documents}
        return {
            **self.text_identity(),
            **source,
            **joined,
            "window": self.window,
            "limit": self.limit,
        }

    def rows(self) -> Iterator[dict]:
        """Yield the rows of the text's file or data set; of ``files`` where that is set and the
        text is not local."""
        if self.files is None or self.path is not None:
            return super().rows()
        return iter(load_dataset_files(self.text, self.files, self.revision))

    def joined(self) -> str:
        """Return the documents as one text, as the protocol joins them."""
        return self.separator.join(itertools.islice(self.documents(), self.first_documents))

    def windows(self, tokenizer, context_length: int) -> torch.Tensor:
        """Return int64 tokens of shape [windows, min(window, context_length)].

        Raises ``SlimError`` if the text does not fill one window.
        """
        window = min(self.window, context_length)
        ids = encode_long(tokenizer, self.joined())
        count = len(ids) // window
        if count == 0:
            raise SlimError(
                f"The text {self.text} has {len(ids)} tokens, fewer than one window of {window}. "
                f"Give a longer text or eval.perplexity.window={max(2, len(ids))}."
            )
        count = min(count, self.limit or count)
        return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Return ``{"metrics": {"perplexity": ...}, "protocol": {...}, "records": {"nll":
        [...]}}``.

        ``nll`` is the mean negative log-likelihood per prediction, in nats, of every window: what a
        difference between two checkpoints is computed from, pair by pair. NaN and infinity stay
        what they are."""
        windows = self.windows(tokenizer, context_length)
        count, window = windows.shape
        nll = window_nll(model, windows, self.batch_size) / (window - 1)
        protocol = {
            "window": window,
            "windows": count,
            "predictions": count * (window - 1),
            "tokens_sha256": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        }
        metrics = {"perplexity": exponential(nll.mean().item())}
        return {"metrics": metrics, "protocol": protocol, "records": {"nll": nll.tolist()}}


def negative_log_likelihood(model, windows: torch.Tensor, batch_size: int | None = None) -> float:
    """Return the summed negative log-likelihood, in nats, of every token but the first of each
    window.

    windows: int64 [windows, tokens]. Summed in float64; each term is computed in float32 at least.
    """
    return window_nll(model, windows, batch_size).sum().item()


def window_nll(model, windows: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
    """Return the same sum for every window apart: float64 [windows], on the CPU."""
    batch_size = batch_size or max(1, TOKENS_AT_ONCE // windows.shape[1])
    sums = []
    with torch.inference_mode():
        for batch in track(windows.split(batch_size), "perplexity"):
            batch = batch.to(model.device)
            sums.append(token_nll(model, batch[:, :-1], batch[:, 1:]).double().sum(1).cpu())
    return torch.cat(sums)


def token_nll(model, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log p of ``targets``, int64 [windows, k], at the last k positions of ``ids``, int64
    [windows, tokens].

    float32 [windows, k]. The logits are computed for a slice of the positions at a time.
    """
    wanted = targets.flatten()
    if model.config.model_type not in FAMILIES:  # the head may be more than one matrix
        logits = model(input_ids=ids, use_cache=False).logits[:, -targets.shape[1] :].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").view(
            targets.shape
        )
    hidden = (
        model.base_model(input_ids=ids, use_cache=False)
        .last_hidden_state[:, -targets.shape[1] :]
        .flatten(0, 1)
    )
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [
        torch.nn.functional.cross_entropy(
            head_logits(model, part).float(), tokens, reduction="none"
        )
        for part, tokens in zip(hidden.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.cat(parts).view(targets.shape)


def exponential(value: float) -> float:
    """Return exp(value), infinity where that is too large for a float; NaN stays NaN."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf

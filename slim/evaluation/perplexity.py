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

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_number
from slim.core.text import counted
from slim.data.encoding import encode_long
from slim.data.text import Text, load_dataset_files
from slim.evaluation.divergence import (
    DivergenceMeter,
    KeptReference,
    KeptStates,
    tokens_sha256,
)
from slim.models.logits import head_logits
from slim.models.spec import FAMILIES

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

# entries of the logits held at a time: 64 MiB in float32, whatever the vocabulary
LOGITS_AT_ONCE = 2**24
SHORTEST = 2  # tokens per window at least: the first is not predicted
TOKENS_AT_ONCE = 1024  # tokens in one forward pass where no batch size is given


@dataclass
class Perplexity(Text):
    """Which text, in which windows. ``text``, ``subset``, ``split`` and ``column`` are those of
    :class:`Text`.

    Attributes:
        window: tokens per window, at most the model's context.
        limit: number of windows from the start of the text; None for all.
        batch_size: windows in one forward pass; None for as many as make 1024 tokens. Changes the
            speed, and the result only by rounding.
        separator: what stands between the documents when they are joined.
        first_documents: number of documents from the start that are joined; None for all.
        files: one data file inside a hub data set, read instead of the whole set; ``split`` and
            ``subset`` do not matter then.
        revision: branch, tag or commit of the hub data set; None: the main branch.
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
        require_number("eval.perplexity.window", self.window, SHORTEST, integer=True)
        for name in ("limit", "batch_size", "first_documents"):
            if getattr(self, name) is not None:
                require_number(f"eval.perplexity.{name}", getattr(self, name), 1, integer=True)
        super().__post_init__()

    def cache_key(self) -> dict:
        key = self.text_identity()
        # a key with these in it would be another one for every text without files
        if self.files:
            key = {**key, "files": self.files, "revision": self.revision}
        return {
            **key,
            "separator": self.separator,
            "first_documents": self.first_documents,
            "window": self.window,
            "limit": self.limit,
        }

    def located_rows(self) -> Iterator[tuple[str, dict]]:
        """Yield where a row stands and the row: of ``files`` where that is set and the text is not
        local, else of the text's file or data set."""
        # a local copy of the data set is that file already
        if self.files is None or self.path is not None:
            yield from super().located_rows()
            return
        rows = load_dataset_files(self.text, self.files, self.revision)
        for number, row in enumerate(rows, 1):
            yield f"{self.text}, {self.files}, row {number}", row

    def joined(self) -> str:
        """Return the documents as one text, as the protocol joins them."""
        return self.separator.join(itertools.islice(self.documents(), self.first_documents))

    def windows(self, tokenizer, context_length: int) -> torch.Tensor:
        """Cut the text into windows.

        Args:
            tokenizer: of the checkpoint.
            context_length: tokens that the model has room for.

        Returns:
            int64 tokens of shape [windows, min(window, context_length)].

        Raises:
            SlimError: when the text does not fill one window.
        """
        # a model with a shorter context is measured on shorter windows, which its protocol says
        window = min(self.window, context_length)
        ids = encode_long(tokenizer, self.joined())
        count = len(ids) // window
        if count == 0:
            advice = "Give a longer text: eval.perplexity.text=FILE"
            if len(ids) >= SHORTEST:
                advice += f", or a shorter window: eval.perplexity.window={len(ids)}"
            raise SlimError(
                f"The text {self.text} is too short: it has {counted(len(ids), 'token')}, fewer "
                f"than one window of {window}.\n{advice}."
            )
        count = min(count, self.limit or count)
        return torch.tensor(ids[: count * window], dtype=torch.long).view(count, window)

    @staticmethod
    def protocol(windows: torch.Tensor) -> dict:
        """Return what a perplexity on some windows, int64 [windows, tokens], depends on."""
        count, window = windows.shape
        return {
            "window": window,
            "windows": count,
            # the first token of a window has no context and is not predicted
            "predictions": count * (window - 1),
            "tokens_sha256": tokens_sha256(windows),
        }

    def measure(
        self, model, tokenizer, context_length: int, kept: KeptReference | None = None
    ) -> dict:
        """Measure the perplexity. NaN and infinity stay what they are.

        Args:
            model: a torch module of transformers.
            tokenizer: of the checkpoint.
            context_length: tokens that the model has room for.
            kept: what is kept of the checkpoint that predictions are compared with, and the
                windows it was made of; None: they are not compared.

        Returns:
            ``metrics``: ``perplexity``; ``protocol``; and ``records``: ``nll``, the mean negative
            log-likelihood per prediction, in nats, of every window. A difference between two
            checkpoints is computed from these, pair by pair. With ``kept`` also those of
            :meth:`slim.evaluation.divergence.DivergenceMeter.result`.
        """
        meter = None
        if kept is None:
            windows = self.windows(tokenizer, context_length)
        else:
            windows = kept.windows
            cap = getattr(model.config, "final_logit_softcapping", None)
            meter = DivergenceMeter(KeptStates(kept.path, model.device.type, cap))
        count, window = windows.shape
        nll = window_nll(model, windows, self.batch_size, meter) / (window - 1)
        metrics = {"perplexity": exponential(nll.mean().item())}
        records = {"nll": nll.tolist()}
        if meter is not None:
            compared, means = meter.result(count)
            metrics.update(compared)
            records.update(means)
        return {"metrics": metrics, "protocol": self.protocol(windows), "records": records}


def negative_log_likelihood(model, windows: torch.Tensor, batch_size: int | None = None) -> float:
    """Return the negative log-likelihood of every token but the first of each window.

    Args:
        model: a torch module of transformers.
        windows: int64 [windows, tokens].
        batch_size: windows in one forward pass; None for as many as make 1024 tokens.

    Returns:
        The sum in nats, in float64; each term is computed in float32 at least.
    """
    return window_nll(model, windows, batch_size).sum().item()


def window_nll(
    model,
    windows: torch.Tensor,
    batch_size: int | None = None,
    meter: DivergenceMeter | None = None,
) -> torch.Tensor:
    """Return the negative log-likelihood of every window apart.

    Args:
        model: a torch module of transformers.
        windows: int64 [windows, tokens].
        batch_size: windows in one forward pass; None for as many as make 1024 tokens.
        meter: is shown the logits.

    Returns:
        float64 [windows], on the CPU: the sum over all tokens but the first, in nats.
    """
    batch_size = batch_size or default_batch_size(windows)
    sums = []
    with torch.inference_mode():
        for batch in track(windows.split(batch_size), "perplexity"):
            batch = batch.to(model.device)
            # float64 before the sum: thousands of float32 terms would lose digits
            nll = token_nll(model, batch[:, :-1], batch[:, 1:], meter)
            sums.append(nll.double().sum(1).cpu())
    return torch.cat(sums)


def default_batch_size(windows: torch.Tensor) -> int:
    """Return how many of the windows, [windows, tokens], are read in one forward pass."""
    return max(1, TOKENS_AT_ONCE // windows.shape[1])


def token_nll(
    model,
    ids: torch.Tensor,
    targets: torch.Tensor,
    meter: DivergenceMeter | None = None,
) -> torch.Tensor:
    """Return -log p of tokens. The logits are computed for a slice of the positions at a time.

    Args:
        model: a torch module of transformers.
        ids: int64 [windows, tokens], what the model reads.
        targets: int64 [windows, k], what comes after the last k positions of ``ids``.
        meter: is shown the logits, row after row.

    Returns:
        float32 [windows, k], in nats.
    """
    predicted = targets.shape[1]
    wanted = targets.flatten()
    if model.config.model_type not in FAMILIES:  # the head may be more than one matrix
        logits = model(input_ids=ids, use_cache=False).logits[:, -predicted:].flatten(0, 1)
        if meter is not None:
            meter.add(logits)
        return _cross_entropy(logits, wanted).view(targets.shape)
    # the model without its head: all logits of a large vocabulary would not fit
    output = model.base_model(input_ids=ids, use_cache=False)
    hidden = output.last_hidden_state[:, -predicted:].flatten(0, 1)
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = []
    for states, tokens in zip(hidden.split(rows), wanted.split(rows), strict=True):
        logits = head_logits(model, states)
        if meter is not None:
            meter.add(logits)
        parts.append(_cross_entropy(logits, tokens))
    return torch.cat(parts).view(targets.shape)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log p of each target, float32 [tokens], whatever the type of ``logits``."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def exponential(value: float) -> float:
    """Return exp(value), infinity where that is too large for a float; NaN stays NaN."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf

r"""Perplexity per word and per byte, document by document, as lm-eval's ``wikitext`` task computes
it.

Unlike token perplexity it can be compared between models with different tokenizers. With N_w words
and N_b bytes (UTF-8) of the documents as they are, and NLL the sum over all their tokens::

    word_perplexity = exp(NLL / N_w)
    byte_perplexity = exp(NLL / N_b)
    bits_per_byte = NLL / (N_b log 2)

Every document starts with the begin-of-text token (else end-of-text); blocks of as many tokens as
the context holds are scored one after the other, each token once: block s..e is predicted from the
tokens max(0, e-L)..e, so that the last, shorter block has a full context. Source:
EleutherAI/lm-evaluation-harness, ``loglikelihood_rolling`` and ``tasks/wikitext``. The logits are
computed for a slice of the tokens at a time (``slim/evaluation/perplexity.py``), so a large
vocabulary fits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.core.settings import require_choice, require_number
from slim.data.text import Text
from slim.evaluation.perplexity import exponential, token_nll
from slim.evaluation.task_files import shipped_folder

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

WORDS = re.compile(r"\s+")


@dataclass
class DocumentPerplexity(Text):
    """Which documents. ``text``, ``subset``, ``split`` and ``column`` are those of :class:`Text`; a
    .txt is one document.

    window: most tokens the model sees at once; None for its whole context, as lm-eval does.
    limit: number of documents from the start; None for all.
    detokenizer: ``"wikitext"`` undoes WikiText's spacing before the model reads it, as lm-eval
        does; words and bytes are counted before. ``"none"`` for plain text.
    """

    cache_name: ClassVar[str] = "DocumentPerplexity"

    window: int | None = None
    limit: int | None = None
    detokenizer: str = "none"

    def __post_init__(self) -> None:
        require_choice("eval.documents.detokenizer", self.detokenizer, ("none", "wikitext"))
        for name, low in (("window", 2), ("limit", 1)):
            if getattr(self, name) is not None:
                require_number(f"eval.documents.{name}", getattr(self, name), low, integer=True)
        super().__post_init__()

    def cache_key(self) -> dict:
        own = {"window": self.window, "limit": self.limit, "detokenizer": self.detokenizer}
        return {**self.text_identity(), **own}

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Return ``metrics``, ``protocol`` and ``records`` (``nll``, ``words``, ``bytes`` of every
        document)."""
        window = min(self.window or context_length, context_length)
        restore = wikitext_detokenizer() if self.detokenizer == "wikitext" else lambda text: text
        documents = list(itertools.islice(self.documents(), self.limit))
        if not any(documents):
            raise SlimError(
                f"The text {self.text} is empty. Give another one with eval.documents.text=FILE."
            )
        nll = [
            document_nll(model, *document_tokens(tokenizer, restore(text)), window)
            for text in track(documents, "documents")
        ]
        words, sizes = (
            [len(WORDS.split(text)) for text in documents],
            [len(text.encode()) for text in documents],
        )
        whole = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        protocol = {
            "documents": len(documents),
            "window": window,
            "detokenizer": self.detokenizer,
            "text_sha256": whole,
        }
        records = {"nll": nll, "words": words, "bytes": sizes}
        return {
            "metrics": perplexities(sum(nll), sum(words), sum(sizes)),
            "protocol": protocol,
            "records": records,
        }


def perplexities(nll: float, words: int, size: int) -> dict[str, float]:
    """Return the three figures for a summed negative log-likelihood in nats, by the formulas
    above."""
    return {
        "word_perplexity": exponential(nll / words),
        "byte_perplexity": exponential(nll / size),
        "bits_per_byte": nll / (size * math.log(2)),
    }


def document_tokens(tokenizer, text: str) -> tuple[int, list[int]]:
    """Return the token a document starts with, and the tokens of ``text`` without special ones."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise SlimError(
            "The tokenizer has neither a begin-of-text nor an end-of-text token to start a "
            "document with."
        )
    return first, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def blocks(count: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Yield (context start, block start, block end) for ``count`` predictions in blocks of
    ``window``."""
    for start in range(0, count, window):
        end = min(start + window, count)
        yield max(0, end - window), start, end


def document_nll(model, first: int, tokens: list[int], window: int) -> float:
    """Return the summed negative log-likelihood of ``tokens`` after the token ``first``, in nats,
    in float64."""
    whole = torch.tensor([[first, *tokens]], device=model.device)
    total = 0.0
    with torch.inference_mode():
        for context, start, end in blocks(len(tokens), window):
            found = token_nll(model, whole[:, context:end], whole[:, start + 1 : end + 1])
            total += found.double().sum().item()
    return total


def wikitext_detokenizer():
    """Return lm-eval's own function, from its file: importing the whole harness for it would take
    seconds."""
    path = shipped_folder() / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("lm_eval_wikitext", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: module.wikitext_detokenizer({"page": text})

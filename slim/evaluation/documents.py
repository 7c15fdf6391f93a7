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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
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

# lm-eval counts words by splitting here, the empty ones at both ends included
WORDS = re.compile(r"\s+")


@dataclass
class DocumentPerplexity(Text):
    """Which documents. ``text``, ``subset``, ``split`` and ``column`` are those of :class:`Text`; a
    .txt is one document.

    Attributes:
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
        return {
            **self.text_identity(),
            "window": self.window,
            "limit": self.limit,
            "detokenizer": self.detokenizer,
        }

    def measure(self, model, tokenizer, context_length: int) -> dict:
        """Measure the perplexities of all documents together.

        Args:
            model: a torch module of transformers.
            tokenizer: of the checkpoint.
            context_length: tokens that the model has room for.

        Returns:
            ``metrics`` (see :func:`perplexities`), ``protocol``, and ``records``: ``nll`` (nats),
            ``words`` and ``bytes`` of every document.

        Raises:
            SlimError: when the text is empty.
        """
        window = min(self.window or context_length, context_length)
        # a list: they are read once more for their checksum
        documents = list(itertools.islice(self.documents(), self.limit))
        if not any(documents):
            raise SlimError(
                f"The text {self.text} is empty. Give another one with eval.documents.text=FILE."
            )
        records: dict[str, list] = {"nll": [], "words": [], "bytes": []}
        # documents are measured apart, so that no text is context of another
        for text in track(documents, "documents"):
            first, tokens = document_tokens(tokenizer, self._restored(text))
            records["nll"].append(document_nll(model, first, tokens, window))
            # of the document as it is: what its detokenised form has depends on the detokeniser
            records["words"].append(len(WORDS.split(text)))
            records["bytes"].append(len(text.encode()))
        protocol = {
            "documents": len(documents),
            "window": window,
            "detokenizer": self.detokenizer,
            "text_sha256": hashlib.sha256("\0".join(documents).encode()).hexdigest(),
        }
        metrics = perplexities(sum(records["nll"]), sum(records["words"]), sum(records["bytes"]))
        return {"metrics": metrics, "protocol": protocol, "records": records}

    def _restored(self, text: str) -> str:
        """Return a document as the model reads it."""
        if self.detokenizer == "wikitext":
            return wikitext_detokenizer()(text)
        return text


def perplexities(nll: float, words: int, size: int) -> dict[str, float]:
    """Return the perplexities of documents, by the formulas above.

    Args:
        nll: summed negative log-likelihood of their tokens, in nats.
        words: number of their words.
        size: number of their bytes.

    Returns:
        ``word_perplexity``, ``byte_perplexity`` and ``bits_per_byte``.
    """
    return {
        "word_perplexity": exponential(nll / words),
        "byte_perplexity": exponential(nll / size),
        "bits_per_byte": nll / (size * math.log(2)),
    }


def document_tokens(tokenizer, text: str) -> tuple[int, list[int]]:
    """Tokenise a document.

    Args:
        tokenizer: of the checkpoint.
        text: the document as the model reads it.

    Returns:
        The token that it starts with, and its tokens without special ones.

    Raises:
        SlimError: when the tokenizer has no token to start with.
    """
    first = tokenizer.bos_token_id
    if first is None:  # 0 is a token
        first = tokenizer.eos_token_id
    if first is None:
        raise SlimError(
            "The tokenizer has neither a begin-of-text nor an end-of-text token to start a "
            "document with."
        )
    return first, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def blocks(count: int, window: int) -> Iterator[tuple[int, int, int]]:
    """Cut a document into blocks of tokens that are predicted together.

    Args:
        count: number of predictions: tokens of the document.
        window: most tokens that the model sees at once.

    Yields:
        Where the block's context begins, where the block begins, and where it ends.
    """
    for start in range(0, count, window):
        end = min(start + window, count)
        # the last block is shorter: its context reaches back into the one before
        yield max(0, end - window), start, end


def document_nll(model, first: int, tokens: list[int], window: int) -> float:
    """Return the negative log-likelihood of a document.

    Args:
        model: a torch module of transformers.
        first: the token that it starts with, which is not predicted.
        tokens: those after it.
        window: most tokens that the model sees at once.

    Returns:
        The sum over all tokens, in nats, summed in float64.
    """
    ids = torch.tensor([[first, *tokens]], device=model.device)
    total = 0.0
    with torch.inference_mode():
        for context, start, end in blocks(len(tokens), window):
            # the token at i is predicted at i - 1, so targets lie one place further on
            nll = token_nll(model, ids[:, context:end], ids[:, start + 1 : end + 1])
            total += nll.double().sum().item()
    return total


@cache
def wikitext_detokenizer() -> Callable[[str], str]:
    """Return lm-eval's own function, from its file: importing the whole harness for it would take
    seconds."""
    # its module imports nothing but re
    path = shipped_folder() / "wikitext" / "preprocess_wikitext.py"
    spec = importlib.util.spec_from_file_location("lm_eval_wikitext", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda text: module.wikitext_detokenizer({"page": text})

"""Encoders at work: a text becomes a vector (bi-encoder), or two texts become a score
(cross-encoder). Checkpoints of every kind that slim loads, packed ones included.

How the vectors of a text's tokens become one is what sentence-transformers wrote next to the model
(``1_Pooling/config.json``): their mean, or the first one. Vectors have length 1, so that a product
is the cosine (Reimers & Gurevych, arXiv:1908.10084).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.core.io import read_object
from slim.core.lazy import LazyModule
from slim.loading.load_model import load_model
from slim.models.encoders import BODY, CLASSES
from slim.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

POOLING = Path("1_Pooling") / "config.json"
LONGEST = 256  # tokens of a text that are read, where nothing says how many


def pools_first(folder: Path) -> bool:
    """Whether a checkpoint's vector of a text is that of its first token, not the mean.

    Args:
        folder: Of the checkpoint.

    Raises:
        SlimError: It pools in another way.
    """
    path = Path(folder) / POOLING
    if not path.is_file():
        return False
    settings = read_object(path)
    mode = settings.get("pooling_mode")
    if mode is None:
        modes = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
        chosen = [name for key, name in modes.items() if settings.get(key)]
        mode = chosen[0] if len(chosen) == 1 else None
    if mode not in ("cls", "mean"):
        raise SlimError(f"{path}: slim pools the first token (cls) or the mean of all (mean).")
    return mode == "cls"


def pooled(hidden: torch.Tensor, mask: torch.Tensor, first: bool) -> torch.Tensor:
    """Return a vector of length 1 for every text, [texts, width].

    Args:
        hidden: [texts, length, width], the last hidden states.
        mask: [texts, length], true where there is a token.
        first: Whether the first token's vector counts, not the mean.
    """
    if first:
        vectors = hidden[:, 0]
    else:
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        vectors = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


class BiEncoder:
    """Texts into vectors."""

    def __init__(self, model, tokenizer, folder: Path, window: int = LONGEST):
        """Take what is loaded.

        Args:
            model: An encoder without a head.
            tokenizer: Its own.
            folder: Of the checkpoint, which says how vectors are pooled.
            window: Tokens of a text at most.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.first = pools_first(folder)
        self.window = window

    @classmethod
    def load(cls, folder: Path | str, dtype: str = "auto", device: str = "cpu") -> BiEncoder:
        """Load a checkpoint. Raises ``SlimError`` for one with a head, or a decoder."""
        spec = open_checkpoint(folder).spec
        require_bi_encoder(spec)
        window = min(LONGEST, spec.context_length)
        return cls(load_model(folder, dtype, device), load_tokenizer(folder), Path(folder), window)

    def encode(self, texts: Sequence[str], batch_size: int = 32) -> torch.Tensor:
        """Return float32 [texts, width] on the CPU, every row of length 1.

        Args:
            texts: One or more.
            batch_size: Texts at once; those of like length are read together.
        """
        return in_batches(texts, len, batch_size, self._vectors)

    def _vectors(self, texts: list[str]) -> torch.Tensor:
        batch = padded(self.tokenizer, self.window, texts)
        ids = batch["input_ids"].to(self.model.device)
        mask = batch["attention_mask"].to(self.model.device)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return pooled(hidden, mask.bool(), self.first).cpu()


class CrossEncoder:
    """Pairs of texts into scores."""

    def __init__(self, model, tokenizer, window: int = LONGEST):
        """Take what is loaded.

        Args:
            model: An encoder with a head of one output.
            tokenizer: Its own.
            window: Tokens of both texts at most.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.window = window

    @classmethod
    def load(cls, folder: Path | str, dtype: str = "auto", device: str = "cpu") -> CrossEncoder:
        """Load a checkpoint. Raises ``SlimError`` for one without a head of one output."""
        spec = open_checkpoint(folder).spec
        require_cross_encoder(spec)
        window = min(LONGEST, spec.context_length)
        return cls(load_model(folder, dtype, device), load_tokenizer(folder), window)

    def scores(self, pairs: Sequence[tuple[str, str]], batch_size: int = 32) -> torch.Tensor:
        """Return float32 [pairs] on the CPU, larger for texts that belong together.

        Args:
            pairs: One or more.
            batch_size: Pairs at once; those of like length are read together.
        """
        return in_batches(pairs, lambda pair: sum(map(len, pair)), batch_size, self._scores)

    def _scores(self, pairs: list[tuple[str, str]]) -> torch.Tensor:
        firsts, seconds = ([pair[place] for pair in pairs] for place in (0, 1))
        batch = padded(self.tokenizer, self.window, firsts, seconds).to(self.model.device)
        return self.model(**batch).logits[:, 0].float().cpu()


def in_batches(
    items: Sequence[Any],
    length: Callable[[Any], int],
    batch_size: int,
    compute: Callable[[list], torch.Tensor],
) -> torch.Tensor:
    """Return what is computed of items, in their order.

    Args:
        items: One or more.
        length: Of an item; those of like length are computed together.
        batch_size: Items at once.
        compute: Items -> [items, ...].
    """
    order = sorted(range(len(items)), key=lambda number: length(items[number]))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            parts.append(compute([items[number] for number in order[start : start + batch_size]]))
    return torch.cat(parts)[torch.tensor(order).argsort()]


def padded(tokenizer, window: int, *texts: list[str]):
    """Return texts, or pairs of them, as a batch: cut to ``window`` tokens, filled up behind."""
    return tokenizer(
        *texts,
        truncation=True,
        max_length=window,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )


def require_bi_encoder(spec: ModelSpec) -> None:
    """Raise ``SlimError`` for a model that makes no vectors of texts.

    Args:
        spec: The model.
    """
    if spec.top != BODY:
        what = "an encoder with a head" if spec.is_encoder else "a decoder"
        raise SlimError(
            f"{spec.name} is {what}, and a bi-encoder is an encoder without one, such as MiniLM "
            "(model=minilm)."
        )


def require_cross_encoder(spec: ModelSpec) -> None:
    """Raise ``SlimError`` for a model that gives pairs of texts no score.

    Args:
        spec: The model.
    """
    if spec.top != CLASSES or len(spec.labels) != 1:
        raise SlimError(
            f"{spec.name} is no cross-encoder, which is an encoder with a head of one output.\n"
            "Train one: train.py task=cross_encoder model=minilm output=FOLDER"
        )

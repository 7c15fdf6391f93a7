"""Cosine similarity of answers and references in the space of a sentence embedding model.

    s = <e(answer), e(reference)> / (|e(answer)| |e(reference)|),  -1 to 1

With the package sentence-transformers (an optional extra) any of its models; without it a
checkpoint folder is read by transformers alone: e(text) is then the mean of the last hidden states
over the text's tokens, or the first one's where the folder's ``1_Pooling/config.json`` says so
(Reimers & Gurevych, arXiv:1908.10084)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import checksums
from slim.core.errors import SlimError
from slim.core.io import read_json, sha256
from slim.core.lazy import LazyModule

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

PACKAGE = "sentence_transformers"
POOLING = Path("1_Pooling") / "config.json"
LONGEST = 512  # tokens of a text that are read, where the model does not say
BATCH = 32


def check_encoder(name: str) -> None:
    """Raise ``SlimError`` if the embedding model ``name`` cannot be used here."""
    if not Path(name).expanduser().is_dir() and importlib.util.find_spec(PACKAGE) is None:
        raise SlimError(
            f"eval.answers.similarity={name} is no folder, and a model of the hub needs "
            "sentence-transformers: "
            "pip install 'slim[similarity]', or give the folder of an embedding model."
        )


def encoder_name(name: str) -> str:
    """Return what computes the embeddings, for the protocol: the model, and the package with its
    version."""
    has_package = importlib.util.find_spec(PACKAGE) is not None
    how = (
        f"sentence-transformers {importlib.metadata.version('sentence-transformers')}"
        if has_package
        else "transformers"
    )
    return f"{Path(name).name if Path(name).is_dir() else name} ({how})"


def encoder_cache_key(name: str) -> dict:
    """Return what determines the embeddings, as plain JSON: the files' checksums for a folder, the
    name for a hub model."""
    folder = Path(name).expanduser()
    pooling = sha256(folder / POOLING) if (folder / POOLING).is_file() else None
    return {
        "encoder": encoder_name(name),
        "files": checksums(folder) if folder.is_dir() else None,
        "pooling": pooling,
    }


def cosines(
    answers: list[str], references: list[str], name: str, device: str = "cpu"
) -> list[float]:
    """Return the cosine similarity of each answer with its reference. An empty answer counts as
    0."""
    check_encoder(name)
    embed = _by_package if importlib.util.find_spec(PACKAGE) is not None else _by_transformers
    vectors = torch.nn.functional.normalize(
        embed([*answers, *references], name, device).double(), dim=-1
    )
    first, second = vectors.split(len(answers))
    found = (first * second).sum(-1).tolist()
    return [value if text.strip() else 0.0 for text, value in zip(answers, found, strict=True)]


def _by_package(texts: list[str], name: str, device: str) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        name, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
    )
    return model.encode(
        texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False
    ).cpu()


def _by_transformers(texts: list[str], name: str, device: str) -> torch.Tensor:
    """Return embeddings, float32 [texts, hidden]."""
    from transformers import AutoModel, AutoTokenizer

    folder = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = (
            AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            .to(device)
            .eval()
        )
    except (OSError, ValueError) as error:
        raise SlimError(
            f"eval.answers.similarity={name} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    first_only = (folder / POOLING).is_file() and read_json(folder / POOLING).get(
        "pooling_mode_cls_token"
    )
    longest = min(getattr(model.config, "max_position_embeddings", LONGEST), LONGEST)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = pad(
                [tokenizer(text)["input_ids"][:longest] for text in texts[start : start + BATCH]]
            )
            parts.append(
                pool(model, *(tensor.to(device) for tensor in batch), first_only).float().cpu()
            )
    return torch.cat(parts)


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and mask, int64 [rows, longest], padded on the right; a row without tokens gets
    one."""
    rows = [row or [0] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def pool(model, ids: torch.Tensor, mask: torch.Tensor, first_only: bool) -> torch.Tensor:
    """Return one vector a row, [rows, hidden]: the first token's state, or the mean over the tokens
    that the mask keeps."""
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    if first_only:
        return states[:, 0]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)

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
# where sentence-transformers keeps how a model's states become one vector
POOLING = Path("1_Pooling") / "config.json"
LONGEST = 512  # tokens of a text that are read, where the model does not say
BATCH = 32  # texts in one forward pass


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
    how = "transformers"
    if importlib.util.find_spec(PACKAGE) is not None:
        how = f"sentence-transformers {importlib.metadata.version('sentence-transformers')}"
    # a folder by its name alone: where it lies does not matter
    if Path(name).is_dir():
        name = Path(name).name
    return f"{name} ({how})"


def encoder_cache_key(name: str) -> dict:
    """Return what determines the embeddings, as plain JSON: the files' checksums for a folder, the
    name for a hub model."""
    key = {"encoder": encoder_name(name), "files": None, "pooling": None}
    folder = Path(name).expanduser()
    if folder.is_dir():
        key["files"] = checksums(folder)
    # checksums() sees the files of the folder itself, not those below it
    if (folder / POOLING).is_file():
        key["pooling"] = sha256(folder / POOLING)
    return key


def cosines(
    answers: list[str], references: list[str], name: str, device: str = "cpu"
) -> list[float]:
    """Compare answers with references by their meaning.

    Args:
        answers: one or more.
        references: one for each answer.
        name: embedding model: a folder, or a hub id where sentence-transformers is installed.
        device: ``"cpu"`` or a GPU.

    Returns:
        The cosine similarity of each answer with its reference, computed in float64 from the
        embeddings. An empty answer counts as 0.

    Raises:
        SlimError: when the embedding model cannot be used.
    """
    check_encoder(name)
    embed = _by_transformers
    if importlib.util.find_spec(PACKAGE) is not None:
        embed = _by_package
    embeddings = embed(answers + references, name, device)
    vectors = torch.nn.functional.normalize(embeddings.double(), dim=-1)
    of_answers, of_references = vectors.split(len(answers))
    similarities = (of_answers * of_references).sum(-1).tolist()
    # models give an empty text some direction, which may be near to that of a reference
    for number, answer in enumerate(answers):
        if not answer.strip():
            similarities[number] = 0.0
    return similarities


def _by_package(texts: list[str], name: str, device: str) -> torch.Tensor:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        name, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
    )
    embeddings = model.encode(
        texts, batch_size=BATCH, convert_to_tensor=True, show_progress_bar=False
    )
    return embeddings.cpu()


def _by_transformers(texts: list[str], name: str, device: str) -> torch.Tensor:
    """Return embeddings, float32 [texts, hidden]."""
    from transformers import AutoModel, AutoTokenizer

    folder = Path(name).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # float32, so that the similarity does not depend on the type that weights are stored in
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        model = model.to(device).eval()
    except (OSError, ValueError) as error:
        raise SlimError(
            f"eval.answers.similarity={name} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    first_only = False
    if (folder / POOLING).is_file():
        first_only = bool(read_json(folder / POOLING).get("pooling_mode_cls_token"))
    longest = min(getattr(model.config, "max_position_embeddings", LONGEST), LONGEST)
    rows = [tokenizer(text)["input_ids"][:longest] for text in texts]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            ids, mask = pad(rows[start : start + BATCH])
            vectors = pool(model, ids.to(device), mask.to(device), first_only)
            parts.append(vectors.float().cpu())
    return torch.cat(parts)


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a batch of texts of different lengths.

    Args:
        rows: tokens of each text.

    Returns:
        Tokens and mask, int64 [rows, longest], padded on the right; the mask is 1 where there is a
        token. A row without tokens gets one.
    """
    lengths = [max(1, len(row)) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[number, : lengths[number]] = 1
    return ids, mask


def pool(model, ids: torch.Tensor, mask: torch.Tensor, first_only: bool) -> torch.Tensor:
    """Return one vector a text.

    Args:
        model: a torch module of transformers without a head.
        ids: int64 [texts, tokens].
        mask: int64 [texts, tokens], 1 where there is a token.
        first_only: take the first token's state instead of the mean over the tokens.

    Returns:
        [texts, hidden], in the model's type.
    """
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    if first_only:
        return states[:, 0]
    # padding has states too, which must not count
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)

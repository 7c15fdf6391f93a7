"""``tiny:documents``: the text of the tiny world as a folder of documents, for trials."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from slim.core.io import atomic_path
from slim.tiny_world import GENERATOR, World

NAME = "tiny:documents"
DOCUMENTS = 60
TEXTS = 20  # in each of them
IDENTITY = [GENERATOR, DOCUMENTS, TEXTS]  # determines the content


def write_documents(folder: Path) -> Path:
    """Write the documents where they are not there yet.

    Args:
        folder: for them.

    Returns:
        ``folder``.
    """
    if folder.is_dir():
        return folder
    texts = World(0).documents("train", 0)
    with atomic_path(folder) as partial:
        partial.mkdir()
        for number in range(1, DOCUMENTS + 1):
            pages = "\n\n".join(islice(texts, TEXTS))
            path = partial / f"chapter_{number:02}.md"
            path.write_text(f"# Chapter {number}\n\n{pages}\n", encoding="utf-8")
    return folder

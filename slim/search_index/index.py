"""An index over documents: a folder with their vectors, the documents themselves, and which encoder
made the vectors.

    index.json           encoder, number of documents, width, how it searches
    documents.jsonl      a record per document, as it was read
    vectors.safetensors  float32 [documents, width], rows of length 1
    index.faiss          with kind "hnsw": the graph (Malkov & Yashunin, arXiv:1603.09320)

An exact search is one product with all vectors. A graph looks at few of them, which pays from about
a hundred thousand documents on, and may miss some.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import checksums
from slim.checkpoints.source import Source
from slim.checkpoints.store import digest
from slim.core.console import progress_bar
from slim.core.errors import SlimError
from slim.core.io import atomic_path, read_object
from slim.core.lazy import LazyModule
from slim.data.files import text_lines
from slim.data.text import Text
from slim.loading.sentence import BiEncoder, CrossEncoder

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

EXACT, HNSW = "exact", "hnsw"
KINDS = (EXACT, HNSW)
META, DOCUMENTS, VECTORS, GRAPH = (
    "index.json", "documents.jsonl", "vectors.safetensors", "index.faiss"
)  # fmt: skip
AT_ONCE = 256  # documents encoded between two steps of the progress bar
NEIGHBOURS = 32  # of every document in the graph
LOOKED_AT = 64  # documents that a search in the graph keeps as candidates, at least


@dataclass(frozen=True)
class Hit:
    """A document that was found.

    Attributes:
        record: As it was read.
        text: What was searched.
        cosine: With the query, by the bi-encoder.
        score: By the cross-encoder; None without one.
    """

    record: dict
    text: str
    cosine: float
    score: float | None = None


@dataclass
class Answer:
    """What a query found.

    Attributes:
        hits: The best first.
        seconds: What took how long: ``encode``, ``search`` and, with a cross-encoder, ``rerank``.
    """

    hits: list[Hit]
    seconds: dict[str, float] = field(default_factory=dict)


def encoder_folder(name: str) -> Path:
    """Return the folder of an encoder.

    Args:
        name: A folder, ``minilm``, or a model id of the hub.
    """
    return Source(name).resolve().folder


def read_documents(text: str, column: str) -> list[dict]:
    """Return the documents of a file, empty ones left out.

    Args:
        text: A ``.jsonl``, ``.csv``, ``.tsv``, ``.json`` or ``.parquet`` file, one document a row
            (``python -m slim.documents`` makes one of a folder), or a ``.txt`` file, one a line.
        column: Column of the text.

    Returns:
        Records with ``column``.

    Raises:
        SlimError: There is no such file, or no document in it.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        raise SlimError(
            f"{text} is a folder. Make one file of it first: python -m slim.documents {text} "
            "--output FILE.jsonl"
        )
    source = Text(str(text), column=column)
    if path.suffix == ".txt":
        records = [{column: line.strip()} for line in text_lines(path)]
    else:
        records = list(_records(source))
    records = [record for record in records if record[column].strip()]
    if not records:
        raise SlimError(f"{text} holds no document. Give another file.")
    return records


def _records(source: Text) -> Iterator[dict]:
    for where, row in source.located_rows():
        yield {**row, source.column: source.cell(row, where)}


def build(
    records: Sequence[dict],
    column: str,
    encoder: str,
    target: Path,
    kind: str = EXACT,
    batch_size: int = 32,
) -> dict:
    """Make an index, whole or not at all.

    Args:
        records: The documents.
        column: Where their text is.
        encoder: Folder of a bi-encoder, or what :func:`encoder_folder` knows.
        target: A folder that does not exist yet.
        kind: ``exact`` or ``hnsw``.
        batch_size: Documents read at once by the encoder.

    Returns:
        What ``index.json`` holds.

    Raises:
        SlimError: ``target`` is there already, the encoder is none, or faiss is missing.
    """
    from safetensors.torch import save_file

    if target.exists():
        raise SlimError(f"{target} exists already. Give a new folder, or remove this one first.")
    if kind == HNSW:
        require_faiss()
    folder = encoder_folder(encoder)
    model = BiEncoder.load(folder)
    started = time.perf_counter()
    parts = []
    with progress_bar("Documents", len(records)) as advance:
        for start in range(0, len(records), AT_ONCE):
            texts = [record[column] for record in records[start : start + AT_ONCE]]
            parts.append(model.encode(texts, batch_size))
            advance(len(texts))
    vectors = torch.cat(parts)
    meta = {
        "encoder": str(folder.resolve()),
        "encoder_digest": digest(checksums(folder)),
        "documents": len(records),
        "width": vectors.shape[1],
        "column": column,
        "kind": kind,
        "seconds": round(time.perf_counter() - started, 3),
    }
    with atomic_path(target) as partial:
        partial.mkdir()
        save_file({"vectors": vectors.contiguous()}, partial / VECTORS)
        with (partial / DOCUMENTS).open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        if kind == HNSW:
            _write_graph(vectors, partial / GRAPH)
        (partial / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return meta


def require_faiss() -> None:
    """Raise ``SlimError`` where faiss is missing, without importing it."""
    if importlib.util.find_spec("faiss") is None:
        raise SlimError(
            "--kind hnsw needs the package faiss-cpu: pip install 'slim[similarity]'. "
            "--kind exact needs nothing."
        )


def _write_graph(vectors: torch.Tensor, path: Path) -> None:
    import faiss

    graph = faiss.IndexHNSWFlat(vectors.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors.numpy())
    faiss.write_index(graph, str(path))


class Index:
    """An index that is open for queries."""

    def __init__(self, folder: Path, cross: str | None = None):
        """Open an index.

        Args:
            folder: What :func:`build` made.
            cross: Folder of a cross-encoder that orders what was found; None: the cosine does.

        Raises:
            SlimError: It is no index, or its encoder is not what it was.
        """
        from safetensors.torch import load_file

        if not (folder / META).is_file():
            raise SlimError(
                f"{folder} is no index (it has no {META}). Make one: python -m slim.search_index "
                "build TEXTS --output FOLDER"
            )
        self.meta = read_object(folder / META)
        self.vectors = load_file(folder / VECTORS)["vectors"]
        lines = (folder / DOCUMENTS).read_text(encoding="utf-8").splitlines()
        self.records = [json.loads(line) for line in lines]
        if not len(self.records) == len(self.vectors) == self.meta["documents"]:
            raise SlimError(f"{folder} is damaged: vectors and documents differ. Build it again.")
        encoder = Path(self.meta["encoder"])
        if not encoder.is_dir() or digest(checksums(encoder)) != self.meta["encoder_digest"]:
            raise SlimError(
                f"{folder} was made with {encoder}, which is gone or another model now. Build the "
                "index again."
            )
        self.graph = None
        if self.meta["kind"] == HNSW:
            require_faiss()
            import faiss

            self.graph = faiss.read_index(str(folder / GRAPH))
        self.encoder = BiEncoder.load(encoder)
        self.cross = None
        if cross is not None:
            self.cross = CrossEncoder.load(encoder_folder(cross))

    def ask(self, query: str, k: int = 5, candidates: int = 50) -> Answer:
        """Search.

        Args:
            query: What is looked for.
            k: How many documents to return.
            candidates: How many the cross-encoder reads.

        Raises:
            SlimError: The query is empty.
        """
        if not query.strip():
            raise SlimError("The query is empty. Give a text to look for.")
        wanted = max(k, candidates) if self.cross is not None else k
        wanted = min(wanted, len(self.records))
        marks = [time.perf_counter()]
        vector = self.encoder.encode([query])
        marks.append(time.perf_counter())
        cosines, numbers = self._nearest(vector, wanted)
        marks.append(time.perf_counter())
        hits = []
        for cosine, number in zip(cosines, numbers, strict=True):
            record = self.records[number]
            hits.append(Hit(record, record[self.meta["column"]], cosine))
        seconds = {"encode": marks[1] - marks[0], "search": marks[2] - marks[1]}
        if self.cross is not None:
            scores = self.cross.scores([(query, hit.text) for hit in hits]).tolist()
            scored = []
            for hit, score in zip(hits, scores, strict=True):
                scored.append(Hit(hit.record, hit.text, hit.cosine, score))
            hits = sorted(scored, key=lambda hit: -hit.score)
            seconds["rerank"] = time.perf_counter() - marks[2]
        return Answer(hits[:k], seconds)

    def _nearest(self, vector: torch.Tensor, count: int) -> tuple[list[float], list[int]]:
        """Return cosines and numbers of the nearest documents."""
        if self.graph is not None:
            self.graph.hnsw.efSearch = max(LOOKED_AT, 2 * count)
            cosines, numbers = self.graph.search(vector.numpy(), count)
            filled = int((numbers[0] >= 0).sum())  # a graph may give fewer than asked for
            return cosines[0][:filled].tolist(), numbers[0][:filled].tolist()
        best = (self.vectors @ vector[0]).topk(count)
        return best.values.tolist(), best.indices.tolist()

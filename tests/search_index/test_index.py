"""Indexes over documents: built, asked, and refused where they are not what they were."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.loading.head import WithHead
from slim.loading.sentence import BiEncoder, CrossEncoder
from slim.search_index.__main__ import main
from slim.search_index.index import Index, build, read_documents
from tests.support.encoding import build_encoder

TEXTS = [
    "The glass fell and broke.",
    "Anna had two shells.",
    "The town of Ulm lies on a river.",
    "Emil has a cat.",
    "Rain fell in the night.",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return build_encoder("bert", tmp_path_factory.mktemp("encoder") / "model", "embedding")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": text, "page": number} for number, text in enumerate(TEXTS, 1)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return read_documents(str(path), "text")


@pytest.fixture(scope="module")
def index(encoder, records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "index"
    build(records, "text", str(encoder), folder)
    return folder


def test_document_itself_is_found_first(index):
    answer = Index(index).ask(TEXTS[2], k=2)
    assert answer.hits[0].record == {"text": TEXTS[2], "page": 3}
    assert answer.hits[0].cosine == pytest.approx(1, abs=1e-5)


def test_order_is_that_of_the_cosines(index, encoder):
    vectors = BiEncoder.load(encoder).encode([*TEXTS, "A cat broke the glass."])
    order = (vectors[:-1] @ vectors[-1]).argsort(descending=True).tolist()
    hits = Index(index).ask("A cat broke the glass.", k=5).hits
    assert [hit.record["page"] - 1 for hit in hits] == order


def test_graph_finds_what_the_exact_search_finds(index, encoder, records, tmp_path):
    pytest.importorskip("faiss")
    build(records, "text", str(encoder), tmp_path / "graph", kind="hnsw")
    exact, graph = Index(index), Index(tmp_path / "graph")
    pages = [[hit.record["page"] for hit in one.ask("a river", k=3).hits] for one in (exact, graph)]
    assert pages[0] == pages[1]


def test_cross_encoder_orders_the_candidates(index, encoder, tmp_path):
    tmp_path.joinpath("cross").mkdir()
    WithHead(Source(str(encoder)), ["score"]).run(None, tmp_path / "cross", Context())
    answer = Index(index, str(tmp_path / "cross")).ask("a river", k=5)
    scores = CrossEncoder.load(tmp_path / "cross").scores([("a river", text) for text in TEXTS])
    order = scores.argsort(descending=True).tolist()
    assert [hit.record["page"] - 1 for hit in answer.hits] == order
    assert answer.seconds.keys() == {"encode", "search", "rerank"}


def test_another_model_in_the_encoders_place_is_refused(encoder, records, tmp_path):
    shutil.copytree(encoder, tmp_path / "model")
    build(records, "text", str(tmp_path / "model"), tmp_path / "index")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model" / "model.safetensors"
    tensors = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(SlimError, match="another model now"):
        Index(tmp_path / "index")


def test_existing_folder_is_refused(index, encoder, records):
    with pytest.raises(SlimError, match="exists already"):
        build(records, "text", str(encoder), index)


def test_lines_of_a_text_are_documents(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("One.\n\n  \nTwo.\n", encoding="utf-8")
    assert read_documents(str(path), "text") == [{"text": "One."}, {"text": "Two."}]


def test_text_in_another_encoding_is_refused_by_its_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("One.\nÜber.\n".encode("latin-1"))
    with pytest.raises(SlimError, match="line 2: byte 0xdc is not UTF-8"):
        read_documents(str(path), "text")


def test_folder_of_documents_is_sent_to_the_reader_of_documents(tmp_path):
    with pytest.raises(SlimError, match="python -m slim.documents"):
        read_documents(str(tmp_path), "text")


def test_mistake_ends_in_one_line(tmp_path, capsys):
    assert main(["ask", str(tmp_path), "a", "river"]) == 2
    assert "is no index" in capsys.readouterr().err


def test_command_prints_what_it_found_and_the_times(index, capsys):
    assert main(["ask", str(index), "Emil", "has", "a", "cat.", "-k", "1"]) == 0
    shown = capsys.readouterr()
    assert "Emil has a cat." in shown.out
    assert "encode" in shown.out + shown.err

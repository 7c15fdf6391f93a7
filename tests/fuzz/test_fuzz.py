"""Random mutations of valid inputs: every outcome is a correct result or a ``SlimError``.

A result is correct if what slim writes computes what it has measured: a stage that changes nothing
must give the logits of the source, or one of both is not the model that the folder holds. The
numbers of outcomes are printed at the end.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.data.calibration import Calibration
from slim.data.chat import has_chat_template
from slim.data.examples import Messages, Pairs, TextData, TinyChat
from slim.loading.load_model import load_model
from slim.pruning.weights import MagnitudeWeights
from tests.conftest import build_small
from tests.fuzz.mutations import changed_bytes, changed_documents, changed_tensors

FEW = 4  # examples of a model by default: one takes about half a second on one core
MANY = 150  # under the marker slow
LENGTHS = {"few": FEW, "many": MANY}

OUTCOMES: Counter = Counter()
TEXT = "Anna is a nurse. She lives in a town."


def fuzzed(strategy: Callable[[], st.SearchStrategy], times: int = 1):
    """Run a test on a few drawn examples, always the same, or under ``slow`` on many new ones.

    Args:
        strategy: makes what is drawn, called once the session's fixtures are there.
        times: how many times as many examples as of a model.
    """

    def decorate(check):
        @pytest.mark.parametrize("length", ["few", pytest.param("many", marks=pytest.mark.slow)])
        def test(length, valid, capsys):
            @settings(
                max_examples=LENGTHS[length] * times,
                derandomize=length == "few",
                deadline=None,
                database=None,
                phases=[Phase.generate],  # shrinking takes longer than all the examples
                print_blob=False,
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy(valid))
            def run(drawn):
                note(drawn[0])  # what was done
                with tempfile.TemporaryDirectory() as folder:
                    outcome = outcome_of(check, valid, drawn[1], Path(folder))
                OUTCOMES[f"{check.__name__}: {outcome}"] += 1
                capsys.readouterr()

            run()

        test.__doc__ = check.__doc__
        return test

    return decorate


def outcome_of(check, valid: Path, drawn, folder: Path) -> str:
    """Return how a check ended: refused, or what it returns."""
    try:
        return check(valid, drawn, folder)
    except SlimError as error:
        assert str(error).strip(), "an error without a message"
        return "refused"


@pytest.fixture(scope="module")
def valid(tmp_path_factory, request) -> Iterator[Path]:
    """A folder with a random model of two narrow blocks; afterwards the counts are printed."""
    folder = tmp_path_factory.mktemp("fuzz") / "valid"
    sizes = dict(num_hidden_layers=2, hidden_size=32, intermediate_size=48)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    build_small("llama", folder, max_position_embeddings=64, **sizes, **heads)
    yield folder
    lines = [f"fuzz: {name}: {count}" for name, count in sorted(OUTCOMES.items())]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print("", *lines, sep="\n")


def copied(valid: Path, folder: Path) -> Path:
    return Path(shutil.copytree(valid, folder / "model"))


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, "float32")(ids).logits


def used(folder: Path) -> str:
    """Open, load, run and rewrite a model; what is written computes the same."""
    checkpoint = Source(str(folder)).resolve()
    stage = MagnitudeWeights(sparsity=1e-9)  # of no layer even one weight
    stage.check(checkpoint.spec)
    ids = torch.tensor([load_tokenizer(folder)(TEXT)["input_ids"][:16] or [0]])
    before = logits(folder, ids)
    target = folder.parent / "result"
    target.mkdir()
    stage.run(checkpoint.folder, target, Context())
    after = logits(target, ids)
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-4, equal_nan=True), "another model"
    return "same logits"


def json_file(name: str):
    return lambda valid: changed_documents(json.loads((valid / name).read_text()))


def file_bytes(name: str):
    return lambda valid: changed_bytes((valid / name).read_bytes())


@fuzzed(json_file("config.json"), times=3)
def test_config(valid, document, folder):
    model = copied(valid, folder)
    (model / "config.json").write_text(json.dumps(document))
    return used(model)


@fuzzed(lambda valid: changed_tensors(load_file(valid / "model.safetensors")), times=3)
def test_tensors(valid, tensors, folder):
    model = copied(valid, folder)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return used(model)


@fuzzed(
    lambda valid: st.one_of(
        *(
            changed_bytes((valid / name).read_bytes()).map(
                lambda drawn, name=name: (f"{name} {drawn[0]}", (name, drawn[1]))
            )
            for name in ("config.json", "model.safetensors", "generation_config.json")
        )
    )
)
def test_bytes_of_a_model(valid, drawn, folder):
    model = copied(valid, folder)
    (model / drawn[0]).write_bytes(drawn[1])
    return used(model)


@fuzzed(json_file("generation_config.json"))
def test_generation_config(valid, document, folder):
    model = copied(valid, folder)
    (model / "generation_config.json").write_text(json.dumps(document))
    return used(model)


def encoded(folder: Path) -> str:
    """Make windows of text, chats and calibration with a tokenizer; every token is a known one."""
    tokenizer = load_tokenizer(folder)
    windows = [Calibration("tiny:heldout", samples=2, length=16).tokens(tokenizer, 64)]
    if has_chat_template(tokenizer):
        windows.append(TinyChat().windows("train", tokenizer, 64, 128).tokens)
    for tokens in windows:
        assert set(tokens.unique().tolist()) <= set(range(1536)), "an unknown token"
    return "known tokens"


@fuzzed(json_file("tokenizer.json"), times=2)
def test_tokenizer(valid, document, folder):
    model = copied(valid, folder)
    (model / "tokenizer.json").write_text(json.dumps(document))
    return encoded(model)


@fuzzed(json_file("tokenizer_config.json"), times=2)
def test_tokenizer_config(valid, document, folder):
    model = copied(valid, folder)
    (model / "tokenizer_config.json").write_text(json.dumps(document))
    return encoded(model)


# Data

TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Anna, a nurse."}]
PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "A part."}]}]
ROWS = {
    "rows": [
        {"messages": TURNS, "prompt": "Who?", "answer": ["Anna."], "text": TEXT},
        {"messages": [*TURNS, *PARTS], "prompt": "Why?", "answer": "So.", "text": TEXT},
    ]
}


def read(folder: Path, path: Path) -> str:
    """Read a data file in every way; nothing of it is written as Python writes it."""
    tokenizer = load_tokenizer(folder)
    outcomes = set()
    for data in (TextData, Pairs, Messages, Calibration):
        try:
            outcomes.add(_read_as(data, str(path), tokenizer))
        except SlimError as error:
            assert str(error).strip()
            outcomes.add("refused")
    return " and ".join(sorted(outcomes))


def _read_as(data, text: str, tokenizer) -> str:
    if data is Calibration:
        tokens = Calibration(text, samples=1, length=8).tokens(tokenizer, 64)
    else:
        tokens = data(text=text, validation_fraction=0.001).windows("train", tokenizer, 64).tokens
    written = tokenizer.decode(tokens.flatten().tolist())
    assert "{'" not in written and "['" not in written, f"Python's notation: {written}"
    return "text"


@fuzzed(lambda valid: changed_documents(ROWS), times=8)
def test_rows(valid, document, folder):
    path = folder / "some.jsonl"
    rows = document.get("rows")
    rows = rows if isinstance(rows, list) else [document]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read(valid, path)


@fuzzed(
    lambda valid: changed_bytes(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS["rows"]).encode()
    ),
    times=8,
)
def test_bytes_of_rows(valid, content, folder):
    path = folder / "some.jsonl"
    path.write_bytes(content)
    return read(valid, path)


@fuzzed(lambda valid: changed_bytes(f"{TEXT} Voilà.\n".encode() * 9), times=8)
def test_bytes_of_text(valid, content, folder):
    path = folder / "some.txt"
    path.write_bytes(content)
    return read(valid, path)

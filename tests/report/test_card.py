"""The model card: what it says of a chain, how it says to load every format, and that it changes no
checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.store import Store
from slim.pruning.magnitude import Magnitude
from slim.quantization.methods.rtn import RTN
from slim.report.card import card, command, front_matter, source_facts, write_card
from slim.report.chain_plot import chain_points
from slim.report.loading import loading

ROOT = Path(__file__).parent.parent.parent
TYPED = [
    "model=tiny",
    "pruner=magnitude",
    "store=/somewhere",
    "tracking.uri=http://user:secret@host",
    "output=x y",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list:
    """A pruned and quantised tiny model, with figures as an evaluation would have given them."""
    store = Store(tmp_path_factory.mktemp("card") / "runs")
    stages = [Magnitude(blocks=1), RTN(bits=4, group_size=64, symmetric=True)]
    found = Pipeline(Source("tiny"), stages, None, store).run()
    for number, result in enumerate(found):
        samples = [{"prompt": "word " * 500, "answer": f"answer {number} | <b>"}]
        quality = {
            "metrics": {"perplexity": 2.0 + number, "one/acc": 0.5, "one/acc_stderr": 0.01},
            "samples": samples,
        }
        result.quality = {
            **quality,
            "protocol": {
                "dtype": "float32",
                "perplexity": {"window": 256},
                "tasks": {"one": {"questions": 9}},
            },
        }
    return found


def text_of(results: list) -> str:
    return write_card(results, TYPED).read_text(encoding="utf-8")


def test_the_card_says_what_was_done_and_what_came_of_it(results):
    text = text_of(results)
    assert [f"{2 + number}.000" in text for number in range(3)] == [
        True
    ] * 3 and "50.0 ± 1.0" in text
    for result in results:
        assert result.digest in text
    assert "bits 4, group_size 64, symmetric True" in text and "blocks 1" in text
    # nothing of where things lie, no secret
    assert "python compress.py model=tiny pruner=magnitude\n" in text
    assert "perplexity.window 256" in text and "tasks.one.questions 9" in text
    # answers escaped, prompts cut
    assert "answer 0 \\| &lt;b>" in text and "word " * 60 not in text


def test_the_front_matter_is_what_the_hub_reads(results):
    head = front_matter(write_card(results, TYPED))
    assert head["license"] == "apache-2.0" and head["library_name"] == "transformers"
    assert head["tags"] == ["slim", "pruned", "quantized", "magnitude", "rtn"]
    assert "base_model" not in head  # the embedded model has no name on the hub


def test_the_card_changes_no_checkpoint(results, tmp_path):
    folder = results[-1].checkpoint.folder
    path = write_card(results, TYPED)
    first = path.read_bytes()
    assert open_checkpoint(folder).manifest["checksums"] == checksums(folder)
    assert Store(folder.parent.parent).find(folder) is not None
    assert write_card(results, TYPED).read_bytes() == first  # the same to the byte
    assert not list(folder.parent.glob(".*.partial")) and path.stat().st_mode & 0o444 == 0o444


def test_a_source_gets_no_card(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(Source("tiny").local_folder(), folder)
    (folder / "README.md").write_text("mine")
    alone = Pipeline(Source(str(folder)), [], None, Store(tmp_path / "runs")).run()
    assert write_card(alone, []) is None and (folder / "README.md").read_text() == "mine"


def test_a_card_that_cannot_be_finished_leaves_the_old_one(results, monkeypatch):
    path = write_card(results, TYPED)
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        write_card(results, ["changed=1"])
    assert path.read_bytes() == before and not list(path.parent.parent.glob(".*.partial"))


def test_licence_and_base_model_come_from_the_source(results, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(Source("tiny").local_folder(), folder)
    checkpoint = open_checkpoint(folder)
    assert source_facts(checkpoint) == {"license": "unknown"}
    (folder / "README.md").write_text(
        "---\nlicense: llama3\nbase_model: org/first\nother: 1\n---\ntext\n"
    )
    assert source_facts(checkpoint) == {"license": "llama3", "base_model": "org/first"}
    points = chain_points(results)
    assert "Its licence: unknown: see the base model" in card(
        points, {}, {"license": "unknown"}, "x"
    )
    (folder / "README.md").write_text("---\n[broken: yaml\n---\n")
    assert source_facts(checkpoint) == {"license": "unknown"}
    head = yaml.safe_load(
        card(points, {}, {"license": "llama3", "base_model": "org/first"}, "x").split("---")[1]
    )
    assert head["base_model"] == "org/first" and head["license"] == "llama3"


def test_the_command_keeps_what_a_shell_would_split():
    assert (
        command(["a=[x, y]", "+store=z", "hydra.verbose=true"], "train.py")
        == "python train.py 'a=[x, y]'"
    )


def test_the_code_of_the_card_loads_the_checkpoint(results):
    """Both ways it names: slim's own, and transformers' for a symmetric compressed-tensors file."""
    import torch

    text, folder = text_of(results), str(results[-1].checkpoint.folder)
    ids, logits = torch.arange(8)[None], []
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        names: dict = {}
        exec(code.replace('"FOLDER"', repr(folder)), names)  # noqa: S102
        with torch.inference_mode():
            logits.append(names["model"](ids).logits.float())
    assert len(logits) == 2 and logits[0].norm() > 1
    assert (logits[0] - logits[1]).norm() < 0.03 * logits[0].norm()  # float32 and bfloat16


# What is said of each format; the facts are those of the table in docs/formats.md


def packed(*schemes: dict, embedding: bool = False) -> dict:
    groups = {
        f"g{number}": {"targets": ["Linear"], "weights": scheme}
        for number, scheme in enumerate(schemes)
    }
    if embedding:
        groups["g0"]["targets"] = ["Linear", "model.embed_tokens"]
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


SYMMETRIC, ASYMMETRIC = {"num_bits": 4, "symmetric": True}, {"num_bits": 4, "symmetric": False}


@pytest.mark.parametrize(
    ("config", "in_code", "in_vllm"),
    [
        ({}, "AutoModelForCausalLM.from_pretrained", "vllm serve"),
        (packed(SYMMETRIC), "AutoModelForCausalLM.from_pretrained", "Tried with"),
        (packed(SYMMETRIC, {**SYMMETRIC, "num_bits": 8}), "AutoModelForCausalLM.from_pretrained", "one scheme for q, k, v"),
        (packed({**SYMMETRIC, "num_bits": 3}), "AutoModelForCausalLM.from_pretrained", "Not documented"),
        (packed(ASYMMETRIC), "dequantize=True", "Tried with"),
        (packed(ASYMMETRIC, {**ASYMMETRIC, "num_bits": 8}), None, "Not documented"),
        (packed(SYMMETRIC, embedding=True), "dequantize=True", "vllm serve"),
        (packed({**SYMMETRIC, "actorder": "group"}), None, "vllm serve"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "sym": True}}, "AutoModelForCausalLM", "vllm serve"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 3, "sym": True}}, "AutoModelForCausalLM", "Not documented"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AutoModelForCausalLM", "Tried with"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "AutoModelForCausalLM", "not tried"),
        ({"per_layer_config": {"0": {}}}, "import slim\n", "No:"),
        ({"per_layer_config": {"0": {}}, **packed(SYMMETRIC)}, "import slim\n", "No:"),
        ({"per_layer_config": {"0": {}}, **packed(ASYMMETRIC)}, "dequantize=True", "No:"),
        ({"slim_adapter": {"parameters": 8}}, "PeftModel.from_pretrained", "leave the adapter out"),
    ],
)  # fmt: skip
def test_loading_follows_the_table_of_formats(config, in_code, in_vllm):
    found = loading(config)
    assert (found.code is None) if in_code is None else in_code in found.code
    assert in_vllm in found.vllm
    assert re.match("No:|.*not tried|.*Tried with .* 0.32.0", found.vllm)


def test_the_card_says_which_files_llama_cpp_reads():
    assert loading({}).llama_cpp.startswith("No: it reads GGUF")
    blocks = {"quantization_config": {"quant_method": "gguf"}}
    assert "llama-server" in loading(blocks).llama_cpp


@pytest.mark.slow
def test_the_command_writes_the_card_and_evaluate_does_not(tmp_path):
    def run(script: str, *arguments: str) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        given = [sys.executable, script, f"store={tmp_path / 'runs'}", "eval=none", *arguments]
        subprocess.run(given, cwd=ROOT, env=environment, check=True, capture_output=True)

    out = tmp_path / "out"
    run("compress.py", "pruner=magnitude", "quant=rtn", f"output={out}")
    text = (out / "README.md").read_text()
    assert "python compress.py eval=none pruner=magnitude quantizer=rtn" in text
    assert (out / "slim.json").is_file() and json.loads((out / "slim.json").read_text())[
        "checksums"
    ] == checksums(out)
    (out / "README.md").write_text("changed")
    run("evaluate.py", f"model.source={out}")
    assert (out / "README.md").read_text() == "changed"

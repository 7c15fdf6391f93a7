"""Written GGUF files hold what the checkpoints they were made from hold: read back by slim's own
import and by transformers' reading of GGUF.
"""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slim.checkpoints.checkpoint import checksums, open_checkpoint
from slim.checkpoints.stage import Context
from slim.core.errors import SlimError
from slim.gguf.architecture import restore_rows
from slim.gguf.blocks import BLOCK_TYPES, pack_blocks, round_to_blocks, unpack_blocks
from slim.gguf.export import permute_rows
from slim.gguf.metadata import rotary
from slim.gguf.quantizer import Gguf
from slim.gguf.reader import GgufModel, type_name
from slim.gguf.stage import ImportGguf
from slim.gguf.vocabulary import PROBES, rule_name
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec
from slim.quantization.methods.gptq import GPTQ
from slim.quantization.methods.rtn import RTN
from slim.quantization.scheme import Scheme
from slim.quantization.solvers.grid import Quantized
from tests.gguf.test_gguf_import import DEFAULTS, FAMILIES, TOKENS, load, logits
from tests.support.gguf_files import ASSETS, random_model
from tests.support.stages import run


def checkpoint_of(family: str, folder, **changes):
    """Write a random model with the embedded model's tokenizer."""
    folder.mkdir(parents=True)
    model = random_model(family, **changes)
    model.save_pretrained(folder)
    for path in ASSETS.glob("token*"):
        (folder / path.name).write_bytes(path.read_bytes())
    for path in ASSETS.glob("chat_template*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def written(family: str, folder, type_name: str = "F32", **changes):
    """Write a random model as GGUF; return (source folder, result folder)."""
    source = checkpoint_of(family, folder / "source", **changes)
    run(Gguf(type_name), source, folder / "result")
    return source, folder / "result"


def imported(path, folder):
    """Import a file in float32."""
    folder.mkdir()
    ImportGguf(path, "float32").run(None, folder, Context())
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(name, tmp_path):
    family, changes = FAMILIES[name]
    source, result = written(family, tmp_path, **changes)
    folder = imported(result / "model.gguf", tmp_path / "folder")
    assert (logits(load(folder)) - logits(load(source))).abs().max() < 1e-5
    assert open_checkpoint(folder).config["model_type"] == family


@pytest.mark.parametrize(
    "name", ["llama", "llama untied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
)
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_1"])
def test_transformers_reads_the_same_model(name, kind, tmp_path):
    family, changes = FAMILIES[name]
    _, result = written(family, tmp_path, kind, **{**changes, **DEFAULTS.get(family, {})})
    theirs = AutoModelForCausalLM.from_pretrained(
        result, gguf_file="model.gguf", dtype=torch.float32, config=None
    ).eval()
    ours = load_model(result, "float32")
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5

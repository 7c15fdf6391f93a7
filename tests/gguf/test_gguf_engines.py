"""Written files in llama.cpp itself: same tokens, and next-token distributions near slim's own.

Needs Node 20 and a prebuilt llama.cpp (docs/gguf.md says how to get it):

    mkdir ~/llama_cpp && cd ~/llama_cpp && npm install node-llama-cpp@3 --ignore-scripts
    SLIM_LLAMA_CPP=~/llama_cpp python -m pytest -m engines tests/gguf
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType

from slim.calibration.errors import layer_loss
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.data.calibration import Calibration
from slim.gguf.blocks import BLOCK_TYPES, row_bytes, unpack_blocks
from slim.gguf.metadata import stored_names
from slim.gguf.mixes import MIXES, fitting_type, mixed_types
from slim.gguf.quantizer import Gguf
from slim.gguf.reader import GgufModel, type_name
from slim.loading.load_model import load_model
from slim.pruning.width_magnitude import WidthL2
from slim.quantization.methods.rtn import RTN
from slim.quantization.solvers.error_feedback import cholesky_factor
from slim.quantization.solvers.super_block_feedback import descend, feed_errors
from slim.quantization.solvers.super_blocks import nearest
from tests.gguf.test_gguf_by_block import MODELS as BY_BLOCK
from tests.gguf.test_gguf_export import written
from tests.gguf.test_gguf_import import LLAMA3, LONG
from tests.gguf.test_gguf_super_blocks import problem  # noqa: F401 - a fixture
from tests.support.llama_quantize import quantize, quantize_rows
from tests.support.stages import run

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
DRIVER = Path(__file__).parents[1] / "support" / "llama_cpp.mjs"
TEXTS = (
    "The capital of France is",
    "1, 2, 3, 4,",
    "def add(a, b):\n    return",
    "Once upon a time there was a little girl who",
    "Water boils at a temperature of",
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f600 is",
)


@pytest.fixture(scope="module")
def engine() -> Path:
    """The folder in which node-llama-cpp was installed."""
    folder = os.environ.get("SLIM_LLAMA_CPP")
    if not folder:
        pytest.skip("SLIM_LLAMA_CPP names no folder with node-llama-cpp")
    return Path(folder)


def in_llama_cpp(engine: Path, file: Path, out: Path, question: str | None) -> dict:
    """Return what llama.cpp makes of the texts, and its answer in chat."""
    request = json.dumps({"texts": TEXTS, "chat": question})
    command = ["node", str(DRIVER), str(engine), str(file), str(out), request]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


STAGES = {
    "BF16": Gguf("BF16"),
    "Q8_0": Gguf("Q8_0"),
    "Q4_1": Gguf("Q4_1"),
    "Q4_0": Gguf("Q4_0"),
    "Q6_K": Gguf("Q6_K", calibrated=False),
    "Q4_K_M": Gguf("Q4_K_M", calibrated=False),
    "RTN 4 bits": RTN(bits=4, group_size=64, search=10, format="gguf"),
    "RTN 8 bits": RTN(bits=8, group_size=64, symmetric=True, format="gguf"),
}


# four bits without a text: such a small model no longer knows everything, in slim neither
COARSE = ("Q4_0", "Q4_K_M")


@torch.no_grad()
def divergences(result: Path, answers: list[dict]) -> list[float]:
    """Return KL(slim, llama.cpp) of the next token for every text; its tokens must be the same."""
    tokenizer, model = load_tokenizer(result), load_model(result, "float32")
    values = []
    for text, answer in zip(TEXTS, answers, strict=True):
        ids = tokenizer(text).input_ids
        assert answer["tokens"] == ids, text
        ours = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        theirs = torch.tensor(answer["logits"], dtype=torch.float64).log_softmax(-1)
        values.append((ours.exp() * (ours - theirs)).sum().item())
    return values


@pytest.mark.parametrize("name", STAGES)
def test_llama_cpp_computes_what_slim_does(name, engine, smollm2, tmp_path):
    result = tmp_path / "result"
    run(STAGES[name], smollm2, result)
    question = "What is the capital of France?"
    found = in_llama_cpp(engine, result / "model.gguf", tmp_path / "out.json", question)
    values = divergences(result, found["results"])
    print(f"{name}: KL {[f'{value:.5f}' for value in values]}; {found['answer']!r}")
    # llama.cpp rounds activations to 8 bits where it multiplies blocks
    assert sum(values) / len(values) < (0.03 if name in COARSE else 0.01)
    assert name in COARSE or "Paris" in found["answer"]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K_M"])
def test_a_smollm2_pruned_in_width_chats_in_llama_cpp(name, engine, smollm2, shared, tmp_path):
    pruned, result = tmp_path / "pruned", tmp_path / "result"
    text = Calibration(str(shared / "data" / "wikitext2_tok_valid.txt"), samples=16, length=256)
    run(WidthL2(ratio=0.2, first_block=14, last_block=17, calibration=text), smollm2, pruned)
    run(STAGES[name], pruned, result)
    question = "What is the capital of France?"
    found = in_llama_cpp(engine, result / "model.gguf", tmp_path / "out.json", question)
    values = divergences(result, found["results"])
    print(f"{name}: KL {[f'{value:.5f}' for value in values]}; {found['answer']!r}")
    assert GgufModel(result / "model.gguf").metadata["general.architecture"] == "deci"
    assert sum(values) / len(values) < (0.03 if name in COARSE else 0.01)
    assert len(found["answer"].split()) > 2


GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 9}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 long": ("phi3", {"rope_parameters": LONG, "sliding_window": None}),
    **BY_BLOCK,
}


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_every_family(name, engine, tmp_path):
    family, changes = MODELS[name]
    _, result = written(family, tmp_path, **changes)
    found = in_llama_cpp(engine, result / "model.gguf", tmp_path / "out.json", None)
    values = divergences(result, found["results"])
    print(f"{name}: KL {[f'{value:.1e}' for value in values]}")
    assert max(values) < 1e-3  # llama.cpp keeps keys and values in float16


SHAPES = {
    "shared values": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "fused": ("phi3", {"head_dim": 64}),
    "normed heads": ("qwen3", {"head_dim": 64, "intermediate_size": 288}),
    "windows": ("gemma3_text", {"head_dim": 64, "query_pre_attn_scalar": 64}),
    "rows of 64": ("llama", {"hidden_size": 64}),
    "by block": ("mistral", {**BY_BLOCK["heads differ"][1], "hidden_size": 64}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_types_are_those_that_llama_cpp_chooses(name, engine, tmp_path):
    family, changes = SHAPES[name]
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 9, **changes}
    source, plain = written(family, tmp_path, **sizes)
    spec = open_checkpoint(source).spec
    names, matrices = dict(stored_names(spec)), spec.matrices()
    importance = {}
    for layer, (_, columns) in matrices.items():
        importance[f"{names[layer]}.weight"] = numpy.ones(columns, dtype=numpy.float32)
    for mix, (_, number) in MIXES.items():
        file = tmp_path / f"{mix}.gguf"
        # only this mix cannot be made without an importance matrix
        known = importance if mix == "Q2_K_S" else None
        quantize(engine, plain / "model.gguf", file, number, known)
        theirs = GgufModel(file).tensors
        for layer, wanted in mixed_types(spec, mix).items():
            expected = type_name(theirs[f"{names[layer]}.weight"].type)
            assert fitting_type(wanted, matrices[layer][1]) == expected, (mix, layer)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_the_loss_is_below_that_of_llama_cpp(name, engine, problem):  # noqa: F811
    weight, hessian = problem
    diagonal, number = hessian.diagonal(), GGMLQuantizationType[name].value
    kind, size = BLOCK_TYPES[name].kind, row_bytes(name, weight.shape[1])
    theirs = quantize_rows(engine, weight.numpy(), number, size, diagonal.numpy())
    theirs = unpack_blocks(torch.from_numpy(theirs), name, torch.float32)
    order = diagonal.argsort(descending=True)
    fed = feed_errors(weight, cholesky_factor(hessian, 0.01, order), kind, diagonal)
    ours = descend(weight, fed, hessian, 3).dequantize()
    by_diagonal = nearest(weight, kind, diagonal).dequantize()
    losses = {}
    for label, values in (("theirs", theirs), ("ours", ours), ("diagonal", by_diagonal)):
        losses[label] = float(layer_loss(values - weight, hessian).sum())
    print(name, {label: f"{value / losses['theirs']:.3f}" for label, value in losses.items()})
    assert losses["ours"] < 0.7 * losses["theirs"]

"""GPTQModel reads what slim writes. Optional: it needs an environment of its own.

    SLIM_GPTQMODEL_PYTHON=/path/to/python pytest tests/test_gptqmodel.py

Skipped unless the variable names an interpreter with ``gptqmodel`` installed. It loads each file on
the CPU with its plain torch kernels, which compute in 16 bits, and returns its weights and logits.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim.checkpoints.stage import Context
from slim.loading.load_model import load_model
from slim.quantization.kernels.linear import QuantLinear
from slim.quantization.methods.gptq import GPTQ
from slim.quantization.methods.rtn import RTN
from tests.conftest import build_small

PYTHON = os.environ.get("SLIM_GPTQMODEL_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(
        not PYTHON, reason="SLIM_GPTQMODEL_PYTHON names no interpreter with gptqmodel"
    ),
    pytest.mark.slow,
    pytest.mark.timeout(3000),
]

# One process for all files: importing the library takes most of the time. A file it refuses gives a
# text.
READ = """
import json, sys
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file

tokens, answers = load_file(sys.argv[1])["tokens"], {}
for folder in sys.argv[2:]:
    method = json.load(open(folder + "/config.json"))["quantization_config"]["quant_method"]
    try:
        model = GPTQModel.load(folder, device="cpu", backend=BACKEND[f"{method.upper()}_TORCH"], dtype=torch.float16).model
        found = {}
        for name, layer in model.named_modules():
            if hasattr(layer, "qweight") and method == "gptq":
                found[name] = layer.dequantize_weight().T.float().contiguous()
            elif hasattr(layer, "qweight"):
                found[name] = layer(torch.eye(layer.in_features, dtype=torch.float16)).T.float().contiguous()
        with torch.no_grad():
            found["logits"] = model(tokens).logits.float()
        save_file(found, folder + "/found.safetensors")
        answers[folder] = "read"
    except Exception as error:
        answers[folder] = f"{type(error).__name__}: {error}"
print("ANSWERS" + json.dumps(answers))
"""
CASES = {
    **{f"gptq-{bits}-{'sym' if symmetric else 'asym'}": RTN(bits, 32, symmetric, format="gptq")
       for bits in (2, 3, 4, 8) for symmetric in (True, False)},
    "gptq-row": RTN(4, -1, True, format="gptq"),
    "gptq-ordered": GPTQ(4, 32, False, format="gptq", static_groups=False),
    "gptq-mixed": RTN(4, 32, True, format="gptq", overrides={"*.down_proj": {"bits": 8}, "*.0.*": {"bits": 16}}),
    "awq-asym": RTN(4, 32, False, format="awq"),
    "awq-sym": RTN(4, 32, True, format="awq"),
}  # fmt: skip


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Case -> (the folder slim wrote, "read" or why GPTQModel refused it)."""
    top = tmp_path_factory.mktemp("gptqmodel")
    source, folders = build_small("llama", top / "source", dtype="float16"), {}
    for case, stage in CASES.items():
        folders[case] = top / case
        folders[case].mkdir()
        if isinstance(stage, GPTQ):
            stage.tokens = lambda checkpoint: some_tokens()
        stage.run(source, folders[case], Context())
    save_file({"tokens": some_tokens()}, top / "tokens.safetensors")
    command = [PYTHON, "-c", READ, str(top / "tokens.safetensors"), *map(str, folders.values())]
    done = subprocess.run(command, capture_output=True, text=True, cwd=top)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-3000:]
    answers = json.loads(lines[-1].removeprefix("ANSWERS"))
    return {case: (folder, answers[str(folder)]) for case, folder in folders.items()}


def some_tokens() -> torch.Tensor:
    return torch.randint(2, 1500, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES)
def test_reads_the_same_weights_and_logits(read, case):
    folder, answer = read[case]
    assert answer == "read"
    found, model = load_file(folder / "found.safetensors"), load_model(folder, "float32")
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, QuantLinear)
    }
    assert (
        found.keys() == {*layers, "logits"}
        and len(layers) == (5 if case == "gptq-mixed" else 6) * 7
    )
    for name, layer in layers.items():
        expected = layer.dense_weight()  # theirs is rounded to float16 once
        torch.testing.assert_close(found[name], expected, rtol=2**-11, atol=1e-7, msg=name)
    with torch.no_grad():
        logits = model(some_tokens()).logits
    assert (found["logits"] - logits).abs().mean() < 0.003 * logits.std()

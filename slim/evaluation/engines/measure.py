"""Measures a checkpoint in another engine and gives the result the form that slim's own has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.console import say
from slim.core.hardware import fingerprint
from slim.evaluation.engines.engine import Engine
from slim.evaluation.perplexity import exponential
from slim.evaluation.timing import Run

if TYPE_CHECKING:
    import torch

    from slim.evaluation.evaluation import Evaluation

ROOM = 8  # tokens of context beyond the longest text
# parts of the answer -> what a table lacks without them
COLUMNS = {"nll": "perplexity", "continuations": "sample generations"}


def measure_in_engine(
    folder: Path,
    evaluation: Evaluation,
    device: str,
    quality: bool,
    speed: bool,
    file: Path | None = None,
) -> dict[str, dict | None]:
    """Measure a checkpoint in the engine that the evaluation names.

    Args:
        folder: the checkpoint.
        evaluation: what is measured.
        device: ``"cpu"`` or ``"cuda"``.
        quality: whether perplexity and sample generations are measured.
        speed: whether speed and memory are.
        file: what the checkpoint was imported from, where it was.

    Returns:
        ``quality`` and ``speed`` as :func:`slim.evaluation.run.measure` gives them.

    Raises:
        SlimError: when the engine dies.
    """
    engine = evaluation.installed_engine()
    tokenizer = load_tokenizer(folder)
    context = open_checkpoint(folder).spec.context_length
    evaluation.check_tokenizer(tokenizer, context)
    request, windows = _request(engine, evaluation, tokenizer, folder, context, quality, speed)
    request.update(threads=_threads(), gpu=device == "cuda")
    with engine.model(Path(folder), file) as model:
        request["model"] = str(model)
        answer = engine.measure(request)
    measured: dict[str, dict | None] = {"quality": None, "speed": None}
    if quality:
        measured["quality"] = _quality(engine, evaluation, tokenizer, request, answer, windows)
    if speed:
        measured["speed"] = _speed(engine, evaluation, request, answer, device)
    lacking = [COLUMNS[part] for part in answer.get("lacks", ()) if part in COLUMNS and quality]
    if lacking:
        say(f"{engine.label} gives no {' and no '.join(lacking)}.")
    return measured


def _threads() -> int:
    """Return the threads that slim's own figures are measured with."""
    return fingerprint("cpu")["threads"]


def _request(
    engine: Engine, evaluation: Evaluation, tokenizer, folder: Path, context: int,
    quality: bool, speed: bool,
) -> tuple[dict, torch.Tensor | None]:  # fmt: skip
    """Return what the worker is asked, and the windows of the perplexity, None without one."""
    prompts = []
    repeats = warmup = 0
    if speed:
        timed = evaluation.speed
        repeats, warmup = timed.repeats, timed.warmup
        for tokens in timed.cases(evaluation.speed_prompts(tokenizer))[""][1]:
            prompts.append({"tokens": tokens, "new_tokens": timed.new_after(tokens)})
    windows, continuations = None, []
    if quality and evaluation.perplexity and "nll" not in engine.lacks:
        windows = evaluation.perplexity.windows(tokenizer, context)
    if quality:
        ends = end_tokens(folder, tokenizer)
        for prompt in evaluation.prompts:
            tokens = tokenizer(prompt)["input_ids"]
            continuations.append(
                {"tokens": tokens, "new_tokens": evaluation.new_tokens, "ends": ends}
            )
    longest = max(
        [0 if windows is None else windows.shape[1]]
        + [len(text["tokens"]) + text["new_tokens"] for text in prompts + continuations]
        + [1]
    )
    request = {
        "engine_path": str(engine.path),
        "context": longest + ROOM,
        "prompts": prompts,
        "repeats": repeats,
        "warmup": warmup,
        "windows": [] if windows is None else windows.tolist(),
        "continuations": continuations,
    }
    return request, windows


def end_tokens(folder: Path, tokenizer) -> list[int]:
    """Return the tokens that end a text: of the checkpoint's generation settings, else of its
    tokenizer."""
    # local: loads transformers
    from transformers import GenerationConfig

    ends = None
    if (folder / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return []
    return list(ends) if isinstance(ends, (list, tuple)) else [ends]


def _quality(
    engine: Engine, evaluation: Evaluation, tokenizer, request: dict, answer: dict,
    windows: torch.Tensor | None,
) -> dict:  # fmt: skip
    """Return the answer as :meth:`Evaluation.measure_quality` gives it."""
    metrics, protocol, records = {}, {"dtype": None, "engine": engine.label}, {}
    if windows is not None:
        predicted = windows.shape[1] - 1
        nll = []
        for value in answer["nll"]:  # JSON has no NaN
            nll.append(math.nan if value is None else value / predicted)
        metrics["perplexity"] = exponential(math.fsum(nll) / len(nll))
        # as of slim's own perplexity, so that only the engine tells the two apart
        protocol["perplexity"] = {
            **evaluation.perplexity.protocol(windows),
            "engine": engine.label,
        }
        records["perplexity"] = {"nll": nll}
    samples = []
    for prompt, tokens in zip(evaluation.prompts, answer.get("continuations", ()), strict=False):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        samples.append({"prompt": prompt, "answer": text})
    return {
        "metrics": metrics,
        "protocol": protocol,
        "samples": samples,
        "records": records,
        "health": {},
    }


def _speed(
    engine: Engine, evaluation: Evaluation, request: dict, answer: dict, device: str
) -> dict:
    """Return the answer as :meth:`Evaluation.measure_speed` gives it."""
    runs = []
    for number, run in enumerate(answer["runs"]):
        prompt = request["prompts"][number % len(request["prompts"])]
        read, new = len(prompt["tokens"]), prompt["new_tokens"]
        runs.append(Run(run["prefill"], run["decode"], read, new - 1, read + new))
    metrics = evaluation.speed.summary(runs)
    for name in ("resident_bytes", "peak_bytes"):
        if answer.get(name) is not None:
            metrics[name] = float(answer[name])
    protocol = {
        "dtype": None,
        **evaluation.speed.protocol([prompt["tokens"] for prompt in request["prompts"]]),
        "machine": fingerprint(device),
        "engine": engine.label,
    }
    return {"metrics": metrics, "protocol": {"speed": protocol}, "samples": []}

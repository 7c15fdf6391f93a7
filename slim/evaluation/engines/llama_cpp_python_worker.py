"""Measures a GGUF file in llama.cpp through the package llama-cpp-python.

    python llama_cpp_python_worker.py REQUEST.json ANSWER.json

Runs in that package's environment: the standard library, numpy and llama_cpp only.
"""

import json
import sys
import time

import numpy
from llama_cpp import Llama
from worker_parts import memory_before, memory_since, timed_runs

BATCH = 256  # tokens whose logits are held at once


def load(request, all_logits):
    """Load the model; ``all_logits``: keep those of every token, not of the last one only."""
    return Llama(
        model_path=request["model"],
        n_ctx=request["context"],
        n_batch=BATCH,
        n_threads=request["threads"],
        n_threads_batch=request["threads"],
        n_gpu_layers=-1 if request["gpu"] else 0,
        logits_all=all_logits,
        verbose=False,
    )


def logits_of(model, count):
    """Return the logits of the last ``count`` tokens read, float32 [count, vocabulary]."""
    rows = model._ctx.get_logits()
    return numpy.ctypeslib.as_array(rows, shape=(count, model.n_vocab()))


def next_token(model, tokens):
    """Read tokens and return the most likely next one."""
    model.eval(tokens)
    return int(logits_of(model, 1)[-1].argmax())


def timed(model, prompt):
    """Return the seconds of reading a prompt and of writing after it."""
    model.reset()
    start = time.perf_counter()
    token = next_token(model, prompt["tokens"])
    read = time.perf_counter()
    for _ in range(prompt["new_tokens"] - 1):
        token = next_token(model, [token])
    return {"prefill": read - start, "decode": time.perf_counter() - read}


def continuation(model, prompt):
    """Return the tokens that greedily follow."""
    model.reset()
    chosen = []
    token = next_token(model, prompt["tokens"])
    while len(chosen) < prompt["new_tokens"] and token not in prompt["ends"]:
        chosen.append(token)
        if len(chosen) < prompt["new_tokens"]:
            token = next_token(model, [token])
    return chosen


def window_nll(model, tokens):
    """Return the negative log-likelihood of all tokens but the first, in nats."""
    model.reset()
    total = 0.0
    for start in range(0, len(tokens) - 1, BATCH):
        read = tokens[start : start + BATCH][: len(tokens) - 1 - start]
        model.eval(read)
        logits = logits_of(model, len(read)).astype(numpy.float64)
        largest = logits.max(1)
        sums = numpy.log(numpy.exp(logits - largest[:, None]).sum(1)) + largest
        following = tokens[start + 1 : start + 1 + len(read)]
        total += float((sums - logits[numpy.arange(len(read)), following]).sum())
    return total


def main(request_file, answer_file):
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    before = memory_before()
    model = load(request, all_logits=False)
    runs = timed_runs(request, lambda prompt: timed(model, prompt))
    memory = memory_since(before)
    continuations = [continuation(model, prompt) for prompt in request["continuations"]]
    nll = []
    if request["windows"]:
        model.close()
        model = load(request, all_logits=True)
        nll = [window_nll(model, tokens) for tokens in request["windows"]]
    answer = {
        "runs": runs,
        **memory,
        "nll": nll,
        "continuations": continuations,
    }
    with open(answer_file, "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

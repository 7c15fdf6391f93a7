"""Measures a checkpoint folder in vLLM.

    python vllm_worker.py REQUEST.json ANSWER.json

Runs in vLLM's environment: the standard library and vllm only. One prompt at a time, as slim's own
figures are.
"""

import json
import os
import sys
import time

from worker_parts import memory_before, memory_since, timed_runs


def load(request):
    """Load the model in this process."""
    from vllm import LLM

    return LLM(
        model=request["model"],
        tokenizer=None,
        skip_tokenizer_init=True,
        max_model_len=request["context"],
        max_num_seqs=1,
        enable_prefix_caching=False,
        enforce_eager=not request["gpu"],  # compiling for a CPU takes minutes
        disable_log_stats=True,
        seed=0,
    )


def generate(model, tokens, **settings):
    """Return vLLM's output for one prompt of tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, detokenize=False, **settings)
    return model.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)[0]


def timed(model, prompt):
    """Return the seconds of reading a prompt and of writing after it.

    Both are taken from the outside: the answer with one token is reading, and what the complete
    answer takes more is writing.
    """
    start = time.perf_counter()
    generate(model, prompt["tokens"], max_tokens=1, ignore_eos=True)
    read = time.perf_counter()
    generate(model, prompt["tokens"], max_tokens=prompt["new_tokens"], ignore_eos=True)
    written = time.perf_counter()
    return {"prefill": read - start, "decode": max(1e-9, written - read - (read - start))}


def window_nll(model, tokens):
    """Return the negative log-likelihood of all tokens but the first, in nats."""
    output = generate(model, tokens, max_tokens=1, prompt_logprobs=0)
    total = 0.0
    for token, known in zip(tokens[1:], output.prompt_logprobs[1:], strict=True):
        total -= known[token].logprob
    return total


def continuation(model, prompt):
    """Return the tokens that greedily follow, without the one that ends them."""
    output = generate(
        model, prompt["tokens"], max_tokens=prompt["new_tokens"], stop_token_ids=prompt["ends"]
    )
    chosen = list(output.outputs[0].token_ids)
    if chosen and chosen[-1] in prompt["ends"]:
        chosen.pop()
    return chosen


def main(request_file, answer_file):
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    import vllm  # noqa: F401  its libraries are not part of the model

    before = memory_before()
    model = load(request)
    runs = timed_runs(request, lambda prompt: timed(model, prompt))
    memory = memory_since(before)
    answer = {
        "runs": runs,
        **memory,
        "nll": [window_nll(model, tokens) for tokens in request["windows"]],
        "continuations": [continuation(model, prompt) for prompt in request["continuations"]],
    }
    with open(answer_file, "w", encoding="utf-8") as file:
        json.dump(answer, file)
    os._exit(0)  # engines of vLLM wait for threads of theirs


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Engines of a few lines, in environments of their own, that answer as real ones do.

Their model gives the token after the last one (modulo the vocabulary) a logit of 3 and all others
0, so that every figure can be worked out by hand.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

VOCABULARY = 5000  # more than the tokenizers of tests have
BONUS = 3.0
LLAMA_CPP = f"""
import ctypes

import numpy


class Context:
    def get_logits(self):
        return self.rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


class Llama:
    def __init__(self, model_path, n_ctx, n_batch, logits_all, **others):
        open(model_path, "rb").close()
        self.n_ctx, self.n_batch, self.all = n_ctx, n_batch, logits_all
        self._ctx = Context()
        self.reset()

    def n_vocab(self):
        return {VOCABULARY}

    def reset(self):
        self.count = 0

    def close(self):
        pass

    def eval(self, tokens):
        self.count += len(tokens)
        assert self.count <= self.n_ctx and len(tokens) <= self.n_batch
        rows = numpy.zeros((len(tokens), {VOCABULARY}), dtype=numpy.float32)
        for row, token in zip(rows, tokens):
            row[(token + 1) % {VOCABULARY}] = {BONUS}
        self._ctx.rows = rows if self.all else rows[-1:].copy()
"""
VLLM = f"""
import math
from types import SimpleNamespace


class SamplingParams:
    def __init__(self, max_tokens, prompt_logprobs=None, stop_token_ids=(), **others):
        self.max_tokens, self.logprobs, self.stops = max_tokens, prompt_logprobs, stop_token_ids


class LLM:
    def __init__(self, model, max_model_len, skip_tokenizer_init, **others):
        assert skip_tokenizer_init
        self.length = max_model_len

    def generate(self, prompt, sampling, use_tqdm):
        tokens = prompt["prompt_token_ids"]
        assert len(tokens) + sampling.max_tokens <= self.length
        known = [None]
        total = math.log(math.exp({BONUS}) + {VOCABULARY} - 1)
        for last, token in zip(tokens, tokens[1:]):
            logit = {BONUS} if token == (last + 1) % {VOCABULARY} else 0.0
            known.append({{token: SimpleNamespace(logprob=logit - total)}})
        new = []
        while len(new) < sampling.max_tokens:
            new.append(((new or tokens)[-1] + 1) % {VOCABULARY})
            if new[-1] in sampling.stops:
                break
        return [SimpleNamespace(
            prompt_logprobs=known if sampling.logprobs is not None else None,
            outputs=[SimpleNamespace(token_ids=new)],
        )]
"""
BENCH = """
import json, sys

if "--help" in sys.argv:
    print("usage: llama-bench [options]\\n  -d, --n-depth <n>")
    sys.exit()
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
rate = 400.0 if options["-n"] == "0" else 40.0
print(json.dumps([{"samples_ts": [rate] * int(options["-r"]), "n_depth": int(options["-d"])}]))
"""


def nll(tokens: list[int]) -> float:
    """Return the mean negative log-likelihood of all tokens but the first under that model."""
    total = 0.0
    for last, token in zip(tokens, tokens[1:], strict=False):
        logit = BONUS if token == (last + 1) % VOCABULARY else 0.0
        total += math.log(math.exp(BONUS) + VOCABULARY - 1) - logit
    return total / (len(tokens) - 1)


def environment(folder: Path, package: str, code: str, distribution: str, version: str) -> Path:
    """Write a Python environment with one package in it, and return its folder.

    Args:
        folder: where it goes.
        package: what is imported.
        code: the package's.
        distribution: the name it was installed under.
        version: of the distribution.
    """
    site = folder / "site"
    (site / package).mkdir(parents=True)
    (site / package / "__init__.py").write_text(code)
    info = site / f"{distribution}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
    )
    (info / "top_level.txt").write_text(f"{package}\n")
    (folder / "bin").mkdir()
    script(folder / "bin" / "python", f'PYTHONPATH="{site}" exec "{sys.executable}" "$@"')
    return folder


def script(path: Path, line: str) -> Path:
    """Write a program of one line of shell."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def llama_bench(folder: Path, code: str = BENCH) -> Path:
    """Write a llama-bench, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.py").write_text(code)
    script(folder / "llama-bench", f'exec "{sys.executable}" "{folder / "bench.py"}" "$@"')
    return folder


def node_llama_cpp(folder: Path, version: str) -> Path:
    """Write the description of a node-llama-cpp, and return the folder it is installed in."""
    package = folder / "node_modules" / "node-llama-cpp"
    package.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": version}))
    return folder


def path_of(*folders: Path) -> str:
    """Return a PATH with these folders first."""
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])

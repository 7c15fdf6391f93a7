"""Times a GGUF file with llama.cpp's llama-bench. Needs the standard library only.

    python llama_bench_worker.py REQUEST.json ANSWER.json

llama-bench makes up its tokens and does not give logits: there is no perplexity and no text.
"""

import json
import resource
import subprocess
import sys


def bench(request, prompt, generated, depth, repeats):
    """Return the tokens per second of every run."""
    command = [
        request["engine_path"], "-m", request["model"], "-t", str(request["threads"]),
        "-p", str(prompt), "-n", str(generated), "-d", str(depth), "-r", str(repeats), "-o", "json",
    ]  # fmt: skip
    if not request["gpu"]:
        command += ["-ngl", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(done.stderr.strip() or f"llama-bench ended with exit code {done.returncode}")
    return json.loads(done.stdout)[0]["samples_ts"]


def main(request_file, answer_file):
    with open(request_file, encoding="utf-8") as file:
        request = json.load(file)
    by_prompt = []
    for prompt in request["prompts"]:
        read, written = len(prompt["tokens"]), prompt["new_tokens"] - 1
        reading = bench(request, read, 0, 0, request["repeats"])  # warms up by itself
        writing = bench(request, 0, written, read, request["repeats"])
        timed = []
        for first, second in zip(reading, writing, strict=True):
            timed.append({"prefill": read / first, "decode": written / second})
        by_prompt.append(timed)
    # every prompt once, then every prompt again
    runs = []
    for repeated in zip(*by_prompt, strict=True):
        runs += repeated
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    answer = {
        "runs": runs,
        "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "resident_bytes": None,
        "lacks": ["nll", "continuations"],
    }
    with open(answer_file, "w", encoding="utf-8") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What our evaluation costs: over calling lm-eval directly, and the memory of a perplexity with a
vocabulary of 128k.

    python benchmarks/evaluate.py overhead MODEL DATA [--limit 100]     DATA: folder with arc_challenge.jsonl
    python benchmarks/evaluate.py memory [--vocabulary 128256]

``overhead`` runs the same questions of ARC-challenge on the same model in two fresh processes each,
ours and a plain call of lm-eval's evaluator with its own HFLM, and prints the seconds from the
import to the figures. Aim: at most 10 % + 3 s more. ``memory`` scores windows of 2048 tokens with a
random model of one narrow block and prints the peak over the weights. Aim: below 1.5 GB. See
docs/evaluation.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

DIRECT = """\
import json, sys, time
start = time.monotonic()
import datasets, transformers
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from pathlib import Path
model_folder, data, task, limit = sys.argv[1:]
rows = [json.loads(line) for line in open(f"{data}/{task}.jsonl")]
config = {**load_yaml(Path(sys.stdin.read().strip())), "training_split": None, "validation_split": None}
config["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_list(rows)}
(task,) = TaskManager(include_defaults=False).load([config])["tasks"].values()
task.set_config(key="num_fewshot", value=0)
model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype="float32")
lm = HFLM(pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(model_folder), batch_size=32,
          max_length=model.config.max_position_embeddings, softmax_dtype="float32")
found = evaluate(lm, {"tasks": {task.task_name: task}}, limit=int(limit), bootstrap_iters=1, log_samples=True)
figures = {key.split(",")[0]: value for key, value in found["results"][task.task_name].items() if "," in key}
print("RESULT", json.dumps([time.monotonic() - start, figures["acc"], figures["acc_norm"]]))
"""

OURS = """\
import json, sys, time
start = time.monotonic()
from slim.evaluation.evaluation import Evaluation
from slim.evaluation.run import measure
from slim.evaluation.tasks import Tasks
model, data, task, limit = sys.argv[1:]
evaluation = Evaluation(tasks=Tasks([task], limit=int(limit), num_fewshot=0, batch_size=32, local_data=data))
metrics = measure(model, evaluation)["quality"]["metrics"]
print("RESULT", json.dumps([time.monotonic() - start, metrics[f"{task}/acc"], metrics[f"{task}/acc_norm"]]))
"""


def timed(code: str, *arguments: str, text: str = "") -> list[float]:
    """Run ``code`` in a fresh process; return seconds, acc and acc_norm that it prints."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).removeprefix(
            "RESULT"
        )
    )


def overhead(options: argparse.Namespace) -> None:
    """Print the seconds of both ways; the first round of each warms the file cache and is not
    counted."""
    from slim.evaluation.task_files import find_task

    arguments = (options.model, options.data, "arc_challenge", str(options.limit))
    runs = {"lm-eval": [], "slim": []}
    for _ in range(options.rounds + 1):
        runs["lm-eval"].append(timed(DIRECT, *arguments, text=str(find_task("arc_challenge"))))
        runs["slim"].append(timed(OURS, *arguments))
    figures = {tuple(run[1:]) for found in runs.values() for run in found}
    best = {name: min(run[0] for run in found[1:]) for name, found in runs.items()}
    print(f"figures: {'the same' if len(figures) == 1 else figures}")
    print(
        f"lm-eval {best['lm-eval']:.1f} s, slim {best['slim']:.1f} s, limit {1.1 * best['lm-eval'] + 3:.1f} s"
    )


def memory(options: argparse.Namespace) -> None:
    """Print the peak over the weights while a perplexity is computed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from slim.evaluation.memory import MemoryMeter, weights_bytes
    from slim.evaluation.perplexity import negative_log_likelihood

    sizes = dict(
        hidden_size=options.hidden, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    config = AutoConfig.for_model(
        "llama", vocab_size=options.vocabulary, max_position_embeddings=4096, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    windows = torch.randint(0, options.vocabulary, (2, options.window))
    negative_log_likelihood(model, windows[:, :64])  # libraries and threads
    started = time.monotonic()
    with MemoryMeter("cpu") as meter:
        negative_log_likelihood(model, windows)
    seconds = time.monotonic() - started
    print(
        f"weights {weights_bytes(model) / 1e9:.2f} GB, peak over them {meter.peak / 1e9:.3f} GB, {seconds:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        spec=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("overhead")
    first.add_argument("model")
    first.add_argument("data")
    first.add_argument("--limit", type=int, default=100)
    first.add_argument("--rounds", type=int, default=1)
    first.set_defaults(run=overhead)
    second = commands.add_parser("memory")
    second.add_argument("--vocabulary", type=int, default=128_256)
    second.add_argument("--window", type=int, default=2048)
    second.add_argument("--hidden", type=int, default=512)
    second.add_argument("--dtype", default="float32")
    second.set_defaults(run=memory)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()

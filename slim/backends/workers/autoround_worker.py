"""Quantizes with AutoRound, in its own format or in GPTQ's.

Settings: bits, group_size, symmetric, steps, batch_size, format, and more of AutoRound's own under
"options". The samples are given as tokens, in their order."""

import contract

contract.report_bars()

import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
from auto_round import AutoRound  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def move_up(folder):
    """Move the result out of the subfolder that AutoRound makes for it."""
    for config in list(Path(folder).glob("*/config.json")):
        for path in list(config.parent.iterdir()):
            shutil.move(path, Path(folder) / path.name)


def main():
    request = contract.read_request()
    settings = request["settings"]
    rows = contract.tokens(request)
    model = AutoModelForCausalLM.from_pretrained(
        request["source"], dtype="auto", local_files_only=True
    )
    tokenizer = AutoTokenizer.from_pretrained(request["source"], local_files_only=True)
    size = settings["batch_size"]
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batches.append({"input_ids": part, "attention_mask": torch.ones_like(part)})
    tool = AutoRound(
        model,
        tokenizer=tokenizer,
        bits=settings["bits"],
        group_size=settings["group_size"],
        sym=settings["symmetric"],
        iters=settings["steps"],
        batch_size=size,
        dataset=batches,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        seed=request["seed"],
        device_map="cuda" if request["device"] == "cuda" else "cpu",
        enable_torch_compile=False,
        **settings["options"],
    )
    with contract.Stopwatch():
        tool.quantize_and_save(request["target"], format=settings["format"], inplace=True)
    move_up(request["target"])
    contract.packages("auto-round", "torch", "transformers")
    contract.done()


if __name__ == "__main__":
    main()

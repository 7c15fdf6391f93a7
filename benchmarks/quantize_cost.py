"""What quantising and running a model of TinyLlama-1.1B's shape costs: peak memory, time over the
floor, tokens per second."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from quantize_floor import floor, input_widths
from quantize_stages import TOKENS, Run, in_child, run_stage
from safetensors.torch import save_file

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.shards import ShardWriter
from slim.checkpoints.writer import copy_companions, write_config
from slim.evaluation.speed import Speed
from slim.loading.load_model import load_model
from slim.models.spec import ModelSpec

TINY = Path(__file__).parent.parent / "slim" / "assets" / "tiny"
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@contextmanager
def random_model(blocks: int) -> Iterator[Path]:
    """Write a random bfloat16 model of ``SHAPE`` with ``blocks`` blocks, tensor by tensor; yield
    its folder."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        model = ModelSpec({**SHAPE, "num_hidden_layers": blocks})
        generator, writer = torch.Generator().manual_seed(0), ShardWriter(target)
        for name, shape in tensor_shapes(model).items():
            tensor = (
                torch.randn(shape, generator=generator) * 0.02
                if len(shape) == 2
                else torch.ones(shape)
            )
            writer.add(name, tensor.bfloat16())
        writer.close()
        write_config(model.config, target)
        copy_companions(TINY, target)  # any tokenizer does: tokens are random
        yield target


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor, as a Llama checkpoint has them."""
    width, head = spec.hidden_size, (spec.vocab_size, spec.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": head}
    for block in range(spec.blocks):
        prefix = f"model.layers.{block}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in spec.block_linears().items()}
        shapes |= {
            f"{prefix}.{name}.weight": (width,)
            for name in ("input_layernorm", "post_attention_layernorm")
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": head}


def least_bytes(spec: ModelSpec, tokens: int) -> dict[str, int]:
    """Return the bytes, in float32, of one block, of its Hessians, and of the hidden states of
    all tokens."""
    hessians = sum(width**2 for width in input_widths(spec))
    return {
        "block": 4 * spec.block_parameters(),
        "Hessians": 4 * hessians,
        "hidden": 4 * tokens * spec.hidden_size,
    }


def quantized(blocks: int, options: argparse.Namespace) -> tuple[list[Run], float]:
    """Quantise a model of ``blocks`` blocks ``repeats`` times; return the runs, and the floor of
    one in seconds."""
    shape = (options.samples, options.length)
    with random_model(blocks) as model, tempfile.TemporaryDirectory() as scratch:
        tokens = torch.randint(
            0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(0)
        )
        save_file({TOKENS: tokens}, Path(scratch) / "tokens.safetensors")
        runs = []
        for number in range(options.repeats):
            target = Path(scratch) / str(number)
            target.mkdir()
            found = in_child(
                run_stage,
                options.method,
                model,
                Path(scratch) / "tokens.safetensors",
                target,
                4,
                128,
                False,
            )
            print(
                f"{blocks} blocks: peak {found.peak / 1e6:.0f} MB, {found.seconds:.1f} s",
                flush=True,
            )
            runs.append(found)
        least = in_child(floor, model, shape)
        print(f"{blocks} blocks: floor {least}", flush=True)
        return runs, least.total


def memory(options: argparse.Namespace) -> None:
    """Print the peak of GPTQ for the whole and for half of the depth, over what must be held, and
    time over the floor."""
    least = least_bytes(
        ModelSpec({**SHAPE, "num_hidden_layers": 1}), options.samples * options.length
    )
    print(f"{options.method}, 4 bits, groups of 128, {options.samples} x {options.length} tokens, "
          f"{torch.get_num_threads()} threads")  # fmt: skip
    print(f"must be held: {sum(least.values()) / 1e6:.0f} MB ("
          + ", ".join(f"{name} {size / 1e6:.0f}" for name, size in least.items()) + ")", flush=True)  # fmt: skip
    peaks = {}
    for blocks in (options.layers // 2, options.layers):
        runs, seconds = quantized(blocks, options)
        peaks[blocks] = max(run.peak for run in runs)
        taken = statistics.median(run.seconds for run in runs)
        print(f"{blocks} blocks: peak over what must be held {peaks[blocks] / sum(least.values()):.2f} (limit 1.3), "
              f"time over the floor {taken / seconds:.2f} (aim 2)", flush=True)  # fmt: skip
    print(f"peak of {options.layers} over {options.layers // 2} blocks: "
          f"{peaks[options.layers] / peaks[options.layers // 2]:.3f} (limit 1.05)")  # fmt: skip


def decode_speed(folder: Path, dtype: str, prompt: int, new: int, repeats: int) -> dict[str, float]:
    """Return tokens per second at batch 1 of a checkpoint loaded in ``dtype``."""
    model = load_model(folder, dtype)
    ids = torch.randint(
        0, SHAPE["vocab_size"], (prompt,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    measured = Speed(prompt_length=prompt, new_tokens=new, repeats=repeats).measure(model, [ids])
    return measured["metrics"]


def decode(options: argparse.Namespace) -> None:
    """Print tokens per second of the random model in bfloat16, float32, and 4 bits with bfloat16
    activations."""
    print(f"{options.layers} blocks, batch 1, prompt of {options.prompt}, {options.new} new tokens, median of "
          f"{options.repeats}, {torch.get_num_threads()} threads\n")  # fmt: skip
    print("| weights | prompt tokens/s | new tokens/s |\n| --- | ---: | ---: |")
    found, timing = {}, (options.prompt, options.new, options.repeats)
    with random_model(options.layers) as model, tempfile.TemporaryDirectory() as packed:
        save_file(
            {TOKENS: torch.zeros(1, 8, dtype=torch.int64)}, Path(packed) / "unused.safetensors"
        )
        in_child(
            run_stage,
            "rtn",
            model,
            Path(packed) / "unused.safetensors",
            Path(packed),
            4,
            128,
            False,
        )
        assert open_checkpoint(packed).spec.quantization
        for name, folder, dtype in (("bfloat16", model, "bfloat16"), ("float32", model, "float32"),
                                    ("4 bits", Path(packed), "bfloat16")):  # fmt: skip
            speed = in_child(decode_speed, folder, dtype, *timing)
            found[name] = speed["decode_tokens_per_second"]
            print(
                f"| {name} | {speed['prefill_tokens_per_second']:.1f} | {found[name]:.2f} |",
                flush=True,
            )
    faster = max(found["bfloat16"], found["float32"])
    print(f"\n4 bits: {found['4 bits'] / faster:.2f} times the faster of the others (limit 2)")

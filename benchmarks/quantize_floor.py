"""The least a calibrated pass through a model's blocks can take, each part measured by itself.

The weights once from disk, one forward pass per block, one Hessian and one factorisation per
distinct input (q/k/v; o; gate/up; down). Only shapes matter, so forwards run with random weights
and inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slim.calibration.hessian import Hessian
from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.reader import TensorReader
from slim.models.spec import ModelSpec

BATCHES = (1024, 4096)  # tokens in a forward; the faster counts
TIMED_BLOCKS = 2
REPEATS = 3


@dataclass
class Floor:
    """Seconds of each part for all blocks."""

    read: float
    forward: float
    hessian: float
    factor: float

    @property
    def total(self) -> float:
        return self.read + self.forward + self.hessian + self.factor

    def __str__(self) -> str:
        parts = (
            f"read {self.read:.2f}, forward {self.forward:.2f}, Hessian {self.hessian:.2f}, "
            f"factor {self.factor:.2f}"
        )
        return f"{self.total:.2f} s ({parts})"


def floor(folder: Path, shape: tuple[int, int]) -> Floor:
    """Measure the floor of one float32 pass over ``shape`` = (samples, length) tokens through all
    blocks of a checkpoint."""
    checkpoint = open_checkpoint(folder)
    model = checkpoint.spec
    widths = input_widths(model)
    return Floor(
        read=best(lambda: read_blocks(checkpoint)),
        forward=forward_seconds(model, folder, shape) * model.blocks,
        hessian=sum(hessian_seconds(width, shape[0] * shape[1]) for width in widths) * model.blocks,
        factor=sum(factor_seconds(width) for width in widths) * model.blocks,
    )


def input_widths(spec: ModelSpec) -> list[int]:
    """Return the widths of a block's distinct inputs."""
    linears = spec.block_linears()
    return [linears[group.linears[0]][1] for group in spec.family.linear_groups]


def best(work: Callable[[], object]) -> float:
    """Return the shortest of some times in seconds."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def read_blocks(checkpoint) -> None:
    """Read every tensor of the blocks, as stored."""
    reader = TensorReader(checkpoint)
    for name in checkpoint.tensors:
        if name.startswith(checkpoint.spec.family.blocks + "."):
            reader.read(name).clone()  # a mapped tensor is on disk until it is touched


@torch.inference_mode()
def forward_seconds(spec: ModelSpec, folder: Path, shape: tuple[int, int]) -> float:
    """Return seconds of one block for all tokens in float32, embeddings and head left out."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.num_hidden_layers = TIMED_BLOCKS + 1
    decoder = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().base_model
    hidden = torch.randn(shape[0], shape[1], spec.hidden_size)
    times = []
    for size in BATCHES:
        batches = hidden.split(max(1, size // shape[1]))
        whole = best(
            lambda batches=batches: [
                decoder(inputs_embeds=batch, use_cache=False) for batch in batches
            ]
        )
        layers, decoder.layers = decoder.layers, decoder.layers[:1]
        decoder.config.num_hidden_layers = 1
        one = best(
            lambda batches=batches: [
                decoder(inputs_embeds=batch, use_cache=False) for batch in batches
            ]
        )
        decoder.layers, decoder.config.num_hidden_layers = layers, TIMED_BLOCKS + 1
        times.append((whole - one) / TIMED_BLOCKS)
    return min(times)


def hessian_seconds(width: int, tokens: int) -> float:
    """Return seconds of X^T X for float32 X [tokens, width], by the faster of one product and
    slim's half of one."""
    inputs = torch.randn(min(tokens, max(BATCHES)), width)
    return (
        min(best(lambda: inputs.T @ inputs), best(lambda: Hessian(width).add(inputs)))
        * tokens
        / len(inputs)
    )


def factor_seconds(width: int) -> float:
    """Return seconds of one Cholesky factorisation, float32 [width, width]."""
    inputs = torch.randn(width, width)
    hessian = inputs @ inputs.T + width * torch.eye(width)
    return best(lambda: torch.linalg.cholesky(hessian))

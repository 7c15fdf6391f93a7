"""Stages that do little, for tests of what surrounds them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file

from slim.checkpoints.checkpoint import open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.writer import copy_companions, write_config
from slim.core.io import save_tensors
from slim.models.spec import ModelSpec


@dataclass
class Scale(Stage):
    """Multiplies the final norm; ``log`` names a file that gets a line for every run; ``fail``
    raises half-way."""

    kind: ClassVar[str] = "prune"
    factor: float = 2.0
    log: str = ""
    fail: BaseException | None = None
    needs: int = 0

    def cache_key(self) -> dict:
        return {"factor": self.factor}

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return self.needs

    def run(self, source: Path, target: Path, context: Context) -> dict:
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{self.factor}\n")
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"] * self.factor
        write_config(open_checkpoint(source).config, target)
        copy_companions(source, target)
        if self.fail is not None:
            raise self.fail
        save_tensors(tensors, target / "model.safetensors")
        context.metric("loss", 1.5, 1)
        context.metric("loss", 0.5, 2)
        return {"factor": self.factor}


def run(stage: Stage, source: Path, target: Path, **context) -> dict:
    """Check a stage against ``source`` and run it into the new folder ``target``; return its facts,
    which must be plain."""
    target.mkdir(parents=True)
    stage.check(open_checkpoint(source).spec)
    facts = stage.run(source, target, Context(**context))
    json.dumps(facts)
    return facts

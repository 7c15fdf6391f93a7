"""Who teaches: which checkpoint, in which type or quantisation, and whether it shares the student's
vocabulary."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.source import Source, has_weights
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.errors import SlimError
from slim.loading.load_model import load_model
from slim.quantization.storage import weight_bytes

if TYPE_CHECKING:
    from slim.checkpoints.checkpoint import Checkpoint
    from slim.models.spec import ModelSpec

BASE = "base"
QUANTS = (None, "nf4", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Teacher:
    """A checkpoint that teaches.

    base: where the chain begins. name: ``base`` for that, or a checkpoint folder or model id of the
        hub.
    revision: branch, tag or commit of a hub model. dtype: ``auto`` is float32 on a CPU and the
        stored type elsewhere.
    quant: ``nf4`` or ``int8`` quantises it for teaching; None takes it as it is stored, packed or
    not."""

    base: object
    name: str = BASE
    revision: str | None = None
    dtype: str = "auto"
    quant: str | None = None

    @property
    def source(self) -> Source:
        """The checkpoint. Raises ``SlimError`` for a base without trained weights."""
        if self.name != BASE:
            return Source(self.name, self.revision)
        if not has_weights(self.base):
            raise SlimError(
                "teacher=base is the model the chain begins with, and that has random weights: nothing to learn from it. "
                "Use teacher.model=FOLDER or another model=..."
            )
        return self.base

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, fetched from the hub where needed."""
        return self.source.resolve()

    @cached_property
    def digest(self) -> str:
        """16 hex digits that name the content of its files."""
        return self.source.content_digest()

    @property
    def quantizer(self) -> Stage | None:
        """The stage that quantises it, or None."""
        from slim.quantization.methods import bitsandbytes as bnb

        return None if self.quant is None else {"nf4": bnb.NF4, "int8": bnb.Int8}[self.quant]()

    def check(self) -> ModelSpec:
        """Describe what will teach. Raises ``SlimError`` for what cannot, before any work."""
        spec = self.source.describe()
        spec.family  # noqa: B018 - refuses families whose parts are unknown
        if self.quantizer is None:
            return spec
        spec.require_plain(f"Leave teacher.quant={self.quant} out.")
        self.quantizer.check(spec)
        return self.quantizer.output_spec(spec)

    def bytes(self, device: str) -> int:
        """Estimate the memory of its weights."""
        model = self.check()
        if model.quantization is not None:
            return weight_bytes(model)
        dtype = "float32" if self.dtype == "auto" and device == "cpu" else self.dtype
        return weight_bytes(model, None if dtype == "auto" else dtype)

    def load(self, device: str):
        """Return the model, frozen, in evaluation mode; quantised block by block where that is
        asked for."""
        folder = self.checkpoint.folder
        if self.quantizer is None:
            return load_model(folder, self.dtype, device).requires_grad_(False)
        with tempfile.TemporaryDirectory() as scratch:
            self.quantizer.run(folder, Path(scratch), Context(device))
            return load_model(scratch, self.dtype, device).requires_grad_(False)


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token -> id of the tokenizer in ``folder``, read from ``tokenizer.json``; None where
    there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    tokens = content["model"].get("vocab")
    if not isinstance(tokens, dict):  # unigram models list their pieces with scores
        tokens = {piece[0]: number for number, piece in enumerate(tokens or ())}
    return {
        **tokens,
        **{added["content"]: added["id"] for added in content.get("added_tokens", ())},
    }


def full_vocabulary(folder: Path) -> dict[str, int]:
    """As :func:`vocabulary`, by way of transformers where there is no ``tokenizer.json``."""
    found = vocabulary(folder)
    return load_tokenizer(folder).get_vocab() if found is None else found


def same_vocabulary(one: Path, other: Path) -> bool:
    """Whether two checkpoints number the same tokens alike. Equal sizes do not tell: the content is
    compared."""
    return one == other or full_vocabulary(one) == full_vocabulary(other)

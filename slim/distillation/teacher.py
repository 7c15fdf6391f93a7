"""Who teaches: which checkpoint, in which type or quantisation, and whether it shares the student's
vocabulary."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from slim.checkpoints.source import Source, has_weights
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.tokenizer import load_tokenizer
from slim.core.console import say
from slim.core.errors import SlimError
from slim.core.io import read_object
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

    Attributes:
        base: Where the chain begins.
        name: ``base`` for that, or a checkpoint folder or model id of the hub.
        revision: Branch, tag or commit of a hub model.
        dtype: ``auto`` is float32 on a CPU and the stored type elsewhere.
        quant: ``nf4`` or ``int8`` quantises it for teaching; None takes it as it is stored, packed
            or not.
    """

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
                "teacher=base is the model the chain begins with, and that has random weights: "
                "nothing to learn from it.\nUse teacher.model=FOLDER or another model=..."
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

        if self.quant is None:
            return None
        return {"nf4": bnb.NF4, "int8": bnb.Int8}[self.quant]()

    def check(self) -> ModelSpec:
        """Describe what will teach, before any work.

        Raises:
            SlimError: It cannot teach.
        """
        spec = self.source.describe()
        spec.family  # noqa: B018 - refuses families whose parts are unknown
        if self.quantizer is None:
            return spec
        spec.require_plain(f"Leave teacher.quant={self.quant} out.")
        self.quantizer.check(spec)
        return self.quantizer.output_spec(spec)

    def bytes(self, device: str) -> int:
        """Estimate the memory of its weights.

        Args:
            device: Where it teaches.
        """
        spec = self.check()
        if spec.quantization is not None:
            return weight_bytes(spec)
        if self.dtype != "auto":
            return weight_bytes(spec, self.dtype)
        return weight_bytes(spec, "float32" if device == "cpu" else None)

    def load(self, device: str):
        """Return the model, frozen, in evaluation mode; quantised block by block where that is
        asked for.

        Args:
            device: Where it teaches.
        """
        folder = self.checkpoint.folder
        if self.name != BASE:  # the chain has said it of its own source
            for note in self.checkpoint.notes:
                say(note, head=f"teacher {self.source.label}")
        if self.quantizer is None:
            return load_model(folder, self.dtype, device).requires_grad_(False)
        with tempfile.TemporaryDirectory() as scratch:
            self.quantizer.run(folder, Path(scratch), Context(device))
            return load_model(scratch, self.dtype, device).requires_grad_(False)

    def vocabulary_problem(self, student: str, loss: str) -> str:
        """Say that the vocabularies differ, and what can be done.

        Args:
            student: The student's name.
            loss: Name of the divergence.
        """
        return (
            f"{self.source.label} has another vocabulary than {student}, and teacher.loss={loss} "
            "compares them token by token.\n"
            "DSKD does not need the same one: use teacher=dskd (teacher.method=dskd)."
        )


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Return token -> id of a tokenizer, read from ``tokenizer.json``; None where there is none.

    Args:
        folder: Of the checkpoint.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        tokens = content["model"].get("vocab")
        if not isinstance(tokens, dict):  # unigram models list their pieces with scores
            tokens = {piece[0]: number for number, piece in enumerate(tokens or ())}
        added_tokens = {added["content"]: added["id"] for added in content.get("added_tokens", ())}
    except (AttributeError, LookupError, TypeError):  # loading it says what is wrong with it
        load_tokenizer(folder)
        return None
    return {**tokens, **added_tokens}


def full_vocabulary(folder: Path) -> dict[str, int]:
    """As :func:`vocabulary`, by way of transformers where there is no ``tokenizer.json``.

    Args:
        folder: Of the checkpoint.
    """
    tokens = vocabulary(folder)
    return load_tokenizer(folder).get_vocab() if tokens is None else tokens


def same_vocabulary(student: Path, teacher: Path) -> bool:
    """Whether two checkpoints number the same tokens alike. Equal sizes do not tell: the content is
    compared.

    Args:
        student: Folder of the one.
        teacher: Folder of the other.
    """
    return student == teacher or full_vocabulary(student) == full_vocabulary(teacher)

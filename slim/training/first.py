"""A classifier that is trained as the beginning of a chain, so that what follows (a student, a
teacher, quantization) is measured against it and can learn from it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from slim.checkpoints.checkpoint import Checkpoint, open_checkpoint
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.store import Store, digest
from slim.core.errors import SlimError
from slim.models.spec import ModelSpec
from slim.training.tuner import Tuner


@dataclass
class Trained(Stage):
    """A model and the training that it gets first.

    Attributes:
        base: Where the training begins: a fresh model, an encoder with a new head, or one as it is.
        tuner: The training.
        store: Folder of results, where a teacher finds it.
    """

    cache_name: ClassVar[str] = "Trained"

    base: object = field(default=None)
    tuner: object = field(default=None)
    store: str = field(default="runs", metadata={"cache_key": False})

    kind: ClassVar[str] = "tune"

    def __post_init__(self) -> None:
        if not isinstance(self.tuner, Tuner):
            raise SlimError("model.tuner must be a choice of the tuner group, such as encoder.")

    @property
    def label(self) -> str:
        """Short name for tables."""
        return f"{getattr(self.base, 'label', None) or 'encoder'} tuned"

    def cache_key(self) -> dict:
        base = self.base
        if isinstance(base, Stage):
            begins = [base.cache_key(), base.version]
        else:
            begins = base.content_digest()
        return {
            "class": self.cache_name,
            "base": begins,
            "tuner": [self.tuner.cache_key(), self.tuner.version],
        }

    def content_digest(self) -> str:
        """Return the name of the result, which is known before the training."""
        return digest([self.cache_key(), self.version])

    def local_folder(self) -> Path | None:
        """Return the folder of the result, or None while it is not trained."""
        folder = Store(self.store).stage_folder(self.kind, self.content_digest())
        return folder if folder.is_dir() else None

    def resolve(self) -> Checkpoint:
        """Return the trained checkpoint.

        Raises:
            SlimError: It is not trained yet. In a chain it is, as the chain's first stage.
        """
        folder = self.local_folder()
        if folder is None:
            raise SlimError(f"{self.label} is not trained yet: begin the chain with it.")
        return open_checkpoint(folder)

    def describe(self) -> ModelSpec:
        """Describe the result. Raises ``SlimError`` for a training that cannot be."""
        spec = self.base.describe()
        self.tuner.check(spec)
        return self.tuner.output_spec(spec)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return self.tuner.peak_bytes(spec, device)

    def run(self, source: Path | None, target: Path, context: Context) -> dict:
        """Make the beginning and train it.

        Args:
            source: None: nothing comes before it.
            target: An empty folder.
            context: Handed on to the training.

        Returns:
            The metadata of the training.
        """
        if not isinstance(self.base, Stage):
            return self.tuner.run(self.base.resolve().folder, target, context)
        with tempfile.TemporaryDirectory() as scratch:
            self.base.run(None, Path(scratch), context)
            return self.tuner.run(Path(scratch), target, context)

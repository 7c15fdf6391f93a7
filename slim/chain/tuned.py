"""A model tuned first, as where a chain begins: what comes after it, a student made of its blocks
above all, has the tuned model as its base and as its teacher."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from slim.checkpoints.source import Source
from slim.checkpoints.stage import Context, Stage
from slim.checkpoints.store import Store, digest
from slim.core.errors import SlimError
from slim.core.settings import spoken_name
from slim.models.spec import ModelSpec


@dataclass
class Tuned(Stage):
    """The result of a tuner on a model.

    Attributes:
        base: the model, or the import of a GGUF file.
        tuner: what tunes it.
        store: folder of results, where the tuned model is found by whoever else needs it (a
            teacher).
    """

    cache_name: ClassVar[str] = "Tuned"
    kind: ClassVar[str] = "tune"

    base: Source | Stage
    tuner: Stage
    store: str

    @property
    def label(self) -> str:
        """Short name for tables."""
        name = getattr(self.base, "label", None) or "model"
        return f"{name}, {spoken_name(self.tuner)}"

    @cached_property
    def _spec(self) -> ModelSpec:
        spec = self.base.describe()
        self.tuner.look_ahead(spec, [])
        self.tuner.check(spec)
        return spec

    def cache_key(self) -> dict:
        return self._key

    @cached_property
    def _key(self) -> dict:
        """Made once: a document that is edited during hours of work must not give the model another
        name."""
        self._spec  # noqa: B018 - the tuner chooses what its settings leave to the chain
        base = self.base
        if isinstance(base, Source) and base.local_folder() is None:  # a plan fetches no weights
            name = f"{base.source}@{base.revision}"
        else:
            name = base.content_digest()
        tuner = [self.tuner.cache_key(), self.tuner.version]
        return {"class": self.cache_name, "base": name, "tuner": tuner}

    def content_digest(self) -> str:
        """Return the name of the result, which is known before it is made."""
        return digest([self.cache_key(), self.version])

    def local_folder(self) -> Path | None:
        """Return the folder of the result, or None while it is not made."""
        folder = Store(self.store).stage_folder(self.kind, self.content_digest())
        if folder.is_dir():
            return folder
        return None

    def resolve(self) -> Checkpoint:
        """Return the tuned checkpoint.

        Raises:
            SlimError: it is not made yet. In a chain it is, since it is the chain's beginning.
        """
        folder = self.local_folder()
        if folder is None:
            raise SlimError(f"{self.label} is not made yet: begin the chain with it.")
        return open_checkpoint(folder)

    def describe(self) -> ModelSpec:
        spec = self.tuner.output_spec(self._spec)
        return ModelSpec(spec.config, name=self.label)

    def peak_bytes(self, spec: ModelSpec, device: str) -> int:
        return self.tuner.peak_bytes(self._spec, device)

    def run(self, source: Path | None, target: Path, context: Context) -> dict:
        """Tune the model in a chain of its own, so that others find the result too, and take it
        over.

        Returns:
            The tuner's metadata.
        """
        store = Store(self.store)
        chain = Pipeline(self.base, [self.tuner], None, store, context.device, ignore_limits=True)
        result = chain.run()[-1]
        for path in sorted(result.checkpoint.folder.rglob("*")):
            copy = target / path.relative_to(result.checkpoint.folder)
            if path.is_dir():
                copy.mkdir(exist_ok=True)
            elif path.name != MANIFEST:
                _take_over(path, copy)
        for name, value, step in result.checkpoint.manifest["curves"]:
            context.metric(name, value, step)
        return result.checkpoint.manifest["facts"]


def _take_over(path: Path, copy: Path) -> None:
    """Let a file be in both folders, once on disk where the file system can."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)

"""What a user may name as a model, and the checkpoint folder that it stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from slim.chain.pipeline import Pipeline
from slim.checkpoints.checkpoint import Checkpoint
from slim.checkpoints.source import EMBEDDED, HUB_ID, Source
from slim.checkpoints.store import Store
from slim.core.errors import SlimError
from slim.core.text import short_settings
from slim.gguf.sources import ENDING as GGUF_ENDING
from slim.gguf.sources import SMOLLM2, beginning

# of a result's folder: its whole name, or its hash, or the first digits of that
STORED = re.compile(r"(?:[a-z_]+-)?[0-9a-f]{4,16}")


@dataclass(frozen=True)
class Named:
    """A model as the user named it.

    Attributes:
        name: short, for requests and headings.
        checkpoint: the folder that it stands for.
    """

    name: str
    checkpoint: Checkpoint

    @property
    def chain(self) -> str:
        """What made it, such as ``tiny > quantize rtn 4b g64``; empty where slim did not."""
        manifest = self.checkpoint.manifest
        lineage = manifest.get("lineage") or []
        labels = [entry.get("name") or entry.get("label", "") for entry in lineage]
        last = short_settings(manifest.get("settings") or {})
        return f"{' > '.join(labels)} {last}".rstrip()


def find_models(names: list[str], store: str) -> list[Named]:
    """Return the models that were named, each under a name of its own.

    Args:
        names: as :func:`find_model` takes them.
        store: folder of results.

    Raises:
        SlimError: one of them is not there, or writes no text.
    """
    models: list[Named] = []
    for name in names:
        model = find_model(name, store)
        if model.checkpoint.spec.is_encoder:
            raise SlimError(f"{name} is an encoder, which writes no text. Give a language model.")
        taken = [known.name for known in models]
        short = model.name
        number = 2
        while short in taken:  # two folders may have the same last name
            short = f"{model.name}-{number}"
            number += 1
        models.append(Named(short, model.checkpoint))
    return models


def find_model(name: str, store: str) -> Named:
    """Return the checkpoint that a name stands for; a GGUF file is imported into the store first.

    Args:
        name: a checkpoint folder, a GGUF file, ``tiny``, ``smollm2``, a result in the store (the
            name of its folder, or four or more digits of its hash), or an id of the hub's.
        store: folder of results.

    Raises:
        SlimError: nothing is called so, or it is no checkpoint.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix != GGUF_ENDING:
        raise SlimError(
            f"{name} is a file that is no GGUF file. Give a checkpoint folder, or FILE{GGUF_ENDING}"
        )
    if path.is_file() or (name == SMOLLM2 and not path.is_dir()):
        return _from_import(name, store)
    if path.is_dir() or name in EMBEDDED:
        source = Source(name)
        return Named(source.label, source.resolve())
    stored = _in_store(name, store)
    if stored is not None:
        return Named(stored.name, Source(str(stored)).resolve())
    if not HUB_ID.fullmatch(name) or path.suffix == GGUF_ENDING:
        raise SlimError(
            f"There is no folder, file or result called {name} (results are looked for in "
            f"{store}).\nGive FOLDER, FILE.gguf, org/name of the hub, tiny, or a name that "
            "'python -m slim.cache list' shows."
        )
    return Named(name, Source(name).resolve())


def _from_import(name: str, store: str) -> Named:
    """Return the model of a GGUF file, imported where it is not in the store yet."""
    from hydra.utils import instantiate  # local: it takes a while

    model = instantiate(beginning({"source": name, "dtype": None}, store))
    pipeline = Pipeline(model, [], None, Store(store))
    checkpoint = pipeline.run()[-1].checkpoint
    return Named(model.label, checkpoint)


def _in_store(name: str, store: str) -> Path | None:
    """Return the folder of the one result that a name means; None where it means none."""
    if not STORED.fullmatch(name):
        return None
    matches = []
    for folder in sorted((Store(store).root / "stages").glob("*")):
        digits = folder.name.rpartition("-")[2]
        begins = folder.name.startswith(name) or digits.startswith(name)
        if begins and folder.is_dir() and not folder.suffix:
            matches.append(folder)
    if len(matches) > 1:
        shown = ", ".join(folder.name for folder in matches[:3])
        raise SlimError(f"{name} may mean {shown} in {store}. Give more of its digits.")
    if not matches:
        return None
    return matches[0]

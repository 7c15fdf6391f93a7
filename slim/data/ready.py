"""Whether texts can be had, asked before hours of work that would end for want of one. Nothing is
fetched and no file is read beyond its first row."""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import copy
from pathlib import Path

from slim.core.errors import SlimError
from slim.core.hub import hub_problem
from slim.core.text import counted
from slim.data.corpus import Corpus
from slim.data.files import text_lines
from slim.data.text import Text

ADDED_TOKENS = 2  # that a tokenizer may put around a text


def check_file(text: Text) -> None:
    """Read the beginning of a local text: a file, or a folder in the hub's layout.

    Args:
        text: any; of one of the hub nothing is read.

    Raises:
        SlimError: when it cannot be read, is empty, or its first row has no such column.
    """
    path = text.path
    if path is None:
        return
    if path.is_file() and path.suffix == ".txt":
        first: Iterator[str] = text_lines(path)
    else:  # a folder is read as a stream, which keeps no copy of it
        first = _streamed(text).documents()
    if next(first, None) is None:
        raise SlimError(f"{text.setting('text')}={text.text} is empty. Give another text.")


def check_length(text: Text, tokens: int) -> None:
    """Refuse a local text file of fewer bytes than tokens are needed, without a tokenizer.

    Args:
        text: any; of others than ``.txt`` files nothing is said.
        tokens: of one window.

    Raises:
        SlimError: when it is too short for any tokenizer: none makes two tokens of a byte.
    """
    path = text.path
    if path is None or path.suffix != ".txt" or not path.is_file():
        return
    size = path.stat().st_size
    if size + ADDED_TOKENS < tokens:
        raise SlimError(
            f"{text.setting('text')}={text.text} has {counted(size, 'byte')}, too few for one "
            f"window of {tokens} tokens. Give a longer text."
        )


def check_data(data: Corpus) -> None:
    """Read the beginning of local training data as it will be read.

    Args:
        data: any; of a data set of the hub nothing is read.

    Raises:
        SlimError: when it cannot be read, is empty, or has other columns than the settings say.
    """
    text = data.source(data.split)
    if text.path is None:
        return
    if text.path.is_file() and text.path.suffix == ".txt":
        check_file(text)
        return
    where, row = next(_streamed(text).located_rows(), (None, None))
    if row is None:
        raise SlimError(f"data.text={data.text} is empty. Give other data.")
    data.check_row(row, where)


def _streamed(text: Text) -> Text:
    """Return the same text, read row by row."""
    streamed = copy(text)
    streamed.streaming = True
    return streamed


def missing_dataset(name: str, revision: str | None = None) -> str | None:
    """Say why a data set of the hub cannot be had.

    Args:
        name: its id.
        revision: branch, tag or commit; None: the main branch.

    Returns:
        The reason; None where it can be fetched or is in the local cache.
    """
    if _is_cached(name):
        return None
    problem = hub_problem()
    if problem is None and os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "TRUE"):
        problem = "HF_DATASETS_OFFLINE is set"
    if problem is not None:
        return problem
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, revision=revision, timeout=10)
    except GatedRepoError:
        return "it is gated: accept its terms on the hub, then run 'hf auth login'"
    except RepositoryNotFoundError:
        return "the hub has no such data set, or it is private: then run 'hf auth login'"
    except Exception:  # whatever is wrong with the answer shows when the data are fetched
        return None
    return None


def _is_cached(name: str) -> bool:
    """Whether the local caches have anything of a data set; what exactly is for the library to
    say."""
    from huggingface_hub import constants

    home = Path(constants.HF_HOME) / "datasets"
    datasets = Path(os.environ.get("HF_DATASETS_CACHE") or home).expanduser()
    hub = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    if hub.is_dir():
        return True
    if not datasets.is_dir():
        return False
    # the library writes CamelCase as snake_case there
    wanted = name.replace("/", "___").replace("_", "").lower()
    return any(path.name.replace("_", "").lower() == wanted for path in datasets.iterdir())

"""The tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.io import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder.

    Tokens whose ids lie beyond the embedding's rows do no harm as long as nobody uses them; a text
    in which one occurs is refused when it is tokenized. Padding is never looked at, so a padding
    token of that kind gives way to the end of the text.

    Args:
        folder: The checkpoint folder.

    Raises:
        SlimError: The installed transformers cannot read the tokenizer, or the tokens that begin or
            end a text lie beyond the embedding.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SlimError(
            f"The tokenizer in {folder} cannot be loaded: {reason}\n"
            "It may be of another version of the library: save it again with the installed one."
        ) from error
    longest = tokenizer.model_max_length
    # a text here fails deep inside the library, at the first long input
    if not isinstance(longest, (int, float)) or isinstance(longest, bool):
        raise SlimError(
            f"{folder / 'tokenizer_config.json'}: model_max_length={longest!r} must be a number, "
            "the longest input in tokens. Leave it out if there is none."
        )
    rows = embedding_rows(folder)
    if rows is not None and largest_id(tokenizer) >= rows:
        watch_ids(tokenizer, rows, folder)
    return tokenizer


def embedding_rows(folder: Path) -> int | None:
    """Return the vocabulary's size by ``config.json``; None where the folder does not say."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    rows = read_json(file).get("vocab_size")
    if not isinstance(rows, int):
        return None
    return rows


def largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest id that a tokenizer can give."""
    return max(tokenizer.get_vocab().values(), default=-1)


def watch_ids(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> None:
    """Make a tokenizer refuse texts with tokens that the model has no row for.

    Args:
        tokenizer: A tokenizer with such tokens.
        rows: Rows of the embedding.
        folder: Where it came from, for messages.

    Raises:
        SlimError: A token that begins or ends texts is one of them.
    """
    for role in ("bos", "eos"):
        number = getattr(tokenizer, f"{role}_token_id")
        if number is not None and number >= rows:
            raise SlimError(refusal(tokenizer, number, rows, folder))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token
    # the one method that all ways to call a tokenizer end in
    encode = tokenizer._encode_plus

    def checked(*texts, **settings):
        """Tokenize, and look at the ids."""
        encoded = encode(*texts, **settings)
        for number in flat(encoded["input_ids"]):
            if number >= rows:
                raise SlimError(refusal(tokenizer, number, rows, folder))
        return encoded

    tokenizer._encode_plus = checked


def flat(ids) -> list[int]:
    """Return the ids of one text or of several, as lists or tensors, in one list."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if ids and isinstance(ids[0], list):
        return [number for text in ids for number in text]
    return list(ids)


def refusal(tokenizer: PreTrainedTokenizerBase, number: int, rows: int, folder: Path) -> str:
    """Return what is wrong with a token beyond the embedding.

    Args:
        tokenizer: That has the token.
        number: Its id.
        rows: Of the embedding.
        folder: Of the checkpoint, for the message.
    """
    token = tokenizer.convert_ids_to_tokens(number)
    return (
        f"The tokenizer in {folder} gives {token!r} the id {number}, but the embedding has {rows} "
        f"rows (config.json: vocab_size).\n"
        "The token was added without model.resize_token_embeddings; remove it, or resize the model."
    )

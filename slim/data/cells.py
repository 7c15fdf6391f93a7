"""What stands in a cell of a row, as text.

A model must never learn how Python writes a list or an object. A cell is therefore text, a number,
nothing, or one of the two lists whose meaning is known: the parts of a message as chat interfaces
send them, which are joined, and alternative answers, of which the first counts. Anything else is an
error that says where it stands."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from slim.core.errors import SlimError

TEXT_PARTS = ("text", "input_text", "output_text")  # names for a part that is text


def as_text(value: Any, where: str) -> str:
    """Return a cell as text: its own, that of a number, nothing for a missing value.

    Args:
        value: of the cell. Parts of a message are joined.
        where: file, line and column, for messages.

    Raises:
        SlimError: for a list or an object that is no text, and for half a character.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""  # tables write NaN where a value is missing
    if isinstance(value, str):
        return _whole_characters(value, where)
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float, Decimal)):
        return str(value)
    if isinstance(value, dict) and _is_part(value):
        return _part(value, where)
    if isinstance(value, (list, tuple)):
        return _joined_parts(value, where)
    raise SlimError(f"{where} holds {_described(value)} where text is needed.{_advice(value)}")


def first_text(value: Any, where: str) -> str:
    """Return a cell as text as :func:`as_text` does; of a list of alternatives the first.

    Args:
        value: of the cell; ``[]`` counts as missing.
        where: file, line and column, for messages.
    """
    if isinstance(value, (list, tuple)) and all(_is_scalar(item) for item in value):
        return as_text(value[0], where) if value else ""
    return as_text(value, where)


def as_records(value: Any, where: str) -> list[Any]:
    """Return a list of objects, however the row stores it: as such, as JSON, or as an object of
    equally long lists.

    Args:
        value: of the cell; None is an empty list.
        where: file, line and column, for messages.

    Raises:
        SlimError: for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise SlimError(f"{where} holds text that is no list of turns.") from error
    if value is None:
        return []
    if isinstance(value, dict):
        return _transposed(value, where)
    if isinstance(value, (list, tuple)):
        return list(value)
    raise SlimError(f"{where} holds {_described(value)} where a list of objects is needed.")


def _transposed(columns: dict[str, Any], where: str) -> list[dict]:
    """Return an object of equally long lists as a list of objects."""
    lists = list(columns.values())
    if not all(isinstance(item, (list, tuple)) for item in lists):
        raise SlimError(f"{where} holds {_described(columns)} where a list of objects is needed.")
    if len({len(item) for item in lists}) > 1:
        raise SlimError(
            f"{where} holds lists of different lengths where a list of objects is needed."
        )
    records = []
    for values in zip(*lists, strict=True):
        records.append(dict(zip(columns, values, strict=True)))
    return records


def _joined_parts(parts: list | tuple, where: str) -> str:
    """Return the text of a message's parts, one after the other."""
    for part in parts:
        if not isinstance(part, dict) or not _is_part(part):
            raise SlimError(
                f"{where} holds {_described(parts)} where text is needed.{_advice(parts)}"
            )
    return "".join(_part(part, where) for part in parts)


def _is_part(value: dict) -> bool:
    """Whether an object is part of a message: it has a type, or its text and nothing else."""
    if set(value) == {"text"}:
        return isinstance(value["text"], str)
    return isinstance(value.get("type"), str)


def _part(part: dict, where: str) -> str:
    """Return the text of one part. Raises ``SlimError`` for an image, a sound, a call of a tool."""
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise SlimError(
            f"{where} has a part of type '{kind}' that holds no text. Leave such rows out: slim's "
            "models read text only."
        )
    return _whole_characters(part["text"], where)


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, Decimal))


def _whole_characters(text: str, where: str) -> str:
    """Return ``text``. Raises ``SlimError`` for half a surrogate pair, which no encoding can
    write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start]).strip("'")
        raise SlimError(
            f"{where} holds half a character ({half}, a surrogate without its pair). Remove it or "
            "leave the row out."
        ) from error
    return text


def _described(value: Any) -> str:
    """Name a value's kind, with a glimpse of what is in it."""
    if isinstance(value, dict):
        keys = ", ".join(str(key) for key in list(value)[:5])
        return f"an object ({keys or 'empty'})"
    if isinstance(value, (list, tuple)):
        kinds = sorted({f"{_kind(item)}s" for item in value})
        return f"a list of {', '.join(kinds) or 'nothing'}"
    return f"a {_kind(value)}" if isinstance(value, (int, float)) else _kind(value)


def _kind(value: Any) -> str:
    """Name the kind of a value as JSON does."""
    if isinstance(value, dict):
        return "object"
    if isinstance(value, (list, tuple)):
        return "list"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float)):
        return "number"
    return type(value).__name__


def _advice(value: Any) -> str:
    """Say what to do about a list or an object."""
    if isinstance(value, dict):
        return " Name a column that holds text, or take the text out of the object first."
    return " Join the list into one text first, or name another column."

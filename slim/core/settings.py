"""Checks that settings classes share. Each raises ``SlimError`` naming the setting as the user
types it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import Any

from slim.core.errors import SlimError, did_you_mean


def require_choice(setting: str, value: Any, allowed: Collection) -> None:
    """Require a setting to have one of the allowed values.

    Args:
        setting: its name as the user types it, such as ``quant.bits``.
        value: what it was set to.
        allowed: the values that it may have.

    Raises:
        SlimError: when it has another one.
    """
    if value not in allowed:
        choices = list(map(str, allowed))
        hint = did_you_mean(str(value), choices)
        raise SlimError(f"{setting}={value}: must be one of {', '.join(choices)}.{hint}")


def require_number(
    setting: str, value: Any, low: float, high: float = float("inf"), integer: bool = False
) -> None:
    """Require a setting to be a number within limits.

    Args:
        setting: its name as the user types it.
        value: what it was set to.
        low: the least that it may be.
        high: the most that it may be.
        integer: whether it must be a whole number.

    Raises:
        SlimError: when it is something else.
    """
    kind = "a number"
    types = (int, float)
    if integer:
        kind = "a whole number"
        types = int
    number = isinstance(value, types) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        limit = f"from {low} to {high}"
        if high == float("inf"):
            limit = f"of at least {low}"
        raise SlimError(f"{setting}={value}: must be {kind} {limit}.")


def require_flag(setting: str, value: Any) -> None:
    """Require a setting to be true or false.

    Args:
        setting: its name as the user types it.
        value: what it was set to.

    Raises:
        SlimError: when it is something else.
    """
    if not isinstance(value, bool):
        raise SlimError(f"{setting}={value}: must be true or false.")


def cache_key(value: Any) -> Any:
    """Reduce settings to plain JSON values that determine a result, for hashing and for the
    manifest.

    An object with its own ``cache_key()`` decides for itself (a text adds its checksum); a
    dataclass gives its fields, without those marked ``field(metadata={"cache_key": False})`` (they
    change speed or looks, not the result).

    Args:
        value: settings, or one of them.

    Raises:
        TypeError: when something in them has no such form, a mistake in the stage's class.
    """
    if hasattr(value, "cache_key"):
        return value.cache_key()
    if dataclasses.is_dataclass(value):
        return dataclass_cache_key(value)
    if isinstance(value, dict):
        return {str(key): cache_key(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cache_key(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a stage's settings")


def dataclass_cache_key(value: Any) -> dict:
    """Return class name and fields of a settings dataclass as plain JSON values (see
    :func:`cache_key`)."""
    key = {"class": cache_name(value)}
    for field in dataclasses.fields(value):
        if field.metadata.get("cache_key", True):
            key[field.name] = cache_key(getattr(value, field.name))
    return key


def cache_name(value: Any) -> str:
    """Return the name under which results record the class of ``value``.

    It is the class's own ``cache_name``, which must never change: a class may be renamed or moved,
    and results that were made before are still found. Classes without one go by their own name, so
    a subclass never takes the results of its base."""
    return vars(type(value)).get("cache_name", type(value).__name__)


def spoken_name(value: Any) -> str:
    """Return what tables call the class of ``value``: its cache name as a file of a group is named,
    such as ``width_activation`` for ``WidthActivation`` and ``sparsegpt`` for ``SparseGPT``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z0-9])", "_", cache_name(value)).lower()

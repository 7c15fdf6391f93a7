"""The protocol of every figure, so that a table can keep figures of different protocols in
different columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slim.checkpoints.store import digest
from slim.evaluation.metrics import metric_of

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

HASH_SHOWN = 6  # digits of a checksum in a heading


def protocol_of(result: Result, metric: str) -> dict:
    """Return what a metric of a checkpoint depends on besides the checkpoint.

    Args:
        result: the checkpoint with what was measured.
        metric: the metric's name.

    Returns:
        The settings of the part that measured it; empty for what the files themselves say.
    """
    quality, speed = result.quality, result.speed
    if metric in speed.get("metrics", {}):
        return speed.get("protocol", {}).get("speed", {})
    if metric not in quality.get("metrics", {}):
        return {}
    protocol = quality.get("protocol", {})
    common = {"dtype": protocol.get("dtype")}
    part = metric_of(metric).part
    if part is not None and part != "tasks":
        return {**common, **protocol.get(part, {})}
    tasks = protocol.get("tasks", {})
    task = metric.rpartition("/")[0]
    # the mean over all tasks depends on all of them
    settings = tasks.get(task) if task in tasks else tasks
    return {**common, **(settings or {}), "lm_eval": tasks.get("lm_eval")}


def protocol_key(result: Result, metric: str) -> str:
    """Return a name for the protocol of a figure; figures compare where it is the same."""
    return digest(protocol_of(result, metric))


def variants(results: list[Result], metric: str) -> dict[str, str]:
    """Return the protocols by which a metric was measured, and how to tell them apart.

    Args:
        results: checkpoints; those without the metric do not matter.
        metric: the metric's name.

    Returns:
        Key of the protocol (see :func:`protocol_key`) -> what is special about it, such as
        ``"dtype bfloat16"``; an empty text where there is one protocol only. In order of
        appearance.
    """
    protocols = {}
    for result in results:
        if metric in result.metrics:
            protocols[protocol_key(result, metric)] = flat(protocol_of(result, metric))
    names: dict[str, set[str]] = {}
    for protocol in protocols.values():
        for name in protocol:
            names.setdefault(name, set())
    for name, values in names.items():
        values.update(str(protocol.get(name)) for protocol in protocols.values())
    differing = [name for name, values in names.items() if len(values) > 1]
    words = {}
    for key, protocol in protocols.items():
        words[key] = ", ".join(f"{name} {_short(protocol.get(name))}" for name in differing)
    return words


def flat(protocol: dict, prefix: str = "") -> dict[str, Any]:
    """Flatten nested protocols to ``{"a.b": value}``."""
    values: dict[str, Any] = {}
    for name, value in protocol.items():
        if isinstance(value, dict):
            values.update(flat(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    is_hash = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:HASH_SHOWN] if is_hash else text[:40]

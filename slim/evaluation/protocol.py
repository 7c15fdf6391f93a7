"""The protocol of every figure, so that a table can keep figures of different protocols in
different columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from slim.checkpoints.store import digest
from slim.evaluation.metrics import metric_of

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

HASH_SHOWN = 6  # digits of a checksum in a heading
LONGEST_SHOWN = 40  # characters of any other value
SHA256 = re.compile(r"[0-9a-f]{64}")


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
    settings = tasks.get(task, tasks)
    return {**common, **(settings or {}), "lm_eval": tasks.get("lm_eval")}


def protocol_key(result: Result, metric: str) -> str:
    """Return a name for the protocol of a figure; figures compare where it is the same.

    Args:
        result: the checkpoint with what was measured.
        metric: the metric's name.
    """
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
    differing = _differing_settings(list(protocols.values()))
    words = {}
    for key, protocol in protocols.items():
        words[key] = ", ".join(f"{name} {_short(protocol.get(name))}" for name in differing)
    return words


def _differing_settings(protocols: list[dict]) -> list[str]:
    """Return the settings that not all protocols share, in order of appearance."""
    names: dict[str, None] = {}
    for protocol in protocols:
        names.update(dict.fromkeys(protocol))
    differing = []
    for name in names:
        # one without the setting differs from those with it
        values = {str(protocol.get(name)) for protocol in protocols}
        if len(values) > 1:
            differing.append(name)
    return differing


def flat(protocol: dict, prefix: str = "") -> dict[str, Any]:
    """Flatten nested protocols.

    Args:
        protocol: whose values may be dictionaries too.
        prefix: what the names begin with.

    Returns:
        ``{"a.b": value}`` for ``{"a": {"b": value}}``.
    """
    values: dict[str, Any] = {}
    for name, value in protocol.items():
        if isinstance(value, dict):
            values.update(flat(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values


def _short(value: Any) -> str:
    if value is None:
        return "-"
    text = str(value)
    if SHA256.fullmatch(text):
        return text[:HASH_SHOWN]
    return text[:LONGEST_SHOWN]

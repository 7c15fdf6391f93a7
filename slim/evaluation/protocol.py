"""The protocol of every figure, so that a table can keep figures of different protocols in
different columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slim.checkpoints.store import digest

if TYPE_CHECKING:
    from slim.checkpoints.result import Result

PARTS = {
    "perplexity": ("perplexity",),
    "documents": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generation": ("repeated_4grams", "repeating_answers"),
    "answers": ("similarity/mean", "similarity/median"),
}
PART_OF = {metric: part for part, metrics in PARTS.items() for metric in metrics}
HASH_SHOWN = 6  # digits of a checksum in a heading


def protocol_of(result: Result, metric: str) -> dict:
    """Return what the figure ``metric`` of a checkpoint depends on besides the checkpoint; empty
    for parameters."""
    quality, speed = result.quality, result.speed
    if metric in speed.get("metrics", {}):
        return speed.get("protocol", {}).get("speed", {})
    if metric not in quality.get("metrics", {}):
        return {}
    protocol = quality.get("protocol", {})
    tasks, common = protocol.get("tasks", {}), {"dtype": protocol.get("dtype")}
    if metric in PART_OF:
        return {**common, **protocol.get(PART_OF[metric], {})}
    task = metric.rpartition("/")[0]
    # the mean over all tasks depends on all of them
    own = tasks.get(task) if task in tasks else tasks
    return {**common, **(own or {}), "lm_eval": tasks.get("lm_eval")}


def protocol_key(result: Result, metric: str) -> str:
    """Return a name for the protocol of a figure; figures compare where it is the same."""
    return digest(protocol_of(result, metric))


def variants(results: list[Result], metric: str) -> dict[str, str]:
    """Return protocol key -> words that tell it from the others (empty where there is one only), in
    order of appearance."""
    protocols = {
        protocol_key(r, metric): flat(protocol_of(r, metric))
        for r in results
        if metric in r.metrics
    }
    names = dict.fromkeys(name for protocol in protocols.values() for name in protocol)
    differing = [
        name
        for name in names
        if len({str(protocol.get(name)) for protocol in protocols.values()}) > 1
    ]
    return {
        key: ", ".join(f"{name} {_short(protocol.get(name))}" for name in differing)
        for key, protocol in protocols.items()
    }


def flat(protocol: dict, prefix: str = "") -> dict[str, Any]:
    """Flatten nested protocols to ``{"a.b": value}``."""
    found: dict[str, Any] = {}
    for name, value in protocol.items():
        found.update(
            flat(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {f"{prefix}{name}": value}
        )
    return found


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    is_hash = len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)
    return text[:HASH_SHOWN] if is_hash else text[:40]

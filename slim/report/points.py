"""The distinct checkpoints of all runs, each with the chain that leads to it and a name that tells
it from the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from slim.evaluation.protocol import flat
from slim.report.runs import SOURCES, Chain, Row

# settings a name always states
ALWAYS = ("bits", "group_size", "average_bits", "blocks", "ratio", "sparsity", "r")
# what identifies texts and code, and says nothing to a reader
HIDDEN = ("class", "sha256", "generator")
LONGEST = 40  # characters of a setting's value in a name


@dataclass(frozen=True)
class Point:
    """A checkpoint in the report. role: ``source``, ``step`` on the way to another, or
    ``final``."""

    row: Row
    chain: tuple[Row, ...]  # from the source to this checkpoint
    name: str
    role: str
    typed: str

    @property
    def source(self) -> Row:
        return self.chain[0]


def points_of(chains: list[Chain]) -> list[Point]:
    """Return every checkpoint once, sources first, in the order in which the runs made them."""
    finals = {_key(chain.final) for chain in chains}
    varying = varying_settings(row for chain in chains for row in chain.rows)
    found: dict[tuple, Point] = {}
    for chain in chains:
        for length, row in enumerate(chain.rows, 1):
            path = chain.rows[:length]
            source = length == 1 and row.kind in SOURCES
            role = "source" if source else "final" if _key(row) in finals else "step"
            found.setdefault(
                _key(row), Point(row, path, chain_name(path, varying), role, chain.typed)
            )
    return sorted(_told_apart(list(found.values())), key=lambda point: point.role != "source")


def _key(row: Row) -> tuple[str, str]:
    return row.digest, row.protocol_digest


def _told_apart(points: list[Point]) -> list[Point]:
    """Add the hash to names that different checkpoints share."""
    owners = defaultdict(set)
    for point in points:
        owners[point.name].add(point.row.digest)
    return [
        Point(p.row, p.chain, f"{p.name} [{p.row.digest[:6]}]", p.role, p.typed)
        if len(owners[p.name]) > 1
        else p
        for p in points
    ]


def varying_settings(rows: Iterable[Row]) -> dict[tuple[str, str | None], set[str]]:
    """Return (kind, method) -> the settings that are not the same in all its checkpoints."""
    values: dict[tuple, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    distinct = {row.digest: row for row in rows}
    for row in distinct.values():
        for name, value in plain_settings(row).items():
            values[row.kind, row.method][name].add(str(value))
    return {
        stage: {name for name, found in names.items() if len(found) > 1}
        for stage, names in values.items()
    }


def plain_settings(row: Row) -> dict[str, Any]:
    """Return the settings of a stage as ``{"a.b": value}``, without those that only identify texts
    and code."""
    return {
        name: value
        for name, value in flat(row.settings).items()
        if name.rpartition(".")[2] not in HIDDEN
    }


def chain_name(chain: tuple[Row, ...], varying: dict | None = None) -> str:
    """Return such as ``tiny → taylor blocks 1 → gptq bits 3, group_size 64``."""
    return " → ".join(
        step_name(row, (varying or {}).get((row.kind, row.method), set())) for row in chain
    )


def step_name(row: Row, varying: Iterable[str] = ()) -> str:
    """Return the name of one step: its method, the settings that matter most, and those that differ
    between runs."""
    if row.kind in SOURCES:
        return row.label
    settings = plain_settings(row)
    stated = [
        name
        for name in settings
        if name in varying or (name in ALWAYS and settings[name] is not None)
    ]
    method = (row.method or row.label).lower()
    name = f"{row.kind} {method}" if row.kind == "distill" else method
    return " ".join(
        [name, ", ".join(f"{key} {str(settings[key])[:LONGEST]}" for key in stated)]
    ).strip()


def settings_lines(chain: tuple[Row, ...]) -> list[str]:
    """Return one line per step with all its settings that are set."""
    lines = []
    for row in chain:
        stated = {
            name: value
            for name, value in plain_settings(row).items()
            if value not in (None, {}, [])
        }
        lines.append(
            f"{row.label}: "
            + ", ".join(f"{name} {str(value)[:LONGEST]}" for name, value in stated.items())
        )
    return lines

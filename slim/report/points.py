"""The distinct checkpoints of all runs, each with the chain that leads to it and a name that tells
it from the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
    """A checkpoint in the report.

    Attributes:
        row: what was recorded of it.
        chain: from the source to this checkpoint.
        name: what tables and pictures call it.
        role: ``source``, ``step`` on the way to another, or ``final``.
        typed: the overrides of the first run that made it.
    """

    row: Row
    chain: tuple[Row, ...]
    name: str
    role: str
    typed: str

    @property
    def source(self) -> Row:
        return self.chain[0]


def points_of(chains: list[Chain]) -> list[Point]:
    """Return every checkpoint once, sources first, in the order in which the runs made them.

    Args:
        chains: of all runs; a checkpoint may be in many.
    """
    finals = {_key(chain.final) for chain in chains}
    rows = []
    for chain in chains:
        rows += chain.rows
    varying = varying_settings(rows)
    points: dict[tuple, Point] = {}
    for chain in chains:
        for length, row in enumerate(chain.rows, 1):
            # runs share the steps that they begin with
            if _key(row) in points:
                continue
            role = "final" if _key(row) in finals else "step"
            if length == 1 and row.kind in SOURCES:
                role = "source"
            path = chain.rows[:length]
            name = chain_name(path, varying)
            points[_key(row)] = Point(row, path, name, role, chain.typed)
    return sorted(_told_apart(list(points.values())), key=lambda point: point.role != "source")


def rows_of(points: list[Point]) -> list[Row]:
    """Return what was recorded of every checkpoint, in their order."""
    return [point.row for point in points]


def _key(row: Row) -> tuple[str, str]:
    return row.digest, row.protocol_digest


def _told_apart(points: list[Point]) -> list[Point]:
    """Add the hash to names that different checkpoints share."""
    # names state only some of the settings, and files may differ that no setting names
    owners = defaultdict(set)
    for point in points:
        owners[point.name].add(point.row.digest)
    named = []
    for point in points:
        if len(owners[point.name]) > 1:
            point = replace(point, name=f"{point.name} [{point.row.digest[:6]}]")
        named.append(point)
    return named


def varying_settings(rows: Iterable[Row]) -> dict[tuple[str, str | None], set[str]]:
    """Return (kind, method) -> the settings that are not the same in all its checkpoints."""
    values: dict[tuple, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    # many chains hold the same checkpoint
    distinct = {row.digest: row for row in rows}
    for row in distinct.values():
        for name, value in plain_settings(row).items():
            # as text: a setting may be a list, which no set can hold
            values[row.kind, row.method][name].add(str(value))
    varying: dict[tuple, set[str]] = {}
    for stage, settings in values.items():
        varying[stage] = set()
        for name, taken in settings.items():
            if len(taken) > 1:
                varying[stage].add(name)
    return varying


def plain_settings(row: Row) -> dict[str, Any]:
    """Return the settings of a stage as ``{"a.b": value}``, without those that only identify texts
    and code."""
    settings = {}
    for name, value in flat(row.settings).items():
        if name.rpartition(".")[2] not in HIDDEN:
            settings[name] = value
    return settings


def chain_name(chain: tuple[Row, ...], varying: dict | None = None) -> str:
    """Return such as ``tiny → taylor blocks 1 → gptq bits 3, group_size 64``.

    Args:
        chain: the steps, source first.
        varying: (kind, method) -> settings that differ between runs (:func:`varying_settings`).
    """
    differing = varying or {}
    names = []
    for row in chain:
        names.append(step_name(row, differing.get((row.kind, row.method), ())))
    return " → ".join(names)


def step_name(row: Row, varying: Iterable[str] = ()) -> str:
    """Return the name of one step: its method, the settings that matter most, and those that differ
    between runs.

    Args:
        row: the checkpoint that the step made.
        varying: names of settings that differ between runs.
    """
    if row.kind in SOURCES:
        return row.label
    stated = []
    for name, value in plain_settings(row).items():
        if name in varying or (name in ALWAYS and value is not None):
            stated.append(f"{name} {str(value)[:LONGEST]}")
    method = (row.method or row.label).lower()
    if row.kind == "distill":
        method = f"{row.kind} {method}"
    return f"{method} {', '.join(stated)}".strip()


def settings_lines(chain: tuple[Row, ...]) -> list[str]:
    """Return one line per step with all its settings that are set."""
    lines = []
    for row in chain:
        stated = []
        for name, value in plain_settings(row).items():
            if value not in (None, {}, []):
                stated.append(f"{name} {str(value)[:LONGEST]}")
        lines.append(f"{row.label}: {', '.join(stated)}")
    return lines

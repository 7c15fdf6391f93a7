"""The model card: README.md of a chain's final checkpoint, with its chain, settings, figures, and
how to load it.

It says nothing that the manifests and the measurements do not: the same command writes the same
card. It is no part of what names or checks a checkpoint, and a source never gets one."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from slim.core.io import PARTIAL, atomic_path
from slim.models.heterogeneous import CARD
from slim.report.runs import SOURCES, without_places

if TYPE_CHECKING:
    from slim.checkpoints.checkpoint import Checkpoint
    from slim.checkpoints.result import Result
    from slim.report.points import Point

UNKNOWN = "unknown"
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
TAGS = {"prune": "pruned", "quantize": "quantized", "tune": "fine-tuned", "distill": "distilled"}
SLIM = """from slim.checkpoints.tokenizer import load_tokenizer
from slim.loading.load_model import load_model

model = load_model("FOLDER")
tokenizer = load_tokenizer("FOLDER")"""
PROMPT, ANSWER = 200, 300  # characters shown


def write_card(results: list[Result], typed: list[str], script: str = "compress.py") -> Path | None:
    """Write README.md into the folder of the last result, whole or not at all, and return its path.

    results: a chain's checkpoints, source first. typed: the overrides of the command. script: the
    command's file. None, and nothing is written, where the last checkpoint is a source: what was
    not made here is not touched."""
    from slim.report.chain_plot import chain_points

    points = chain_points(results)
    if points[-1].row.kind == "source":
        return None
    path = results[-1].checkpoint.folder / CARD
    text = card(
        points,
        results[-1].checkpoint.config,
        source_facts(results[0].checkpoint),
        command(typed, script),
    )
    # outside the result, and a name of this process's own: others may write the same card
    partial = path.parent.with_name(f".{path.parent.name}.{os.getpid()}{PARTIAL}")
    with atomic_path(path, partial):
        partial.write_text(text, encoding="utf-8")
    return path


def command(typed: list[str], script: str) -> str:
    """Return the command that made the checkpoint, without what only says where results and records
    go."""
    return shlex.join(["python", script, *without_places(typed)])


def source_facts(source: Checkpoint) -> dict:
    """Return ``license`` and, where its own card names one, ``base_model`` of the source."""
    from slim.checkpoints.source import ASSETS

    if source.folder.resolve().is_relative_to(ASSETS.resolve()):
        return {"license": "apache-2.0"}  # the embedded model is part of slim
    facts = front_matter(source.folder / CARD)
    named = {
        key: facts[key]
        for key in ("license", "license_name", "license_link", "base_model")
        if facts.get(key)
    }
    return {"license": UNKNOWN, **named}


def front_matter(path: Path) -> dict:
    """Return the YAML at the head of a model card; empty if there is none or it cannot be read."""
    import yaml

    try:
        found = FRONT_MATTER.match(path.read_text(encoding="utf-8"))
        facts = yaml.safe_load(found.group(1)) if found else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return facts if isinstance(facts, dict) else {}


def card(points: list[Point], config: dict, source: dict, made_by: str) -> str:
    """Return the text of the card. config: ``config.json`` of the final checkpoint. source: from
    :func:`source_facts`."""
    from slim.report.points import chain_name

    lines = [*_head(points, source), f"# {chain_name(points[-1].chain)}", ""]
    lines += [_summary(points), "", "## How it was made", "", *_chain(points), ""]
    lines += ["The command:", "", *_code(made_by, "sh"), ""]
    lines += [*_results(points), *_load(config), *_samples(points), *_licence(points, source)]
    return "\n".join(lines).rstrip() + "\n"


def _head(points: list[Point], source: dict) -> list[str]:
    """Return the front matter that the hub reads. A base model is named only if it has a name
    there."""
    import yaml

    from slim.checkpoints.source import HUB_ID

    label = points[0].row.label
    base = label if HUB_ID.fullmatch(label) else source.get("base_model")
    made = [point.row for point in points if point.row.kind not in SOURCES]
    methods = [row.method.lower() for row in made if row.method]
    tags = dict.fromkeys(["slim", *(TAGS[row.kind] for row in made if row.kind in TAGS), *methods])
    licence = {
        key: source[key] for key in ("license", "license_name", "license_link") if key in source
    }
    head = {
        **({"base_model": base} if base else {}),
        **licence,
        "library_name": "transformers",
        "tags": list(tags),
    }
    return [
        "---",
        yaml.safe_dump({**head, "pipeline_tag": "text-generation"}, sort_keys=False).rstrip(),
        "---",
        "",
    ]


def _summary(points: list[Point]) -> str:
    first, last = points[0].row, points[-1].row
    if first is last:
        return f"A model of {last.metrics['parameters']:,} parameters."
    share = last.metrics["bytes_on_disk"] / first.metrics["bytes_on_disk"]
    return (
        f"`{first.label}` made smaller: {last.metrics['parameters']:,} of "
        f"{first.metrics['parameters']:,} parameters, "
        f"{last.metrics['bytes_on_disk'] / 1e6:,.2f} of "
        f"{first.metrics['bytes_on_disk'] / 1e6:,.2f} MB ({100 * share:.0f} %)."
    )


def _chain(points: list[Point]) -> list[str]:
    """Return the steps with all their settings and the hash that names each result."""
    from slim.report.markdown import plain
    from slim.report.points import plain_settings

    lines = []
    for number, point in enumerate(points, 1):
        settings = {
            name: value
            for name, value in plain_settings(point.row).items()
            if value not in (None, {}, [])
        }
        stated = ", ".join(f"{name} {str(value)[:PROMPT]}" for name, value in settings.items())
        lines.append(
            f"{number}. **{plain(point.row.label)}** (`{point.row.digest}`): {plain(stated)}"
        )
    return lines


def _results(points: list[Point]) -> list[str]:
    """Return the table of all checkpoints with standard errors, and the protocols they were
    measured by."""
    from slim.core.text import markdown_lines
    from slim.evaluation.protocol import flat
    from slim.report.markdown import plain
    from slim.report.sections import models_table

    table = models_table(points)
    keep = [index for index, heading in enumerate(table.headings) if heading != "what it is"]
    rows = [[plain(row[index].text) for index in keep] for row in table.rows]
    lines = [
        "## Results",
        "",
        "Every row is the row above it after one more step. ± is one standard error.",
        "",
    ]
    lines += [*markdown_lines([plain(table.headings[index]) for index in keep], rows), ""]
    for name in ("quality", "speed"):
        said = dict.fromkeys(
            json.dumps(getattr(point.row, name)["protocol"], sort_keys=True) for point in points
        )
        for text in said:
            facts = {
                key: value
                for key, value in flat(json.loads(text)).items()
                if not key.endswith(".host")
            }
            stated = ", ".join(f"{key} {shortened(value)}" for key, value in facts.items())
            lines += [f"- {name}: {plain(stated)}"] if stated else []
    return [*lines, ""]


def shortened(value) -> str:
    """Return a value of a protocol as text; of a checksum the first digits."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _load(config: dict) -> list[str]:
    from slim.report.loading import loading

    how = loading(config)
    lines = [
        "## How to load it",
        "",
        "`FOLDER` is the folder of this file. With slim, whatever the format:",
        "",
    ]
    lines += _code(SLIM)
    lines += ["", f"**transformers**: {how.transformers}", ""]
    lines += [*_code(how.code), ""] if how.code else []
    return [*lines, f"**vLLM**: {how.vllm}", ""]


def _samples(points: list[Point]) -> list[str]:
    """Return what the first and the last checkpoint answer, long prompts cut."""
    from slim.report.markdown import plain
    from slim.report.sections import answers

    ends = [points[0], points[-1]] if len(points) > 1 else points
    lines = []
    for one in answers(ends):
        lines += [
            f"**{plain(one.prompt[:PROMPT])}**{' ...' if len(one.prompt) > PROMPT else ''}",
            "",
        ]
        lines += [
            *(f"- {plain(name)}: {plain(answer.strip()[:ANSWER])}" for name, answer in one.answers),
            "",
        ]
    return (
        ["## What it says", "", "Greedy answers; an impression and no measure.", "", *lines]
        if lines
        else []
    )


def _licence(points: list[Point], source: dict) -> list[str]:
    if points[0].row.kind not in SOURCES:
        return ["## Licence", "", "There is no base model: the weights began at random."]
    licence = "unknown: see the base model" if source["license"] == UNKNOWN else source["license"]
    said = (
        f"Base model: `{points[0].row.label}`. Its licence: {licence}. What is made from a model "
        "is under its licence too."
    )
    return ["## Licence and base model", "", said]


def _code(text: str, language: str = "python") -> list[str]:
    return [f"```{language}", *text.splitlines(), "```"]

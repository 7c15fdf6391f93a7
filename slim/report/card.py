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

from slim.checkpoints.source import ASSETS, HUB_ID
from slim.core.io import PARTIAL, atomic_path
from slim.core.text import markdown_lines
from slim.evaluation.protocol import flat
from slim.models.heterogeneous import CARD
from slim.report.chain_plot import chain_points
from slim.report.loading import loading
from slim.report.markdown import plain
from slim.report.points import chain_name, plain_settings
from slim.report.runs import SOURCES, without_places
from slim.report.sections import answers, models_table

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
LICENCE_KEYS = ("license", "license_name", "license_link")  # as the hub spells them
PROMPT, ANSWER = 200, 300  # characters shown


def write_card(results: list[Result], typed: list[str], script: str = "compress.py") -> Path | None:
    """Write README.md into the folder of the last result, complete or not at all.

    Args:
        results: a chain's checkpoints, source first.
        typed: the overrides of the command.
        script: file name of the command.

    Returns:
        The path of the card; None, and nothing is written, where the last checkpoint is a source:
        what was not made here is not touched.
    """
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
    """Return the command that made the checkpoint, without what only says where results go.

    Args:
        typed: the overrides as typed.
        script: file name of the command.
    """
    return shlex.join(["python", script, *without_places(typed)])


def source_facts(source: Checkpoint) -> dict:
    """Return ``license`` and, where its own card names one, ``base_model`` of the source."""
    if source.folder.resolve().is_relative_to(ASSETS.resolve()):
        # the embedded model is part of slim
        return {"license": "apache-2.0"}
    metadata = front_matter(source.folder / CARD)
    stated = {"license": UNKNOWN}
    for key in (*LICENCE_KEYS, "base_model"):
        if metadata.get(key):
            stated[key] = metadata[key]
    return stated


def front_matter(path: Path) -> dict:
    """Return the YAML at the head of a model card; empty if there is none or it cannot be read."""
    import yaml

    try:
        match = FRONT_MATTER.match(path.read_text(encoding="utf-8"))
        if match is None:
            return {}
        metadata = yaml.safe_load(match.group(1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    # YAML may also hold a list or a single word; neither has the keys of a model card
    if not isinstance(metadata, dict):
        return {}
    return metadata


def card(points: list[Point], config: dict, source: dict, made_by: str) -> str:
    """Return the text of the card.

    Args:
        points: the checkpoints of the chain, source first.
        config: ``config.json`` of the final checkpoint.
        source: what is known of the source (:func:`source_facts`).
        made_by: the command that made the final checkpoint.
    """
    lines = _head(points, source)
    lines += [f"# {chain_name(points[-1].chain)}", ""]
    lines += [_summary(points), "", "## How it was made", ""]
    lines += _chain(points)
    lines += ["", "The command:", ""]
    lines += _code(made_by, "sh")
    lines.append("")
    for section in (_results(points), _load(config), _samples(points), _licence(points, source)):
        lines += section
    return "\n".join(lines).rstrip() + "\n"


def _head(points: list[Point], source: dict) -> list[str]:
    """Return the front matter that the hub reads."""
    import yaml

    head = {}
    base = _base_model(points[0].row.label, source)
    if base:
        head["base_model"] = base
    for key in LICENCE_KEYS:
        if key in source:
            head[key] = source[key]
    head["library_name"] = "transformers"
    head["tags"] = _tags(points)
    head["pipeline_tag"] = "text-generation"
    return ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", ""]


def _base_model(label: str, source: dict) -> str | None:
    """Return the base model's name on the hub; a folder's or a file's name is none."""
    if HUB_ID.fullmatch(label):
        return label
    return source.get("base_model")


def _tags(points: list[Point]) -> list[str]:
    """Return the hub's tags: slim, then what was done, then by which methods, each once."""
    kinds, methods = [], []
    for point in points:
        row = point.row
        if row.kind in SOURCES:
            continue
        if row.kind in TAGS:
            kinds.append(TAGS[row.kind])
        if row.method:
            methods.append(row.method.lower())
    return list(dict.fromkeys(["slim"] + kinds + methods))


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
    lines = []
    for number, point in enumerate(points, 1):
        stated = []
        for name, value in plain_settings(point.row).items():
            # a setting that was left empty says nothing about the result
            if value not in (None, {}, []):
                stated.append(f"{name} {str(value)[:PROMPT]}")
        label, settings = plain(point.row.label), plain(", ".join(stated))
        lines.append(f"{number}. **{label}** (`{point.row.digest}`): {settings}")
    return lines


def _results(points: list[Point]) -> list[str]:
    """Return the table of all checkpoints with standard errors, and their protocols."""
    lines = [
        "## Results",
        "",
        "Every row is the row above it after one more step. ± is one standard error.",
        "",
    ]
    table = models_table(points)
    # the rows of a chain are all steps of it: what each one is goes without saying
    kept = [index for index, heading in enumerate(table.headings) if heading != "what it is"]
    headings = [plain(table.headings[index]) for index in kept]
    rows = []
    for row in table.rows:
        rows.append([plain(row[index].text) for index in kept])
    lines += markdown_lines(headings, rows)
    lines.append("")
    for part in ("quality", "speed"):
        lines += _protocol_lines(part, points)
    lines.append("")
    return lines


def _protocol_lines(part: str, points: list[Point]) -> list[str]:
    """Return one line per protocol of a part; where all rows share a protocol that is one."""
    protocols = {}
    for point in points:
        protocol = getattr(point.row, part)["protocol"]
        protocols.setdefault(json.dumps(protocol, sort_keys=True), None)
    lines = []
    for text in protocols:
        stated = []
        for key, value in flat(json.loads(text)).items():
            # the name of a private machine is nobody's business
            if not key.endswith(".host"):
                stated.append(f"{key} {shortened(value)}")
        if stated:
            lines.append(f"- {part}: {plain(', '.join(stated))}")
    return lines


def shortened(value) -> str:
    """Return a value of a protocol as text; of a checksum the first digits."""
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text


def _load(config: dict) -> list[str]:
    how = loading(config)
    lines = [
        "## How to load it",
        "",
        "`FOLDER` is the folder of this file. With slim, whatever the format:",
        "",
    ]
    lines += _code(SLIM)
    lines += ["", f"**transformers**: {how.transformers}", ""]
    if how.code:
        lines += _code(how.code)
        lines.append("")
    lines += [f"**vLLM**: {how.vllm}", "", f"**llama.cpp**: {how.llama_cpp}", ""]
    lines += ["Other engines, such as TGI and SGLang, were not tried.", ""]
    return lines


def _samples(points: list[Point]) -> list[str]:
    """Return what the first and the last checkpoint answer, long prompts cut."""
    ends = points[:1]
    if len(points) > 1:
        ends = [points[0], points[-1]]
    lines = []
    for question in answers(ends):
        prompt = plain(question.prompt[:PROMPT])
        ellipsis = " ..." if len(question.prompt) > PROMPT else ""
        lines += [f"**{prompt}**{ellipsis}", ""]
        for name, answer in question.answers:
            lines.append(f"- {plain(name)}: {plain(answer.strip()[:ANSWER])}")
        lines.append("")
    if not lines:
        return []
    return ["## What it says", "", "Greedy answers; an impression and no measure.", ""] + lines


def _licence(points: list[Point], source: dict) -> list[str]:
    if points[0].row.kind not in SOURCES:
        return ["## Licence", "", "There is no base model: the weights began at random."]
    licence = source["license"]
    if licence == UNKNOWN:
        licence = "unknown: see the base model"
    sentence = (
        f"Base model: `{points[0].row.label}`. Its licence: {licence}. What is made from a model "
        "is under its licence too."
    )
    return ["## Licence and base model", "", sentence]


def _code(text: str, language: str = "python") -> list[str]:
    return [f"```{language}", *text.splitlines(), "```"]

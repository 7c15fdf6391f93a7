"""Comparisons for people: differences, answers question by question, verdicts with their reasons,
as Markdown and on screen."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from slim.core.tables import Table
from slim.core.text import markdown_lines
from slim.evaluation.compare import tally
from slim.evaluation.health import REPEATING
from slim.evaluation.metrics import metric_of
from slim.report.table import numbered

if TYPE_CHECKING:
    from slim.checkpoints.result import Result
    from slim.evaluation.compare import Comparison
    from slim.evaluation.differences import Difference


def comparison_files(comparison: Comparison, results: list[Result]) -> dict[str, str]:
    """Return what is worth keeping of a comparison.

    Args:
        comparison: of the checkpoints.
        results: the checkpoints, the one that all are compared with first.

    Returns:
        File name -> text: ``differences.md``, ``answers.md``, ``judge.md`` and ``judge.json``, as
        far as there is anything in them.
    """
    files = {}
    if any(comparison.differences.values()):
        files["differences.md"] = differences_text(comparison, results[0].label)
    if results and results[0].quality.get("records", {}).get("answers"):
        files["answers.md"] = answers_text(results)
    if comparison.judged:
        files["judge.md"] = judge_text(comparison, results[0].label)
        files["judge.json"] = json.dumps(comparison.judged, indent=1) + "\n"
    return files


def difference_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of the table of differences, a row per checkpoint; a metric
    without a pair is a dash."""
    metrics = compared_metrics(comparison)
    rows = []
    for label, differences in comparison.differences.items():
        rows.append([label, *(_difference(differences, name) for name in metrics)])
    return ["checkpoint", *metrics], rows


def compared_metrics(comparison: Comparison) -> list[str]:
    """Return the names of all metrics that any checkpoint has a difference in."""
    names: dict[str, None] = {}
    for differences in comparison.differences.values():
        names.update(dict.fromkeys(sorted(differences)))
    return list(names)


def _difference(differences: dict[str, Difference], name: str) -> str:
    return differences[name].text() if name in differences else "-"


def differences_text(comparison: Comparison, baseline: str) -> str:
    """Return the differences as Markdown."""
    headings, rows = difference_rows(comparison)
    lines = [
        f"Differences to {baseline}, over the same questions, with standard errors; "
        "shares in points of a hundred.",
        "",
        *markdown_lines(headings, rows),
    ]
    return "\n".join(lines) + "\n"


def differences_table(comparison: Comparison, baseline: str) -> Table:
    """Return the differences for the terminal: a row per metric, a column per checkpoint."""
    headings, legend = numbered(list(comparison.differences))
    rows = []
    for name in compared_metrics(comparison):
        metric = metric_of(name)
        row = [metric.short or metric.title]
        for differences in comparison.differences.values():
            row.append(_difference(differences, name))
        rows.append(row)
    title = f"Differences to {baseline}, question by question, ± standard error"
    return Table(["", *headings], rows, title=title, notes=legend)


def answers_text(results: list[Result]) -> str:
    """Return every checkpoint's answers, question by question, as Markdown."""
    answers = [(result.label, result.quality["records"]["answers"]) for result in results]
    lines = []
    for index, row in enumerate(answers[0][1]):
        lines += [f"## {row['question']}", "", f"- *reference*: {row['reference']!r}"]
        for label, rows in answers:
            near = f" ({rows[index]['similarity']:.2f})" if "similarity" in rows[index] else ""
            lines.append(f"- **{label}**{near}: {rows[index]['answer']!r}")
        lines.append("")
    return "\n".join(lines)


def judge_text(comparison: Comparison, baseline: str) -> str:
    """Return a judge's counts and reasons as Markdown."""
    counts = [
        [label, *(str(count) for count in tally(rows).values())]
        for label, rows in comparison.judged.items()
    ]
    headings = ["checkpoint", "wins", "ties", "losses", "unread"]
    lines = [f"Verdicts against {baseline}", "", *markdown_lines(headings, counts)]
    for label, rows in comparison.judged.items():
        for row in rows:
            winner = {"one": baseline, "other": label, "tie": "tie", None: "no verdict"}[
                row["winner"]
            ]
            lines += ["", f"## {row['question']}", "", f"- *reference*: {row['reference']!r}"]
            lines += [
                f"- **{baseline}**: {row['answers']['one']!r}",
                f"- **{label}**: {row['answers']['other']!r}",
            ]
            lines.append(f"- winner: {winner}")
            lines += [f"  - {' '.join(opinion['reason'].split())}" for opinion in row["opinions"]]
    return "\n".join(lines) + "\n"


def notes(results: list[Result], comparison: Comparison) -> list[str]:
    """Return what a table cannot show: where NaN starts, who repeats itself, who wins."""
    found = []
    for result in results:
        broken = result.quality.get("health", {})
        if "non_finite" in broken:
            found.append(_where(result.label, broken["non_finite"]))
        share = result.quality.get("metrics", {}).get("repeated_4grams", 0.0)
        if share > REPEATING:
            found.append(
                f"{result.label}: repeats itself; {100 * share:.0f} % of the 4-grams in its "
                "answers are repeated."
            )
    for label, rows in comparison.judged.items():
        count = tally(rows)
        unread = f", {count['unread']} without a verdict" if count["unread"] else ""
        found.append(
            f"{label}: judged better {count['wins']}, equal {count['ties']}, worse "
            f"{count['losses']} times{unread}."
        )
    for label, count in comparison.similar.items():
        shown = "nearer to the reference {wins}, equal {ties}, further {losses} times".format(
            **count
        )
        found.append(f"{label}: {shown}.")
    return found


def _where(label: str, place: dict | None) -> str:
    if place is None:
        return f"{label}: NaN or infinity in its figures; a plain forward pass shows none."
    said = {"nan": "NaN", "inf": "infinity"}[place["value"]]
    return f"{label}: {said} starts in {place['module']} (its {place['cause']})."

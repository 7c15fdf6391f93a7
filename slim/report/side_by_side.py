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
    # checkpoints that share no question have no differences
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
        row = [label]
        for name in metrics:
            row.append(_difference(differences, name))
        rows.append(row)
    return ["checkpoint"] + metrics, rows


def compared_metrics(comparison: Comparison) -> list[str]:
    """Return the names of all metrics that any checkpoint has a difference in."""
    names: dict[str, None] = {}
    for differences in comparison.differences.values():
        names.update(dict.fromkeys(sorted(differences)))
    return list(names)


def _difference(differences: dict[str, Difference], name: str) -> str:
    if name not in differences:
        return "-"
    return differences[name].text()


def differences_text(comparison: Comparison, baseline: str) -> str:
    """Return the differences as Markdown.

    Args:
        comparison: of the checkpoints.
        baseline: name of the one that all are compared with.
    """
    headings, rows = difference_rows(comparison)
    lines = [
        f"Differences to {baseline}, over the same questions, with standard errors; "
        "shares in points of a hundred.",
        "",
        *markdown_lines(headings, rows),
    ]
    return "\n".join(lines) + "\n"


def differences_table(comparison: Comparison, baseline: str) -> Table:
    """Return the differences for the terminal: a row per metric, a column per checkpoint.

    Args:
        comparison: of the checkpoints.
        baseline: name of the one that all are compared with.
    """
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
            answer = rows[index]
            near = ""
            # to the reference; measured only where the evaluation was asked for it
            if "similarity" in answer:
                near = f" ({answer['similarity']:.2f})"
            lines.append(f"- **{label}**{near}: {answer['answer']!r}")
        lines.append("")
    return "\n".join(lines)


def judge_text(comparison: Comparison, baseline: str) -> str:
    """Return a judge's counts and reasons as Markdown.

    Args:
        comparison: of the checkpoints.
        baseline: name of the one that all are compared with.
    """
    counts = []
    for label, rows in comparison.judged.items():
        counts.append([label, *map(str, tally(rows).values())])
    headings = ["checkpoint", "wins", "ties", "losses", "unread"]
    lines = [f"Verdicts against {baseline}", ""]
    lines += markdown_lines(headings, counts)
    for label, rows in comparison.judged.items():
        # by what the judge's record calls them
        winners = {"one": baseline, "other": label, "tie": "tie", None: "no verdict"}
        for row in rows:
            lines += ["", f"## {row['question']}", ""]
            lines += [
                f"- *reference*: {row['reference']!r}",
                f"- **{baseline}**: {row['answers']['one']!r}",
                f"- **{label}**: {row['answers']['other']!r}",
                f"- winner: {winners[row['winner']]}",
            ]
            for opinion in row["opinions"]:
                # a reason of several lines would end the list
                lines.append(f"  - {' '.join(opinion['reason'].split())}")
    return "\n".join(lines) + "\n"


def notes(results: list[Result], comparison: Comparison) -> list[str]:
    """Return what a table cannot show: where NaN starts, who repeats itself, who wins.

    Args:
        results: the checkpoints.
        comparison: of them.
    """
    sentences = []
    for result in results:
        sentences += _health(result)
    for label, rows in comparison.judged.items():
        count = tally(rows)
        unread = ""
        if count["unread"]:
            unread = f", {count['unread']} without a verdict"
        sentences.append(
            f"{label}: judged better {count['wins']}, equal {count['ties']}, worse "
            f"{count['losses']} times{unread}."
        )
    for label, count in comparison.similar.items():
        sentences.append(
            f"{label}: nearer to the reference {count['wins']}, equal {count['ties']}, further "
            f"{count['losses']} times."
        )
    return sentences


def _health(result: Result) -> list[str]:
    """Say where NaN starts in a checkpoint, and whether it repeats itself."""
    sentences = []
    health = result.quality.get("health", {})
    if "non_finite" in health:
        sentences.append(_where(result.label, health["non_finite"]))
    share = result.quality.get("metrics", {}).get("repeated_4grams", 0.0)
    if share > REPEATING:
        sentences.append(
            f"{result.label}: repeats itself; {100 * share:.0f} % of the 4-grams in its answers "
            "are repeated."
        )
    return sentences


def _where(label: str, place: dict | None) -> str:
    if place is None:
        return f"{label}: NaN or infinity in its figures; a plain forward pass shows none."
    value = {"nan": "NaN", "inf": "infinity"}[place["value"]]
    return f"{label}: {value} starts in {place['module']} (its {place['cause']})."

"""The report as Markdown: the same tables without pictures, for a pull request or a paper's
notes."""

from __future__ import annotations

from slim.core.text import markdown_lines
from slim.report.published import MARK, Published
from slim.report.sections import Sections, Table

LONGEST = 300  # characters of an answer


def markdown(report: Sections) -> str:
    """Return the tables of a report as Markdown."""
    lines = [f"# {plain(report.title)}", "", plain(report.summary), ""]
    lines += [line for note in report.notes for line in (plain(note), "")]
    parts = (
        ("The best model for your memory", report.best),
        ("All models", report.models),
        ("Runs without results", report.failures),
    )
    for heading, table in parts:
        if table is not None:
            lines += [f"## {heading}", "", *table_lines(table), ""]
    for one in report.answers:
        lines += [f"## Answers to: {plain(one.prompt)}", ""]
        lines += [
            f"- **{plain(name)}**: {plain(answer.strip()[:LONGEST])}"
            for name, answer in one.answers
        ] + [""]
    for table in report.published:
        lines += published_lines(table)
    return "\n".join(lines).rstrip() + "\n"


def table_lines(table: Table) -> list[str]:
    """Return a table with the sentence above it."""
    return [
        plain(table.sentence),
        "",
        *_lines(table.headings, [[cell.text for cell in row] for row in table.rows]),
    ]


def published_lines(table: Published) -> list[str]:
    """Return a published table, marked as such, and ours after it."""
    lines = [f"## {plain(table.title)} ({MARK})", "", f"From {plain(table.source)}.", ""]
    lines += [*(f"- {plain(note)}" for note in table.notes), ""] if table.notes else []
    lines += [*_lines(table.headings, table.rows), ""]
    if not table.own_rows:
        return [*lines, "The runs of this report measured none of these.", ""]
    return [
        *lines,
        "The same measures in this report's runs:",
        "",
        *_lines(table.own_headings, table.own_rows),
        "",
    ]


def _lines(headings: list[str], rows: list[list[str]]) -> list[str]:
    return markdown_lines(
        [plain(text) for text in headings], [[plain(text) for text in row] for row in rows]
    )


def plain(text: str) -> str:
    """Keep a text from being read as Markdown's table or HTML."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())

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
    for note in report.notes:
        lines += [plain(note), ""]
    parts = (
        ("The best model for your memory", report.best),
        ("All models", report.models),
        ("Runs without results", report.failures),
    )
    for heading, table in parts:
        if table is not None:
            lines += [f"## {heading}", ""]
            lines += table_lines(table)
            lines.append("")
    for question in report.answers:
        lines += [f"## Answers to: {plain(question.prompt)}", ""]
        for name, answer in question.answers:
            lines.append(f"- **{plain(name)}**: {plain(answer.strip()[:LONGEST])}")
        lines.append("")
    for table in report.published:
        lines += published_lines(table)
    return "\n".join(lines).rstrip() + "\n"


def table_lines(table: Table) -> list[str]:
    """Return a table with the sentence above it."""
    rows = []
    for row in table.rows:
        rows.append([cell.text for cell in row])
    return [plain(table.sentence), ""] + _lines(table.headings, rows)


def published_lines(table: Published) -> list[str]:
    """Return a published table, marked as such, and ours after it."""
    lines = [f"## {plain(table.title)} ({MARK})", "", f"From {plain(table.source)}.", ""]
    for note in table.notes:
        lines.append(f"- {plain(note)}")
    # without a blank line Markdown would read the table as part of the list
    if table.notes:
        lines.append("")
    lines += _lines(table.headings, table.rows)
    lines.append("")
    if not table.own_rows:
        lines += ["The runs of this report measured none of these.", ""]
        return lines
    lines += ["The same measures in this report's runs:", ""]
    lines += _lines(table.own_headings, table.own_rows)
    lines.append("")
    return lines


def _lines(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table as Markdown; nothing in a cell can end the cell."""
    cells = []
    for row in rows:
        cells.append(_plain_row(row))
    return markdown_lines(_plain_row(headings), cells)


def _plain_row(texts: list[str]) -> list[str]:
    return [plain(text) for text in texts]


def plain(text: str) -> str:
    """Keep a text from being read as Markdown's table or HTML."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())

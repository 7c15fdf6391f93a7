"""Figures and tables as text."""

from __future__ import annotations


def gigabytes(count: float) -> str:
    """Show bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def markdown_lines(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table: names to the left, figures to the right."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    return [lines[0], "| --- |" + " ---: |" * (len(headings) - 1), *lines[1:]]

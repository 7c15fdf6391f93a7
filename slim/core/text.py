"""Figures and tables as text."""

from __future__ import annotations

# settings that tell results of one method apart, and how they are written
SHORT = {
    "bits": "{}b",
    "average_bits": "{:g}b",
    "group_size": "g{}",
    "blocks": "{} blocks",
    "ratio": "{}",
    "sparsity": "{}",
    "r": "r{}",
}
SHARES = ("ratio", "sparsity")  # shown in per cent


def gigabytes(count: float) -> str:
    """Show bytes for people."""
    if count >= 1e8:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.1f} MB"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as ``1 token`` or ``12 tokens``.

    Args:
        number: of the things.
        noun: for one of them, whose plural ends in s.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def short_settings(settings: dict) -> str:
    """Return the settings of a stage that say most about its result, in few letters.

    Args:
        settings: name -> value, as the stage's manifest has them.

    Returns:
        Such as ``"3b g64"`` (bits, group size), ``"2 blocks"``, ``"r8"``; empty without any.
    """
    words = []
    for name, form in SHORT.items():
        value = settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if name == "group_size" and value == -1:  # whole rows
            continue
        if name in SHARES:
            words.append(f"{100 * value:g}%")
        elif name == "blocks" and value == 1:
            words.append("1 block")
        else:
            words.append(form.format(value))
    return " ".join(words)


def markdown_lines(headings: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table: names to the left, figures to the right.

    Args:
        headings: one per column.
        rows: cells in the order of the headings.
    """
    lines = ["| " + " | ".join(cells) + " |" for cells in (headings, *rows)]
    return [lines[0], "| --- |" + " ---: |" * (len(headings) - 1), *lines[1:]]

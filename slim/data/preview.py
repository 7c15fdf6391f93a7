"""What a model is about to learn, for people: the first examples as text, with the part that does
not count marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

from slim.core.console import say
from slim.data.packing import IGNORE, Windows

FILE = "examples.txt"
LEGEND = "The first training examples, decoded. What stands between « and » is read and not learnt."
SHOWN = 600  # characters on the terminal


def first_examples(windows: Windows, tokenizer, count: int = 3) -> list[str]:
    """Return the first examples as text, what has no loss in « ».

    Args:
        windows: their examples, or for plain text the windows themselves, are shown.
        tokenizer: that the tokens come from.
        count: how many at most.
    """
    if hasattr(windows, "shown"):  # texts with classes
        return windows.shown(count)
    examples: list[str] = []
    for row in range(min(len(windows), count)):
        tokens = windows.tokens[row].tolist()
        labels = windows.labels[row].tolist()
        for start, end in _sequences(windows, row):
            # the rest of a window is no example
            if any(label != IGNORE for label in labels[start + 1 : end]):
                examples.append(marked(tokenizer, tokens[start:end], labels[start:end]))
    return examples[:count]


def _sequences(windows: Windows, row: int) -> Iterator[tuple[int, int]]:
    """Yield first token and end of every sequence in a window."""
    length = windows.tokens.shape[1]
    starts = [0]
    if windows.positions is not None:
        positions = windows.positions[row].tolist()
        starts = [place for place, position in enumerate(positions) if position == 0]
    return pairwise([*starts, length])


def marked(tokenizer, tokens: list[int], labels: list[int]) -> str:
    """Return the tokens as text, runs without a label between « and »."""
    text = ""
    characters = 0
    place = 0
    for has_loss, run in groupby(label != IGNORE for label in labels):
        place += len(list(run))
        # from the beginning: some tokenizers drop a space where decoding starts
        decoded = tokenizer.decode(tokens[:place], clean_up_tokenization_spaces=False)
        new = decoded[characters:]
        text += new if has_loss else f"«{new}»"
        characters = len(decoded)
    return text


def show_example(windows: object, tokenizer) -> None:
    """Print the first example; nothing where the data is made during the training (on-policy
    distillation)."""
    if isinstance(windows, Windows):
        text = first_examples(windows, tokenizer, 1)[0]
        if len(text) > SHOWN:
            text = text[:SHOWN] + " ..."
        legend = "; «this» is read, not learnt" if "«" in text else ""
        say(f"The first example{legend}:\n{text}", dim=True)


def write_examples(windows: object, tokenizer, folder: Path) -> None:
    """Write the first examples to ``examples.txt`` in the existing ``folder``; nothing where
    :func:`show_example` does not."""
    if isinstance(windows, Windows):
        text = "\n\n".join([LEGEND, *first_examples(windows, tokenizer)])
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

"""What a model is about to learn, for people: the first examples as text, with the part that does
not count marked."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from slim.core.console import say
from slim.data.packing import IGNORE, Windows

FILE = "examples.txt"
LEGEND = "The first training examples, decoded. What stands between « and » is read and not learnt."
SHOWN = 600  # characters on the terminal


def first_examples(windows: Windows, tokenizer, count: int = 3) -> list[str]:
    """Return the first ``count`` examples (windows, for plain text) as text, what has no loss in «
    »."""
    found: list[str] = []
    for row in range(min(len(windows), count)):
        tokens, labels = windows.tokens[row].tolist(), windows.labels[row].tolist()
        positions = (
            range(len(tokens)) if windows.positions is None else windows.positions[row].tolist()
        )
        starts = [place for place, position in enumerate(positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            # the rest of a window is no example
            if any(label != IGNORE for label in labels[start + 1 : end]):
                found.append(marked(tokenizer, tokens[start:end], labels[start:end]))
    return found[:count]


def marked(tokenizer, tokens: list[int], labels: list[int]) -> str:
    """Return the tokens as text, runs without a label between « and »."""
    decode = lambda end: tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)  # noqa: E731
    text, done, place = "", 0, 0
    for counts, run in groupby(label != IGNORE for label in labels):
        place += len(list(run))
        # from the beginning: some tokenizers drop a space where decoding starts
        whole = decode(place)
        text += whole[done:] if counts else f"«{whole[done:]}»"
        done = len(whole)
    return text


def show_example(windows: object, tokenizer) -> None:
    """Print the first example; nothing where the data is made during the training (on-policy
    distillation)."""
    if isinstance(windows, Windows):
        text = first_examples(windows, tokenizer, 1)[0]
        text = text if len(text) <= SHOWN else text[:SHOWN] + " ..."
        say(f"The first example; «this» is read, not learnt:\n{text}", dim=True)


def write_examples(windows: object, tokenizer, folder: Path) -> None:
    """Write the first examples to ``examples.txt`` in the existing ``folder``; nothing where
    :func:`show_example` does not."""
    if isinstance(windows, Windows):
        text = "\n\n".join([LEGEND, *first_examples(windows, tokenizer)])
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

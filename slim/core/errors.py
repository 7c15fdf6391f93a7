"""The one exception for everything that the person at the keyboard can put right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlimError(Exception):
    """A mistake in what was asked for, or a limit of the machine: shown as one or two lines,
    without a traceback.

    The message says what is wrong, what is allowed and what to type instead.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean x?"``, or an empty string where nothing is near.

    Args:
        word: what was typed.
        known: what could have been meant; the nearest is named.
    """
    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    if not nearest:
        return ""
    return f" Did you mean {nearest[0]}?"


class Terminated(KeyboardInterrupt):
    """A signal that asks the process to end (SIGTERM, SIGHUP). It ends like Ctrl-C: state is saved,
    the run is closed as killed.

    Attributes:
        signal: the signal's number; the exit code is 128 more.
    """

    def __init__(self, signal: int):
        super().__init__(f"signal {signal}")
        self.signal = signal

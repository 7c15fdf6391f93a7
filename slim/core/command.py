"""What the commands ``python -m slim.NAME`` share: mistakes in a line or two, and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from slim.core.console import never_fail_on_a_character, output_may_be_cut
from slim.core.errors import SlimError

INTERRUPTED = "slim: Interrupted."


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int | None],
    arguments: list[str] | None = None,
    interrupted: str = INTERRUPTED,
) -> int:
    """Read the command line and do what it asks.

    Args:
        parser: of the command line.
        run: what is done with its options; returns an exit code, None for 0.
        arguments: typed after the command; None: those of this process.
        interrupted: said after Ctrl-C.

    Returns:
        The exit code: that of ``run``, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    never_fail_on_a_character()
    options = parser.parse_args(arguments)
    try:
        with output_may_be_cut():
            return run(options) or 0
        return 0  # whoever read the output has seen enough
    except SlimError as error:
        print(f"slim: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130

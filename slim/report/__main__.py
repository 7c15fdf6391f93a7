"""``python -m slim.report WHAT``: one page about an experiment, a sweep or a run, and the same
tables as Markdown."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slim.core.command import run_command
from slim.core.errors import SlimError

DESCRIPTION = "Write report.html (one page, works offline) and report.md about tracked runs."


def parser() -> argparse.ArgumentParser:
    """Return the command line of the report."""
    command = argparse.ArgumentParser(prog="python -m slim.report", description=DESCRIPTION)
    command.add_argument(
        "what",
        help="an experiment's name, the id or name of a sweep or run, or a folder below multirun/",
    )
    command.add_argument(
        "--store", help="folder of the results, as in store=FOLDER (default: runs, or the sweep's)"
    )
    command.add_argument(
        "--uri",
        help="address of a tracking server, as in tracking.uri=; default: the file in the store",
    )
    command.add_argument("--output", default=".", help="folder to write into (default: here)")
    return command


def main(arguments: list[str] | None = None) -> int:
    """Write the report; returns the exit code: 0 done, 2 a mistake in the command."""

    def run(options: argparse.Namespace) -> None:
        folder = Path(options.output).expanduser()
        for path in write(options.what, options.store, options.uri, folder):
            print(path)

    return run_command(parser(), run, arguments)


def write(what: str, store: str | None, uri: str | None, folder: Path) -> list[Path]:
    """Write ``report.html`` and ``report.md``.

    Args:
        what: an experiment, sweep, run or folder (:func:`slim.report.find.find`).
        store: folder of the results; None: the default, or the sweep's.
        uri: address of a tracking server; None: the file in the store.
        folder: to write into; made if it does not exist.

    Returns:
        The paths of both files.

    Raises:
        SlimError: when nothing is called ``what``, or the files cannot be written.
    """
    from slim.report.build import build_report
    from slim.report.find import connect, find

    client = connect(what, store, uri)
    run_ids, title = find(client, what)
    report = build_report(client, run_ids, title)
    paths = {folder / "report.html": report.html, folder / "report.md": report.markdown}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in paths.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SlimError(
            f"The report cannot be written to {folder}: {error.strerror}. Choose another --output."
        ) from error
    return list(paths)


if __name__ == "__main__":
    sys.exit(main())

"""``python -m slim.documents FOLDER --output FILE.jsonl``: documents to records
(docs/documents.md).

Exit codes: 0 done, 2 a mistake or nothing to read, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from slim.core.command import INTERRUPTED, run_command
from slim.core.errors import SlimError

DESCRIPTION = (
    "Make training records of a folder of PDF, PPTX, DOCX, HTML, Markdown, text files and scans: "
    "one JSON object for each page, with text, source and page. What was dropped and why is in "
    "FILE.report.json."
)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(prog="python -m slim.documents", description=DESCRIPTION)
    command.add_argument("folder", help="a folder, read with all below it, or one file")
    command.add_argument("--output", required=True, help="FILE.jsonl to write")
    command.add_argument(
        "--cache",
        help="folder for pages read and answers paid for (documents in SLIM_STORE or in runs)",
    )
    _add_reading(command.add_argument_group("reading"))
    _add_pieces(command.add_argument_group("records"))
    _add_asking(command.add_argument_group("a server that translates or describes pictures"))
    return command


def _add_reading(group) -> None:
    group.add_argument("--ocr", choices=("auto", "always", "never"), help="scans (auto)")
    group.add_argument("--languages", help="of scans, such as deu+eng (eng)")
    group.add_argument("--max-pages", type=int, help="of one file (5000)")
    group.add_argument("--max-megabytes", type=int, help="of one file (500)")
    group.add_argument("--jobs", type=int, help="processes (one for each core)")


def _add_pieces(group) -> None:
    group.add_argument("--tables", choices=("keep", "drop"), help="as Markdown (keep)")
    group.add_argument("--code", choices=("keep", "drop"), help="between fences (keep)")
    group.add_argument("--join", type=int, help="neighboring pages that make one record (1)")
    group.add_argument(
        "--length", type=int, help="characters of a page: longer ones are split (their mean)"
    )
    group.add_argument("--least", type=int, help="characters of a record (20)")
    group.add_argument(
        "--similarity", help="0.5 to 1: pages that agree so much are dropped (0.9); none: keep all"
    )
    group.add_argument("--validation-fraction", type=float, help="of the documents (0.1)")
    group.add_argument("--test-fraction", type=float, help="of the documents (0)")
    group.add_argument(
        "--split-by", choices=("document", "page"), help="what stays on one side (document)"
    )
    group.add_argument("--seed", type=int, help="of the choice of documents kept apart (0)")


def _add_asking(group) -> None:
    group.add_argument("--translate", help="language to translate pages into, such as en")
    group.add_argument("--describe", action="store_true", default=None, help="describe pictures")
    group.add_argument("--endpoint", help="such as http://127.0.0.1:8000/v1")
    group.add_argument("--model", help="name of the model there")
    group.add_argument("--vision-model", help="of the one that describes (the same)")
    group.add_argument("--key-variable", help="environment variable with its key (OPENAI_API_KEY)")
    group.add_argument("--max-tokens", type=int, help="of all questions and answers (1000000)")
    group.add_argument("--timeout", type=float, help="seconds for one answer (120)")
    group.add_argument("--retries", type=int, help="further tries (3)")
    group.add_argument("--wait", type=float, help="seconds before the second try, then doubled (1)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        parser(),
        _convert,
        arguments,
        interrupted=f"{INTERRUPTED} The same command resumes from what was read.",
    )


def _convert(given: argparse.Namespace) -> int:
    options = vars(given)
    # --help does without the readers
    from slim.core.tables import print_table
    from slim.documents.convert import Conversion
    from slim.documents.settings import DocumentSettings
    from slim.documents.training import write_records

    folder = Path(options.pop("folder")).expanduser()
    output = Path(options.pop("output")).expanduser()
    cache = options.pop("cache") or Path(os.environ.get("SLIM_STORE", "runs")) / "documents"
    settings = {}
    for name, value in options.items():
        if value is not None:
            settings[name] = value
    if "similarity" in settings:
        settings["similarity"] = _similarity(settings["similarity"])
    if output.suffix != ".jsonl":
        raise SlimError(f"--output {output}: must end in .jsonl.")
    conversion = Conversion(folder, DocumentSettings(**settings), Path(cache).expanduser())
    write_records(conversion, output)
    for table in conversion.report.tables():
        print_table(table)
    return 0


def _similarity(text: str) -> float | None:
    """Return the value of ``--similarity``."""
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise SlimError(f"--similarity {text}: must be from 0.5 to 1, or none.") from error


if __name__ == "__main__":
    sys.exit(main())

"""``python -m slim.questions PAGES.jsonl --output FILE.jsonl``: questions with answers
(docs/documents.md).

Exit codes: 0 done, 2 a mistake or nothing usable, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from slim.core.command import INTERRUPTED, run_command
from slim.core.console import say
from slim.core.errors import SlimError

DESCRIPTION = (
    "Make questions with answers from the records of slim.documents by a local model or a server, "
    "each checked for being answerable from its page; or read a catalogue of your own (CSV, "
    "JSONL, flash cards)."
)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(prog="python -m slim.questions", description=DESCRIPTION)
    command.add_argument("source", help="records of slim.documents (.jsonl), or a catalogue")
    command.add_argument("--output", required=True, help="FILE.jsonl to write")
    command.add_argument(
        "--catalogue", action="store_true", help="the source holds questions, not pages"
    )
    made = command.add_argument_group("questions from pages")
    made.add_argument("--model", help="checkpoint folder, or name of the endpoint's model")
    made.add_argument("--endpoint", help="such as http://127.0.0.1:8000/v1")
    made.add_argument("--per-page", type=int, help="questions for each page (3)")
    made.add_argument(
        "--check",
        choices=("model", "words", "none"),
        help="answered again from the page; words of the answer on the page; none (model)",
    )
    made.add_argument("--limit", type=int, help="most pages (all)")
    made.add_argument("--max-tokens", type=int, help="of all questions and answers (1000000)")
    made.add_argument("--key-variable", help="environment variable with the key (OPENAI_API_KEY)")
    made.add_argument("--timeout", type=float, help="seconds for one answer (120)")
    made.add_argument("--retries", type=int, help="further tries (3)")
    made.add_argument("--wait", type=float, help="seconds before the second try, then doubled (1)")
    made.add_argument("--device", help="cpu or cuda, for a folder (cpu)")
    made.add_argument("--cache", help="folder for answers (questions in SLIM_STORE or in runs)")
    cards = command.add_argument_group("a catalogue")
    cards.add_argument("--question-column", default="question", help="(question)")
    cards.add_argument("--answer-column", default="answer", help="(answer)")
    cards.add_argument("--validation-fraction", type=float, default=0.1, help="(0.1)")
    cards.add_argument("--test-fraction", type=float, default=0.0, help="(0)")
    cards.add_argument("--seed", type=int, default=0, help="of these shares (0)")
    return command


MAKING = (
    "model", "endpoint", "per_page", "check", "limit", "max_tokens", "key_variable", "timeout",
    "retries", "wait", "device",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        parser(),
        _run,
        arguments,
        interrupted=f"{INTERRUPTED} The same command resumes from what was asked.",
    )


def _run(options: argparse.Namespace) -> int:
    output = Path(options.output).expanduser()
    if output.suffix != ".jsonl":
        raise SlimError(f"--output {output}: must end in .jsonl.")
    if options.catalogue:
        return _catalogue(options, output)
    return _made(options, output)


def _catalogue(options: argparse.Namespace, output: Path) -> int:
    from slim.core.settings import require_number
    from slim.questions.catalogue import read_catalogue, with_split

    require_number("--validation-fraction", options.validation_fraction, 0, 0.5)
    require_number("--test-fraction", options.test_fraction, 0, 0.5)
    source = Path(options.source).expanduser()
    rows = read_catalogue(source, options.question_column, options.answer_column)
    shares = (options.validation_fraction, options.test_fraction, options.seed)
    _write(output, [with_split(row, *shares) for row in rows])
    say(f"{len(rows)} in {output}", head="questions")
    return 0


def _made(options: argparse.Namespace, output: Path) -> int:
    if not options.model:
        raise SlimError(
            "Questions need a model that writes them: --model FOLDER, or --endpoint "
            "http://HOST:PORT/v1 --model NAME.\nQuestions of your own: --catalogue"
        )
    source = Path(options.source).expanduser()
    if not source.is_file() or source.suffix != ".jsonl":
        raise SlimError(
            f"{source} is no file of records. Make one: python -m slim.documents FOLDER --output "
            "FILE.jsonl"
        )
    # --help and mistakes do without torch
    from slim.data.text import Text
    from slim.questions.making import QuestionMaker, QuestionSettings

    text = Text(str(source))
    pages = []
    for where, row in text.located_rows():
        pages.append({**row, "text": text.cell(row, where)})
    settings = {}
    for name in MAKING:
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    store = Path(os.environ.get("SLIM_STORE", "runs"))
    cache = Path(options.cache).expanduser() if options.cache else store / "questions"
    maker = QuestionMaker(QuestionSettings(**settings), cache)
    _write(output, maker.questions(pages))
    say(f"{maker.made} in {output}, of {len(pages[: options.limit])} pages", head="questions")
    for reason, count in maker.dropped.most_common():
        say(f"{count} dropped: {reason}")
    if maker.budget.requests:
        say(f"{maker.budget.requests:,} answers, {maker.budget.spent:,} tokens", head="asked")
    return 0


def _write(output: Path, rows: Iterable[dict]) -> None:
    """Write rows as JSON Lines, all or none."""
    from slim.core.io import atomic_path

    with atomic_path(output) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())

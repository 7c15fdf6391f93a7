"""``python -m slim.search_index``: build an index over documents, and ask it (docs/encoders.md).

Exit codes: 0 done, 2 a mistake in the command, 130 interrupted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from pathlib import Path

from slim.core.command import run_command
from slim.core.console import say, show_line
from slim.core.errors import SlimError
from slim.search_index.index import EXACT, KINDS, Index, build, read_documents

SHOWN = 300  # characters of a document
INDENT = "   "
SOURCES = ("source", "page", "title", "url")  # columns that say where a document is from


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    command = argparse.ArgumentParser(
        prog="python -m slim.search_index",
        description="Search in texts: a bi-encoder first, a cross-encoder after: docs/encoders.md",
    )
    actions = command.add_subparsers(dest="action", required=True)
    make = actions.add_parser("build", help="make an index of a file of documents")
    make.add_argument("texts", metavar="TEXTS", help=".jsonl, .csv, .parquet or .txt file")
    make.add_argument("--output", required=True, metavar="FOLDER", help="the index, a new folder")
    make.add_argument("--encoder", default="minilm", help="folder of a bi-encoder (minilm)")
    make.add_argument("--column", default="text", help="column of the text (text)")
    make.add_argument(
        "--kind", choices=KINDS, default=EXACT, help="exact, or hnsw: faster from 100,000 on, faiss"
    )
    make.add_argument("--batch-size", type=int, default=32, help="documents read at once (32)")
    ask = actions.add_parser("ask", help="look for something in an index")
    ask.add_argument("index", metavar="INDEX", help="folder that build made")
    ask.add_argument("query", nargs="*", help="what to look for; none: lines of the input")
    ask.add_argument("--cross", metavar="FOLDER", help="cross-encoder that orders what was found")
    ask.add_argument("-k", type=int, default=5, help="documents to show (5)")
    ask.add_argument(
        "--candidates", type=int, default=50, help="documents the cross-encoder reads (50)"
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(parser(), run, arguments)


def run(options: argparse.Namespace) -> None:
    """Build or ask."""
    for name in ("k", "candidates", "batch_size"):
        if getattr(options, name, 1) < 1:
            raise SlimError(f"--{name.replace('_', '-')} must be 1 or more.")
    if options.action == "build":
        run_build(options)
        return
    index = Index(Path(options.index).expanduser(), options.cross)
    queries = [" ".join(options.query)] if options.query else map(str.strip, sys.stdin)
    for query in queries:
        if query:
            show(index, query, options.k, options.candidates)


def run_build(options: argparse.Namespace) -> None:
    """Make an index and say what it took."""
    target = Path(options.output).expanduser()
    if target.exists():  # before minutes of work
        raise SlimError(f"{target} exists already. Give a new folder, or remove this one first.")
    records = read_documents(options.texts, options.column)
    meta = build(records, options.column, options.encoder, target, options.kind, options.batch_size)
    rate = meta["documents"] / max(meta["seconds"], 1e-9)
    say(f"{meta['documents']} documents in {meta['seconds']:.1f} s ({rate:,.0f} a second)")
    show_line(f"index: {target}")


def show(index: Index, query: str, k: int, candidates: int) -> None:
    """Ask and print what was found, with the times."""
    answer = index.ask(query, k, candidates)
    for number, hit in enumerate(answer.hits, 1):
        score = f"cosine {hit.cosine:.3f}"
        if hit.score is not None:
            score = f"score {hit.score:.3f}, {score}"
        where = ", ".join(str(hit.record[name]) for name in SOURCES if hit.record.get(name))
        show_line(f"{number}. [{score}] {where}".rstrip())
        text = " ".join(hit.text.split())
        if len(text) > SHOWN:
            text = text[:SHOWN] + " ..."
        for line in textwrap.wrap(text, shutil.get_terminal_size().columns - len(INDENT)):
            show_line(INDENT + line)
    times = [f"{name} {1000 * seconds:.1f} ms" for name, seconds in answer.seconds.items()]
    say(f"{', '.join(times)} ({index.meta['documents']} documents)", dim=True)


if __name__ == "__main__":
    sys.exit(main())

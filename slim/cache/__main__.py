"""The commands: ``python -m slim.cache list|size|prune|verify [--store runs]`` (docs/cache.md).

Exit codes: 0 done, 1 damaged results found, 2 a mistake in the command, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from slim.cache.cleaning import leftovers, remove, require_uploaded, unneeded_results
from slim.cache.inventory import damage, entries, existing_store, size_of, size_rows, tracked_runs
from slim.cache.usage import Run
from slim.checkpoints.store import Store
from slim.core.command import run_command
from slim.core.console import track
from slim.core.errors import SlimError
from slim.core.tables import Table, print_table
from slim.core.text import counted, gigabytes

ABOUT = {
    "list": "every result, what it was made from, and the runs that use it",
    "size": "how much room results, figures, work in progress and tracking take",
    "prune": "remove results that no run uses, and what killed processes left",
    "verify": "read every result again and compare it with its checksums",
}
PRUNE_OPTIONS = {
    "--intermediate": "remove also what is not the end of a run's chain",
    "--failed": "let runs that failed or were killed count as needing nothing",
    "--evaluations": "remove all figures too: they are measured again when asked for",
    "--dry-run": "show what would go, and remove nothing",
    "--yes": "do not ask",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""

    def run(options: argparse.Namespace) -> int:
        return COMMANDS[options.command](existing_store(options.store), options)

    return run_command(parser(), run, arguments)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the four commands."""
    root = argparse.ArgumentParser(
        prog="python -m slim.cache", description="The results that slim keeps: docs/cache.md"
    )
    commands = root.add_subparsers(dest="command", required=True)
    added = {}
    for name, text in ABOUT.items():
        added[name] = command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--store",
            default=os.environ.get("SLIM_STORE", "runs"),
            help="folder of the results (runs)",
        )
    for name in ("list", "prune"):
        added[name].add_argument(
            "--uri", action="append", default=[], help="a tracking server whose runs count too"
        )
    for name, text in PRUNE_OPTIONS.items():
        added["prune"].add_argument(name, action="store_true", help=text)
    added["verify"].add_argument(
        "--remove", action="store_true", help="remove what is damaged: it is made again when needed"
    )
    return root


def list_command(store: Store, options: argparse.Namespace) -> int:
    """Print every result.

    Args:
        store: whose results they are.
        options: ``uri``.
    """
    results = entries(store, tracked_runs(store, options.uri))
    rows = []
    for entry in results:
        method = entry.manifest.get("method", "no readable slim.json")
        times = [age(entry.made), age(entry.used)]
        users = shown_users(entry.users)
        size = gigabytes(entry.size)
        rows.append([entry.folder.name, method, size, *times, entry.parent, users])
    headings = ["result", "method", "size", "made", "last used", "made from", "used by"]
    title = f"{counted(len(results), 'result')} in {store.root}"
    print_table(Table(headings, rows, fold=[1, 5, 6], title=title))
    return 0


def shown_users(runs: list[Run]) -> str:
    """Name up to three runs, each with its experiment."""
    names = []
    for run in runs[:3]:  # a source is in every run's chain
        names.append(f"{run.experiment}: {run.name}")
    if len(runs) > 3:
        names.append(f"and {len(runs) - 3} more")
    return "\n".join(names) or "no run"


def age(moment: float) -> str:
    """Say how long ago a moment was."""
    seconds = max(0.0, time.time() - moment)  # another machine's clock may be ahead
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"


def size_command(store: Store, options: argparse.Namespace) -> int:
    """Print how much room everything takes.

    Args:
        store: that is looked at.
        options: none are read.
    """
    rows = []
    total = 0
    for name, number, size in size_rows(store):
        rows.append([name, str(number), gigabytes(size)])
        total += size
    rows.append(["all", "", gigabytes(total)])
    print_table(Table(["what", "number", "size"], rows, title=str(store.root)))
    return 0


def prune_command(store: Store, options: argparse.Namespace) -> int:
    """Show what no run needs, ask, and remove it.

    Args:
        store: whose results they are.
        options: ``uri`` and those of ``PRUNE_OPTIONS``.
    """
    # without any runs everything would count as unneeded, so both of these refuse first
    runs = tracked_runs(store, options.uri, needed=True)
    require_uploaded(store)
    results, unneeded, running = unneeded_results(store, runs, options.intermediate, options.failed)
    folders = [entry.folder for entry in unneeded]
    folders += leftovers(store)
    evaluations = []
    if options.evaluations:
        evaluations = [*evaluation_files(store), *kept_references(store)]
    if running:
        print(
            f"'{running[0].name}' is marked as running in MLflow: "
            "what was used since it began is kept."
        )
    if not folders and not evaluations:
        kept = f"{counted(len(results), 'result')}, {counted(len(runs), 'run')}"
        print(f"Nothing to remove: {kept}.")
        return 0
    bytes_in_all = 0
    for path in folders:
        size = size_of(path)
        bytes_in_all += size
        print(f"{gigabytes(size):>10}  {path.name}")
    if evaluations:  # one line: there may be hundreds of small files
        size = sum(map(size_of, evaluations))
        bytes_in_all += size
        print(f"{gigabytes(size):>10}  all {counted(len(evaluations), 'evaluation')}")
    total = (
        f"{len(unneeded)} of {counted(len(results), 'result')}, {gigabytes(bytes_in_all)} in all"
    )
    if options.dry_run:
        print(f"Would remove {total}.")
    elif options.yes or confirmed(f"Remove {total}? [y/N] "):
        print(removed_line(*remove(store, [*folders, *evaluations])))
    else:
        print("Nothing was removed.")
    return 0


def evaluation_files(store: Store) -> list[Path]:
    """Return the files of all evaluations, by name."""
    return sorted((store.root / "evaluations").glob("*.json"))


def kept_references(store: Store) -> list[Path]:
    """Return the files with what evaluations keep of the checkpoints others are compared with."""
    return sorted((store.root / "evaluations").glob("*.safetensors"))


def removed_line(freed: int, busy: list[str]) -> str:
    """Say what a removal came to.

    Args:
        freed: bytes.
        busy: names of what is in use.
    """
    line = f"{gigabytes(freed)} removed."
    if busy:
        line += f" In use by another process and left alone: {', '.join(busy)}."
    return line


def confirmed(question: str) -> bool:
    """Ask a question and return whether the answer is yes.

    Raises:
        SlimError: when nobody can answer.
    """
    if not sys.stdin.isatty():  # in a script a question would wait for ever
        raise SlimError(
            "prune asks before it removes anything, and there is no terminal. "
            "Add --yes, or --dry-run to look."
        )
    return input(question).strip().lower() in ("y", "yes")


def verify_command(store: Store, options: argparse.Namespace) -> int:
    """Read all results again; say which are damaged.

    Args:
        store: whose results they are.
        options: ``remove``.
    """
    results = entries(store)
    damaged = {}
    for entry in track(results, "Verifying"):
        # what another process works on may change while it is read, or be gone by now
        with store.lock_if_free(entry.folder) as free:
            if free and entry.folder.is_dir():
                reason = damage(entry)
                if reason:
                    damaged[entry.folder] = reason
    evaluations = evaluation_files(store)
    # no lock is needed: they appear whole, and are never changed
    for path in evaluations:
        if store.find_evaluation(path) is None:
            damaged[path] = "differs from its digest"
    for path, reason in damaged.items():
        print(f"damaged: {path.name}: {reason}")
    if damaged and options.remove:
        print(removed_line(*remove(store, list(damaged))))
    print(
        f"{counted(len(results), 'result')} and {counted(len(evaluations), 'evaluation')} read, "
        f"{len(damaged)} damaged."
    )
    return 1 if damaged else 0


COMMANDS = {
    "list": list_command,
    "size": size_command,
    "prune": prune_command,
    "verify": verify_command,
}

if __name__ == "__main__":
    sys.exit(main())

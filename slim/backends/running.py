"""A tool's worker at work: asked by a JSON file, answering by JSON lines, watched.

The worker is started as ``python worker.py REQUEST.json`` in its environment. The request:

    contract      1
    source        folder of the checkpoint to read
    target        empty folder to write the result to
    scratch       folder for everything else, removed afterwards
    settings      the stage's settings
    calibration   safetensors file with int64 [samples, length] under "tokens", or null
    device        "cpu" or "cuda"
    seed          of everything random

It answers on standard output, a JSON object a line:

    {"event": "progress", "what": "blocks", "done": 3, "total": 30}
    {"event": "facts", "facts": {"seconds": 12.5}}      plain values for the manifest
    {"event": "note", "text": "..."}                    what the user should know
    {"event": "error", "message": "..."}                why it gives up, in a sentence
    {"event": "done"}                                   last

Whatever else it prints goes to its log. A worker ends in one of two ways: with "done" and exit code
0, or in an error with the last lines of its log. It is stopped with its children when slim is
interrupted or when it says nothing for longer than its silence limit."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from slim.backends.environment import Environment, variables_for
from slim.core.console import duration, progress_bar, warn
from slim.core.errors import SlimError
from slim.core.text import gigabytes

CONTRACT = 1
POLL = 0.25  # seconds between two looks at a worker that says nothing
PATIENCE = 5.0  # seconds that a worker has to end in order when it is stopped
ENDING = 60.0  # seconds that it has to end by itself after its last word
TAIL = 8  # lines of the log in an error


@dataclass
class Answer:
    """What a worker said.

    Attributes:
        facts: Plain values for the manifest.
        notes: Sentences for the user, already shown.
        error: Why it gave up, in its own words.
        done: Whether it said that it was.
        seconds: What it took, loading and writing included.
        peak_bytes: Most memory that its process held; None where the system does not tell.
    """

    facts: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    done: bool = False
    seconds: float = 0.0
    peak_bytes: int | None = None


def run_worker(
    environment: Environment,
    worker: Path,
    request: dict,
    log: Path,
    title: str,
    silence: float,
) -> Answer:
    """Let a worker answer a request.

    Args:
        environment: Where it runs.
        worker: Its script.
        request: See the module; ``scratch`` and ``target`` exist.
        log: File that gets whatever it says besides its answers.
        title: What it does, for the bar.
        silence: Seconds without a sign of life after which it is stopped.

    Raises:
        SlimError: It fails, is killed, is silent, or its answer makes no sense.
    """
    scratch = Path(request["scratch"])
    asked = scratch / "request.json"
    asked.write_text(json.dumps({"contract": CONTRACT, **request}, indent=1), encoding="utf-8")
    # -E -s: neither variables nor the user's own folder lead to other packages
    command = [str(environment.interpreter), "-u", "-E", "-s", str(worker), str(asked)]
    started = time.monotonic()
    answer = Answer()
    with log.open("wb") as written, progress(title) as show:
        process = subprocess.Popen(
            command, cwd=scratch, env=variables_for(environment, scratch),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, start_new_session=True,
        )  # fmt: skip
        try:
            for line in watched(process, log, answer, title, silence):
                if not take(answer, line, show):
                    written.write(line)
                    written.flush()
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDING)
        finally:
            stop(process)
    answer.seconds = round(time.monotonic() - started, 2)
    require_done(answer, process.returncode, log, title)
    return answer


def watched(
    process: subprocess.Popen, log: Path, answer: Answer, title: str, silence: float
) -> Iterator[bytes]:
    """Yield the lines of a process until it closes its output; look at its memory and its log
    meanwhile.

    Raises:
        SlimError: Neither its output nor its log has grown for ``silence`` seconds.
    """
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=read_lines, args=(process.stdout, lines), daemon=True).start()
    heard, size = time.monotonic(), 0
    while True:
        try:
            line = lines.get(timeout=POLL)
        except queue.Empty:
            line = b""
        answer.peak_bytes = peak_of(process.pid, answer.peak_bytes)
        if line is None:
            return
        if line:
            heard = time.monotonic()
            yield line
            continue
        grown = log.stat().st_size
        if grown != size:
            heard, size = time.monotonic(), grown
        if time.monotonic() - heard > silence:
            raise SlimError(
                f"{title}: the worker has said nothing for {duration(silence)} and was stopped. "
                f"{tail(log)}\nIf it only is slow, allow more: quant.silence={2 * silence:g}"
            )


def read_lines(output: IO[bytes], lines: queue.Queue) -> None:
    """Put the lines of an output into a queue, and None at its end."""
    for line in output:
        lines.put(line)
    lines.put(None)


def peak_of(pid: int, known: int | None) -> int | None:
    """Return the most memory that a process has held so far, in bytes.

    Args:
        pid: Its number.
        known: What was known before, which stays where it is gone or the system does not tell.
    """
    with suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return max(known or 0, 1024 * int(line.split()[1]))
    return known


def stop(process: subprocess.Popen) -> None:
    """End a worker and its children, where they still run, and take note of how it ended."""
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()  # a worker of slim's ends by itself where this closes
    for number in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        signal_group(process, number)
        if process.poll() is not None:
            break
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    if process.stdout is not None:
        process.stdout.close()


def signal_group(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a worker and to what it started.

    Args:
        process: The worker, which leads a group of processes.
        number: The signal.
    """
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        elif process.poll() is None:
            process.send_signal(number)


def take(answer: Answer, line: bytes, show: Progress) -> bool:
    """Take a line of a worker.

    Args:
        answer: Gets what it says.
        line: Of its standard output.
        show: The bar.

    Returns:
        Whether it was an answer; anything else belongs into the log.
    """
    try:
        message = json.loads(line)
    except ValueError:
        return False
    if not isinstance(message, dict) or "event" not in message:
        return False
    event = message["event"]
    try:
        if event == "progress":
            show.at(str(message["what"]), int(message["done"]), int(message["total"]))
        elif event == "facts":
            answer.facts.update(message["facts"])
        elif event == "note":
            answer.notes.append(str(message["text"]))
            warn(answer.notes[-1])
        elif event == "error":
            answer.error = str(message["message"])
        elif event == "done":
            answer.done = True
        else:
            return False
    except (KeyError, TypeError, ValueError) as error:
        raise SlimError(
            f"The worker answered nonsense: {line.decode(errors='replace').strip()[:200]} "
            f"({type(error).__name__}: {error}). docs/backends.md has the contract."
        ) from error
    return True


class Progress:
    """The bar of a worker, a new one for everything it does."""

    def __init__(self, title: str, stack: ExitStack):
        """Show nothing yet.

        Args:
            title: What the worker does.
            stack: Holds the bar that is shown.
        """
        self.title, self.stack = title, stack
        self.shown: tuple[str, int] | None = None
        self.count = 0

    def at(self, what: str, done: int, total: int) -> None:
        """Show how far the worker is.

        Args:
            what: It does; another one begins another bar.
            done: How many of ``total`` are done.
            total: All of them.
        """
        if self.shown != (what, total) or done < self.count:
            self.stack.close()
            name = f"{self.title}, {what}" if what else self.title
            self.advance = self.stack.enter_context(progress_bar(name, total))
            self.shown, self.count = (what, total), 0
        if done > self.count:
            self.advance(done - self.count)
            self.count = done


@contextmanager
def progress(title: str) -> Iterator[Progress]:
    """Yield what shows how far a worker is."""
    with ExitStack() as stack:
        yield Progress(title, stack)


def tail(log: Path) -> str:
    """Return the last lines of a log as a sentence."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    # bars rewrite their line: what stands last is what was seen
    said = [line.split("\r")[-1].strip() for line in lines if line.strip()]
    if not said:
        return "It had said nothing."
    return "Its last lines:\n  " + "\n  ".join(line[:160] for line in said[-TAIL:])


def require_done(answer: Answer, code: int, log: Path, title: str) -> None:
    """Raise ``SlimError`` for a worker that did not end as it should.

    Args:
        answer: What it said.
        code: Its exit code, negative for a signal.
        log: What else it said.
        title: What it did.
    """
    if answer.error is not None:
        raise SlimError(f"{title}: {answer.error}")
    if code < 0:
        name = f"signal {-code}"
        if -code in set(signal.Signals):
            name = signal.Signals(-code).name
        peak = ""
        if answer.peak_bytes:
            peak = f" It held {gigabytes(answer.peak_bytes)} at most."
        memory = ""
        if name == "SIGKILL":
            memory = " Perhaps memory ran out."
        raise SlimError(f"{title}: the worker was killed ({name}).{memory}{peak} {tail(log)}")
    text = log.read_text(errors="replace") if code else ""
    if "No space left on device" in text or "os error 28" in text:
        raise OSError(28, "No space left on device")
    if code:
        raise SlimError(f"{title}: the worker failed (exit code {code}). {tail(log)}")
    if not answer.done:
        raise SlimError(
            f"{title}: the worker ended without saying that it is done, so its result is not kept. "
            f"{tail(log)}"
        )

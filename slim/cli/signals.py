"""Signals that ask the process to end, such as a scheduler's before it kills."""

from __future__ import annotations

import os
import signal
import threading

from slim.core.errors import Terminated

ENDING = ("SIGTERM", "SIGHUP")


def end_in_order() -> None:
    """Let the signals that ask this process to end raise :class:`Terminated` in it, once.

    A signal that is ignored stays so: ``nohup`` means that SIGHUP is not for this process.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    pid = os.getpid()
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        if os.getpid() != pid:  # a forked worker has nothing to save
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        received.append(number)
        if len(received) == 1:  # a second one must not break off the first one's saving
            raise Terminated(number)

    for name in ENDING:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a process that was interrupted: 128 and the signal's number."""
    return 128 + getattr(error, "signal", signal.SIGINT)

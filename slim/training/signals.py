"""What Ctrl-C and SIGTERM do to a training that runs in Lightning's loop.

Lightning takes both signals for itself: Ctrl-C becomes ``sys.exit(1)``, and SIGTERM a flag that
ends the loop without a saved state. Here Ctrl-C stays a KeyboardInterrupt, and SIGTERM (what a
cluster sends before it kills) lets the current step end and the state be saved; then whoever
handled the signal before the training gets it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import lightning.pytorch as pl

from slim.core import processes


def in_main_thread() -> bool:
    """Whether this thread may set signal handlers."""
    return threading.current_thread() is threading.main_thread()


class Termination(pl.Callback):
    """Ends a training after the step in which SIGTERM came. The last of the callbacks.

    Attributes:
        asked: Whether the signal came.
    """

    def __init__(self, save: Callable[[pl.Trainer, pl.LightningModule], None] | None = None):
        """Remember who handles the signal now.

        Args:
            save: Saves the state of the training; None where nothing is saved.
        """
        self.save = save
        self.asked = False
        self.previous = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer, module) -> None:
        # Lightning has set its own handler by now, which with several processes would even talk to
        # the others from within; it puts the previous one back when its loop ends.
        if in_main_thread():
            signal.signal(signal.SIGTERM, self._ask)

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        whole_step = (index + 1) % trainer.accumulate_grad_batches == 0
        if not whole_step or trainer.global_step >= module.optimisation.steps:
            return
        # Process zero decides, since all have to take part in saving.
        if processes.broadcast_flag(self.asked):
            if self.save is not None:
                self.save(trainer, module)
            self.hand_on()

    def _ask(self, signum, frame) -> None:
        if self.asked:  # who sends it twice does not want to wait for the end of the step
            self.hand_on()
        self.asked = True

    def hand_on(self) -> None:
        """Let the handler from before the training have the signal; with none the process ends."""
        if in_main_thread():
            signal.signal(signal.SIGTERM, self.previous or signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: Lightning turns it into ``sys.exit(1)`` and leaves the
    signal ignored."""
    handler = signal.getsignal(signal.SIGINT) if in_main_thread() else None
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            # Of its own class: a handler of SIGTERM may raise a subclass.
            raise error.__context__ from None
        raise
    finally:
        if handler is not None:
            signal.signal(signal.SIGINT, handler)

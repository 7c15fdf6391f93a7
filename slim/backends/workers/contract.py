"""What slim's own workers share: the request, the answers, and what tools print led into the log.

Importing it sends standard output of this process and of everything it loads to the log, so that
only answers reach slim, and turns tqdm's bars into answers. Needs the standard library only."""

import json
import os
import sys
import threading
import time

# a copy of standard output for the answers; what anything else prints goes where errors go
_answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
os.dup2(2, 1)


def _end_with_slim():
    """End this process when slim does: the other end of standard input closes then."""
    while os.read(0, 1024):  # not sys.stdin, whose lock Python wants when it ends
        pass
    os._exit(1)


threading.Thread(target=_end_with_slim, daemon=True).start()


def read_request():
    """Return the request that slim wrote."""
    with open(sys.argv[1], encoding="utf-8") as file:
        return json.load(file)


def answer(event, **values):
    """Write an answer."""
    _answers.write(json.dumps({"event": event, **values}) + "\n")
    _answers.flush()


def progress(what, done, total):
    """Say how far the work is."""
    answer("progress", what=what, done=done, total=total)


def facts(**values):
    """Give plain values for the result's manifest."""
    answer("facts", facts=values)


def note(text):
    """Say what the user should know."""
    answer("note", text=text)


def done():
    """Say that the result is written."""
    answer("done")


def fail(message):
    """Give up for a reason that the user can understand."""
    answer("error", message=message)
    sys.exit(1)


def packages(*names):
    """Say which versions made the result."""
    from importlib.metadata import version

    facts(tool_versions={name: version(name) for name in names})


class Stopwatch:
    """Times the work itself, without loading and writing, and the most memory of a GPU."""

    def __enter__(self):
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error):
        if error[0] is None:
            values = {"tool_seconds": round(time.perf_counter() - self.started, 3)}
            torch = sys.modules.get("torch")
            if torch is not None:
                values["tool_threads"] = torch.get_num_threads()
                if torch.cuda.is_available():
                    values["tool_gpu_bytes"] = torch.cuda.max_memory_allocated()
            facts(**values)


def report_bars(least=2):
    """Report tqdm's outermost bar of at least ``least`` steps instead of drawing it."""
    import tqdm as package
    import tqdm.auto as automatic

    nowhere = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process runs

    class Reported(package.tqdm):
        open_bars = []

        def __init__(self, *arguments, **settings):
            settings["file"] = nowhere
            settings["disable"] = False
            super().__init__(*arguments, **settings)
            Reported.open_bars.append(self)
            self.report()

        def report(self):
            outermost = Reported.open_bars and Reported.open_bars[0] is self
            if outermost and self.total and self.total >= least:
                what = (self.desc or "").strip().rstrip(":")
                # names of layers in it would make a new bar of every step
                progress(what.split(" ")[0][:30], int(self.n), int(self.total))

        def update(self, n=1):
            super().update(n)
            self.report()

        def __iter__(self):
            for item in self.iterable:
                yield item
                self.update()
            self.close()

        def close(self):
            if self in Reported.open_bars:
                Reported.open_bars.remove(self)
            super().close()

    for module in (package, automatic, getattr(package, "std", package)):
        module.tqdm = Reported
        if hasattr(module, "trange"):
            module.trange = lambda *arguments, **settings: Reported(range(*arguments), **settings)


def tokens(request):
    """Return the calibration samples, int64 [samples, length], as slim's own methods see them."""
    from safetensors.torch import load_file

    return load_file(request["calibration"])["tokens"]

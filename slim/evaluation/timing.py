"""One timed generation: a clock that waits for a GPU, or rather events on it, and the forward pass
compiled or not."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slim.core.errors import SlimError
from slim.core.lazy import LazyModule
from slim.evaluation.generation import decode, prefill

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")


@dataclass(frozen=True)
class Run:
    """Seconds of prefill and decode, and the tokens of all rows of the batch that they are for."""

    prefill: float
    decode: float
    prompt_tokens: int
    decode_tokens: int  # without the first new token of each row, which prefill gives
    all_tokens: int  # prompts and answers


def timed_run(model, prompt: torch.Tensor, new_tokens: int, fixed_cache: bool = False) -> Run:
    """Generate greedily and time prefill and decode.

    Prefill gives the first token, decode the others. An end-of-text token does not stop it.

    Args:
        model: a torch module of transformers.
        prompt: int64 [batch, tokens].
        new_tokens: tokens to generate after it.
        fixed_cache: use a cache of fixed size, whose shapes a compiled forward pass sees once.

    Returns:
        The seconds, and how many tokens they are for.
    """
    batch, length = prompt.shape
    # made before the clock starts: room for the cache is not part of reading a prompt
    cache = None
    if fixed_cache:
        cache = static_cache(model, prompt, new_tokens)
    watch = Stopwatch(prompt.device)
    token, cache = prefill(model, prompt, cache)
    watch.lap()
    for _ in itertools.islice(decode(model, token, cache), new_tokens - 1):
        pass
    watch.lap()
    first, second = watch.seconds()
    return Run(
        first, second, batch * length, batch * (new_tokens - 1), batch * (length + new_tokens)
    )


class Stopwatch:
    """Laps in seconds from now: by events on a GPU, so that giving it work is not waited for, else
    by the clock."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize(device)  # what was queued before is not timed
        self._marks = [self._mark()]

    def _mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self) -> None:
        """End a lap and begin the next."""
        self._marks.append(self._mark())

    def seconds(self) -> list[float]:
        """Return the seconds of all laps."""
        laps = list(itertools.pairwise(self._marks))
        if not self.cuda:
            return [end - start for start, end in laps]
        self._marks[-1].synchronize()  # before that the last event has no time yet
        return [start.elapsed_time(end) / 1000 for start, end in laps]


def static_cache(model, prompt: torch.Tensor, new_tokens: int):
    """Return an empty key/value cache of fixed size.

    Args:
        model: a torch module of transformers.
        prompt: int64 [batch, tokens] that it has room for.
        new_tokens: tokens that it has room for after them.
    """
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)


@contextmanager
def compiled(model, wanted: bool) -> Iterator[None]:
    """Run the body of a ``with`` with ``model.forward`` through torch.compile, and put it back.

    Args:
        model: a torch module.
        wanted: whether to compile; else the body runs on the model as it is.

    Raises:
        SlimError: when it cannot be compiled, which mostly means that there is no compiler.
    """
    if not wanted:
        yield
        return
    plain = model.forward
    model.forward = torch.compile(plain)
    try:
        yield  # the first call in the body compiles
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise SlimError(
            f"torch.compile fails on this model or machine: {reason}\nLeave it out with "
            "eval.speed.compile=false."
        ) from error
    finally:
        model.forward = plain
        torch.compiler.reset()  # the next model would count as a recompilation of this one

"""Who is answered when: a few at once, the others in the order of their coming."""

from __future__ import annotations

import asyncio
from collections import deque

from slim.serve.problems import Refused, stopping


class Line:
    """A queue in front of a few places. All of it runs in one event loop.

    Args:
        at_once: how many are answered at the same time.
        waiting: how many more may wait.

    Attributes:
        running: how many are being answered.
        open: whether anyone may still join.
    """

    def __init__(self, at_once: int, waiting: int):
        self.at_once = at_once
        self.most_waiting = waiting
        self.running = 0
        self.open = True
        self._waiting: deque[Place] = deque()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def join(self) -> Place:
        """Return a place at the end, which is to be left in any case (``with``).

        Raises:
            Refused: the queue is full, or the server is stopping.
        """
        if not self.open:
            raise stopping()
        if self.waiting >= self.most_waiting and self.running >= self.at_once:
            raise Refused(
                f"{self.waiting} requests are waiting, and no more may (--queue). Try again later.",
                429,
                "queue_full",
                wait=1,
            )
        place = Place(self)
        self._waiting.append(place)
        self.advance()
        return place

    def advance(self) -> None:
        """Let those go on for whom there is room."""
        while self._waiting and self.running < self.at_once:
            place = self._waiting.popleft()
            place.running = True
            self.running += 1
            place.turn.set_result(True)

    def before(self, place: Place) -> int:
        """Return how many wait in front of a place."""
        if place not in self._waiting:
            return 0
        return self._waiting.index(place)

    def leave(self, place: Place) -> None:
        """Free a place, whether it waits or is being answered; once is enough."""
        if place in self._waiting:
            self._waiting.remove(place)
        elif place.running:
            place.running = False
            self.running -= 1
        self.advance()

    def close(self) -> None:
        """Let nobody join, and send away who waits; those being answered are not touched."""
        self.open = False
        while self._waiting:
            self._waiting.popleft().turn.set_exception(stopping())


class Place:
    """A place in a line.

    Attributes:
        turn: is done when it is this one's turn.
        running: whether it is being answered.
    """

    def __init__(self, line: Line):
        self.line = line
        self.running = False
        self.turn: asyncio.Future = asyncio.get_running_loop().create_future()
        # nobody may be listening any more when the line closes
        self.turn.add_done_callback(lambda turn: turn.cancelled() or turn.exception())

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_) -> None:
        self.line.leave(self)

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait for one's turn; return whether it has come.

        Args:
            seconds: how long at most; None: until it comes.

        Raises:
            Refused: the server stops before.
        """
        done, _ = await asyncio.wait([self.turn], timeout=seconds)
        if not done:
            return False
        return self.turn.result()

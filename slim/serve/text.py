"""Tokens to text while they come: no half characters, nothing of what ends the answer."""

from __future__ import annotations

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no character yet
LONGEST_CHARACTER = 8  # tokens: after that many, bytes that are no character stay what they are


class TextStream:
    """The text of an answer, piece by piece.

    Args:
        decode: tokens -> text, without special tokens.
        stop: texts that end the answer.

    Attributes:
        stopped: whether one of the stop texts came.
    """

    def __init__(self, decode, stop: tuple[str, ...] = ()):
        self.decode = decode
        self.stop = stop
        self.stopped = False
        self._tokens: list[int] = []
        # tokens[start:read] are decoded already; they come along, since many tokenizers write a
        # token in another way when it is the first
        self._start = 0
        self._read = 0
        self._held = ""  # may be the beginning of a stop text

    def add(self, token: int) -> str:
        """Return what can be shown after another token, perhaps nothing."""
        self._tokens.append(token)
        piece = self._decoded(last=len(self._tokens) - self._read >= LONGEST_CHARACTER)
        return self._released(piece)

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        if self.stopped:
            return ""
        piece = self._held + self._decoded(last=True)
        self._held = ""
        return self._cut(piece)

    def _decoded(self, last: bool) -> str:
        """Return the text of the tokens that are not decoded yet, if it is whole."""
        known = self.decode(self._tokens[self._start : self._read])
        text = self.decode(self._tokens[self._start :])
        if len(text) <= len(known) or (text.endswith(UNFINISHED) and not last):
            return ""
        self._start = self._read
        self._read = len(self._tokens)
        return text[len(known) :]

    def _released(self, piece: str) -> str:
        """Hold back the end of a piece that may begin a stop text."""
        text = self._cut(self._held + piece)
        self._held = ""
        if self.stopped:
            return text
        for length in range(min(len(text), max(map(len, self.stop), default=0)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self.stop):
                self._held = end
                return text[:-length]
        return text

    def _cut(self, text: str) -> str:
        """Return the text before the first stop text in it."""
        places = [text.find(stop) for stop in self.stop if stop in text]
        if places:
            self.stopped = True
            return text[: min(places)]
        return text

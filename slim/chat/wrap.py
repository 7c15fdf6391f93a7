"""Text that comes piece by piece, broken between words where the terminal ends."""

from __future__ import annotations

from rich.cells import cell_len


class Wrapper:
    """Breaks lines between words.

    A word is held back until it is known to end, so that it need not be taken back.

    Args:
        width: columns of the terminal.
    """

    def __init__(self, width: int):
        self.width = width
        self._column = 0
        self._space = ""  # after the last word, not written yet: it vanishes at a line's end
        self._word = ""

    def add(self, piece: str) -> str:
        """Return what can be written after another piece."""
        written = []
        for character in printable(piece):
            if character == "\n":
                written.append(self._end_word() + "\n")
                self._column = 0
                self._space = ""
            elif character == " ":
                written.append(self._end_word())
                self._space += " "
            else:
                self._word += character
                if cell_len(self._word) >= self.width:  # a word longer than a line
                    written.append(self._end_word())
        return "".join(written)

    def finish(self) -> str:
        """Return what is left."""
        return self._end_word()

    def _end_word(self) -> str:
        """Return the word that has ended, with the space or the line break before it."""
        if not self._word:
            return ""
        word = self._word
        length = cell_len(word)
        before = self._space
        if self._column and self._column + len(before) + length > self.width:
            before = "\n"
            self._column = 0
        elif self._column + len(before) + length > self.width:
            before = ""  # an indentation as wide as the terminal
        else:
            self._column += len(before)
        self._column += length
        self._space = ""
        self._word = ""
        return before + word


def printable(text: str) -> str:
    """Return a text without control characters, which a terminal would obey; tabs as spaces."""
    kept = []
    for character in text.replace("\t", "    "):
        if character == "\n" or character.isprintable() or ord(character) > 0x9F:
            kept.append(character)
    return "".join(kept)

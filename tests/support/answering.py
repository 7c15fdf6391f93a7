"""Models that answer, for tests of the chat and of the server."""

from __future__ import annotations

from functools import cache

QUESTION = "Where is the work of a judge done?"
ANSWER = "A judge works in the court."


@cache
def tiny():
    """The embedded model, loaded once in a process."""
    from slim.serve.model import load
    from slim.serve.resolve import find_model

    return load(find_model("tiny", "runs"), "cpu", "float32")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}

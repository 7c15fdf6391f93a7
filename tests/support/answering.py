"""Models that answer, for tests of the chat and of the server."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
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


@contextmanager
def serving(models=None, key: str | None = None, routes=(), **limits):
    """Serve models in a thread; yields the address and the service."""
    from slim.serve.app import make_app
    from slim.serve.server import Server, listen, open_socket
    from slim.serve.service import Limits, Service

    service = Service(models or [tiny()], Limits(**limits))
    with open_socket("127.0.0.1", 0) as endpoint:
        server = Server(make_app(service, key, routes=routes), service)
        thread = threading.Thread(target=server.run, args=([endpoint],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listen(endpoint), service, server
        finally:
            server.should_exit = True
            thread.join(60)
    assert not thread.is_alive()

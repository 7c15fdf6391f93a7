"""The server around the application: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from slim.core.console import say
from slim.core.errors import SlimError
from slim.serve.service import Service

LAST_WORDS = 5  # seconds for sending what there is to say when the time is over
BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, not listening yet.

    Args:
        host: name or address.
        port: 0 for any that is free.

    Raises:
        SlimError: the port is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    endpoint = socket.socket(family, socket.SOCK_STREAM)
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        endpoint.bind((host, port))
    except (OSError, OverflowError) as error:
        endpoint.close()
        reason = getattr(error, "strerror", None) or error
        raise SlimError(
            f"{host}:{port}: {reason}. Choose another with --port (0: any that is free)."
        ) from error
    return endpoint


def listen(endpoint: socket.socket) -> str:
    """Let a bound socket take connections, which wait until they are served.

    Returns:
        Its address as a browser takes it.
    """
    endpoint.listen(BACKLOG)
    host, port = endpoint.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until a signal comes, then lets running answers end.

    Args:
        app: the application.
        service: that it answers with.
    """

    def __init__(self, app: Starlette, service: Service):
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            backlog=BACKLOG,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=int(service.limits.grace) + LAST_WORDS,
        )
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End in order: send away who waits, let answers end, cut them when the time is over."""
        self.service.close()
        running = self.service.line.running
        if running:
            say(f"Stopping; {running} running may take {self.service.limits.grace:.0f} s more.")
        timer = asyncio.get_running_loop().call_later(
            self.service.limits.grace, self.service.cancel
        )
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
            self.service.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop at Ctrl-C and SIGTERM; a second Ctrl-C does not wait for anything.

        Unlike uvicorn's, it does not raise the signal again: a server that was asked to end, and
        has ended, did what it was asked.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def serve(app: Starlette, service: Service, endpoint: socket.socket) -> None:
    """Serve until a signal ends it.

    Args:
        app: the application.
        service: that it answers with.
        endpoint: a bound socket.
    """
    Server(app, service).run(sockets=[endpoint])

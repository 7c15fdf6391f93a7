"""The routes, and what stands in front of them: the key, the size of requests, where they come
from."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slim.core.errors import SlimError
from slim.serve.problems import Refused
from slim.serve.service import Service, refusal_of

LOCAL = ("127.0.0.1", "localhost", "::1")
WITHOUT_KEY = ("/health",)
# of a request: so much, and so much for each token of the longest context; a token is seldom more
# than four characters, each of which takes up to six bytes in JSON
BASE_BYTES, BYTES_PER_TOKEN = 2**18, 24


def make_app(
    service: Service,
    key: str | None = None,
    local: bool = True,
    origins: Iterable[str] = (),
    routes: Iterable[BaseRoute] = (),
) -> Starlette:
    """Return the application.

    Args:
        service: answers.
        key: that requests must have; None: none is needed.
        local: whether it is for this machine only.
        origins: addresses of pages elsewhere that may ask.
        routes: further ones.
    """
    longest = max(model.context for model in service.models.values())
    guards = [
        Middleware(Origins, local=local, allowed=tuple(origins)),
        Middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"]
        ),  # fmt: skip
        Middleware(Key, key=key),
        Middleware(Size, limit=BASE_BYTES + BYTES_PER_TOKEN * longest),
    ]
    return Starlette(
        routes=[
            Route("/health", service.health),
            Route("/v1/models", service.list_models),
            Route("/v1/models/{name:path}", service.show_model),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/completions", service.complete, methods=["POST"]),
            *routes,
        ],
        middleware=guards,
        exception_handlers={
            SlimError: show_refusal,
            HTTPException: show_http,
            Exception: show_refusal,
        },
    )


def refused(error: Refused) -> Response:
    """Return a refusal as a response."""
    headers = {}
    if error.wait is not None:
        headers["Retry-After"] = str(error.wait)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def show_refusal(request: Request, error: Exception) -> Response:
    """Answer a request that cannot be answered."""
    return refused(refusal_of(error))


async def show_http(request: Request, error: HTTPException) -> Response:
    """Answer a wrong path or method."""
    path = request.url.path
    message = f"{request.method} {path}: {error.detail}. There are /v1/models, "
    message += "/v1/chat/completions, /v1/completions and /health."
    return refused(Refused(message, error.status_code))


class Guard:
    """Looks at requests before anything else does.

    Args:
        app: what comes after it.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    def check(self, request: Request) -> None:
        """Raise ``Refused`` for a request that may not pass."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self.check(Request(scope))
        except Refused as error:
            await refused(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class Origins(Guard):
    """Refuses what pages of other addresses send through their reader's browser.

    Args:
        app: what comes after it.
        local: whether only this machine's names may be used, too: a name of elsewhere that leads
            here is how a page gets round the first rule (DNS rebinding).
        allowed: addresses of pages that may ask.
    """

    def __init__(self, app: ASGIApp, local: bool, allowed: tuple[str, ...]):
        super().__init__(app)
        self.local = local
        self.allowed = allowed

    def check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self.local and host_name(host) not in LOCAL:
            raise Refused(f"{host}: this server is for this machine only.", 403)
        origin = request.headers.get("origin")
        if origin is None or origin in self.allowed or origin.partition("://")[2] == host:
            return
        raise Refused(f"Pages of {origin} may not ask this server (--allow-origin).", 403)


def host_name(host: str) -> str | None:
    """Return the name in a ``Host`` header, without the port; None where there is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:  # half an address of IPv6
        return None


class Key(Guard):
    """Asks for a key.

    Args:
        app: what comes after it.
        key: the key; None: all may pass.
    """

    def __init__(self, app: ASGIApp, key: str | None):
        super().__init__(app)
        self.key = key

    def check(self, request: Request) -> None:
        if self.key is None or request.url.path in WITHOUT_KEY or request.method == "OPTIONS":
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        equal = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if scheme.lower() != "bearer" or not equal:
            raise Refused(
                "The key is missing or wrong. Send 'Authorization: Bearer KEY'.",
                401,
                "invalid_api_key",
            )


class Size(Guard):
    """Refuses requests that are larger than any prompt that fits.

    Args:
        app: what comes after it.
        limit: bytes.
    """

    def __init__(self, app: ASGIApp, limit: int):
        super().__init__(app)
        self.limit = limit

    def check(self, request: Request) -> None:
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.limit:
            raise self.too_large()

    def too_large(self) -> Refused:
        """Return the refusal."""
        return Refused(
            f"The request has more than {self.limit:,} bytes, more than any prompt for the models "
            "here. Shorten it.",
            413,
            "context_length_exceeded",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def counted() -> Message:
            """Receive, and count: a request need not say how long it is."""
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.limit:
                raise self.too_large()
            return message

        await super().__call__(scope, counted, send)

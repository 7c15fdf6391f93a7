"""The page: three files of its own, its settings, and what is preferred.

Everything else it asks for is OpenAI's interface of :mod:`slim.serve`. It loads nothing from
elsewhere, which its ``Content-Security-Policy`` also forbids.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from slim.chat.preferences import Preferences
from slim.data.chat import Message
from slim.serve.asked import read_message
from slim.serve.problems import Refused
from slim.serve.service import read_json

ASSETS = Path(__file__).parent.parent / "assets" / "chat"
FILES = {"/": "chat.html", "/chat.css": "chat.css", "/chat.js": "chat.js"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes(preferences: Preferences, settings: dict) -> list[Route]:
    """Return the routes of the page.

    Args:
        preferences: where preferred answers are kept.
        settings: what the page's fields show at first, name -> value.
    """

    async def file(request: Request) -> Response:
        return FileResponse(ASSETS / FILES[request.url.path], headers=HEADERS)

    async def show_settings(request: Request) -> Response:
        return JSONResponse(settings)

    async def keep(request: Request) -> Response:
        body = await read_json(request)
        messages, answers, preferred = read_preference(body)
        await run_in_threadpool(preferences.add, messages, answers, preferred)
        return JSONResponse({"file": str(preferences.path)}, 201)

    routes = [Route(path, file) for path in FILES]
    return [
        *routes,
        Route("/settings", show_settings),
        Route("/preferences", keep, methods=["POST"]),
    ]


def read_preference(body: Any) -> tuple[list[Message], dict[str, str], str]:
    """Return the messages, the answers and the name of the preferred one.

    Args:
        body: JSON of the page.

    Raises:
        Refused: it is something else.
    """
    if not isinstance(body, dict):
        raise Refused("The preference must be a JSON object.")
    messages, answers, preferred = (body.get(key) for key in ("messages", "answers", "preferred"))
    if not isinstance(messages, list):
        raise Refused("messages: must be a list.", param="messages")
    if not isinstance(answers, dict) or not all(isinstance(text, str) for text in answers.values()):
        raise Refused("answers: must be an object, model -> text.", param="answers")
    if preferred not in answers:
        raise Refused(f"preferred={preferred}: must be one of {', '.join(answers)}.",
                      param="preferred")  # fmt: skip
    asked = [read_message(entry, place) for place, entry in enumerate(messages)]
    if not asked or asked[-1]["role"] != "user":
        raise Refused("messages: There is no question before the answers.", param="messages")
    return asked, answers, preferred

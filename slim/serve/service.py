"""Answers requests: reads them, lets them wait for their turn, has a thread write the answer, and
stops when nobody listens any more."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from slim.core.console import say, warn
from slim.core.errors import SlimError
from slim.evaluation.memory import process_bytes
from slim.serve.asked import Asked, read_request
from slim.serve.line import Line, Place
from slim.serve.model import Answer, ChatModel
from slim.serve.problems import Refused, stopping
from slim.serve.replies import DONE, Reply, comment, event, model_entry

SIGN_OF_LIFE = 5.0  # seconds between two comments to a client that waits
CLIENT_GONE = 499  # nginx's status; nobody reads it


@dataclass(frozen=True)
class Limits:
    """What a server does at most.

    Attributes:
        at_once: answers at the same time.
        waiting: further requests that wait.
        max_tokens: of an answer.
        grace: seconds that answers have to end when the server is stopped.
    """

    at_once: int = 1
    waiting: int = 64
    max_tokens: int = 1024
    grace: float = 30.0


class Service:
    """The models, and who waits for them.

    Args:
        models: that answer.
        limits: of the server.

    Attributes:
        models: name -> model.
        line: who waits.
    """

    def __init__(self, models: list[ChatModel], limits: Limits):
        self.models = {model.name: model for model in models}
        self.limits = limits
        self.line = Line(limits.at_once, limits.waiting)
        self.created = int(time.time())
        self._threads = ThreadPoolExecutor(limits.at_once, thread_name_prefix="answer")
        self._running: set[threading.Event] = set()  # set one to end its answer

    # --- routes -------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 while requests are taken, 503 when the server stops."""
        status, word = 200, "ok"
        if not self.line.open:
            status, word = 503, "stopping"
        content = {
            "status": word,
            "models": list(self.models),
            "running": self.line.running,
            "waiting": self.line.waiting,
            "resident_bytes": process_bytes("VmRSS"),
        }
        return JSONResponse(content, status)

    async def list_models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        entries = [model_entry(model, self.created) for model in self.models.values()]
        return JSONResponse({"object": "list", "data": entries})

    async def show_model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        name = request.path_params["name"]
        if name not in self.models:
            raise Refused(
                f"There is no model {name}. There are: {', '.join(self.models)}.",
                404,
                "model_not_found",
                "model",
            )
        return JSONResponse(model_entry(self.models[name], self.created))

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        return await self._answered(request, chat=True)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        return await self._answered(request, chat=False)

    # --- answers ------------------------------------------------------------------------------

    async def _answered(self, request: Request, chat: bool) -> Response:
        body = await read_json(request)
        most = self.limits.max_tokens
        # a thread: a long prompt takes a while to become tokens
        asked = await run_in_threadpool(read_request, body, self.models, most, chat)
        place = self.line.join()
        if asked.stream:
            return AnswerStream(self._events(asked, place), place)
        reply = await while_connected(request, self._whole(asked, place))
        if reply is None:
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(reply)

    async def _whole(self, asked: Asked, place: Place) -> dict:
        """Return the reply to a request that does not stream."""
        reply = Reply(asked)
        started = time.monotonic()
        with place:
            await place.wait()
            reply.waited = time.monotonic() - started
            texts = []
            for ids in asked.prompts:
                async with aclosing(self._pieces(reply, ids)) as pieces:
                    texts.append("".join([piece async for piece in pieces]))
        self._note(reply)
        return reply.whole(texts)

    async def _events(self, asked: Asked, place: Place) -> AsyncGenerator[str, None]:
        """Yield the events of a stream; what goes wrong after its beginning is an event, too."""
        reply = Reply(asked)
        started = time.monotonic()
        try:
            while not await place.wait(SIGN_OF_LIFE):
                yield comment(f"waiting, {self.line.before(place)} before")
            reply.waited = time.monotonic() - started
            for number, ids in enumerate(asked.prompts):
                if asked.chat:
                    yield reply.part(number, begin=True)
                async with aclosing(self._pieces(reply, ids)) as pieces:
                    async for piece in pieces:
                        yield reply.part(number, piece)
                yield reply.part(number, end=True)
        except Exception as error:  # the status has been sent already
            yield event(refusal_of(error).body())
            return
        if asked.usage:
            yield reply.last_part()
        yield DONE
        self._note(reply)

    async def _pieces(self, reply: Reply, ids: list[int]) -> AsyncGenerator[str, None]:
        """Yield the text of one answer, which a thread writes; whoever stops listening ends it."""
        answer = Answer(len(ids))
        reply.answers.append(answer)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue()
        cancel = threading.Event()
        self._running.add(cancel)

        def put(item) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(queue.put_nowait, item)

        asked = reply.asked

        def write() -> None:
            try:
                for piece in asked.model.answer(ids, asked.sampling, answer, cancel.is_set):
                    put(piece)
                put(None)
            except BaseException as error:  # it belongs to who waits, not to the thread
                put(error)

        self._threads.submit(write)
        try:
            first = asked.chat
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                piece = item.lstrip() if first else item
                if piece:
                    first = False
                    yield piece
            if answer.finish_reason == "cancelled":  # the server stops
                raise stopping()
        finally:
            cancel.set()
            self._running.discard(cancel)

    def _note(self, reply: Reply) -> None:
        """Say what was answered, without its words."""
        answer = reply.answers[-1]
        usage = reply.usage()
        say(
            f"{usage['prompt_tokens']} tokens read, {usage['completion_tokens']} written, "
            f"{answer.writing_rate:,.0f} tok/s, waited {reply.waited:.1f} s",
            head=reply.asked.model.name,
            dim=True,
        )

    # --- the end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Take no more requests, and send away those that wait."""
        self.line.close()

    def cancel(self) -> None:
        """End all answers after their present token."""
        for cancel in list(self._running):
            cancel.set()


class AnswerStream(StreamingResponse):
    """An answer while it comes. However the connection ends, the place in the line is left.

    Args:
        events: what is sent.
        place: in the line.
    """

    def __init__(self, events: AsyncGenerator[str, None], place: Place):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # a client may be gone before the first event is asked for
        with self.place:
            async with aclosing(self.body_iterator):
                await super().__call__(scope, receive, send)


async def read_json(request: Request):
    """Return the JSON of a request. Raises ``Refused`` where it is none."""
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise Refused(f"The request is no JSON: {error}") from error
    except RecursionError as error:
        raise Refused("The request is no JSON that can be read: too many brackets.") from error


async def while_connected(request: Request, work: Awaitable):
    """Return what some work gives, or None where the client hangs up before.

    Args:
        request: whose client may hang up.
        work: is cancelled then.
    """
    task = asyncio.ensure_future(work)
    listener = asyncio.ensure_future(hung_up(request))
    try:
        await asyncio.wait([task, listener], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for left in (task, listener):
            left.cancel()
        await asyncio.gather(task, listener, return_exceptions=True)


async def hung_up(request: Request) -> None:
    """Return when the client hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def refusal_of(error: Exception) -> Refused:
    """Return an error as a refusal; what is not the client's mistake is said here, too."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, SlimError):
        return Refused(str(error), 500, "model_failed")
    warn(f"{type(error).__name__}: {error}", head="An answer failed:")
    return Refused(f"The answer failed: {type(error).__name__}.", 500, "failed")

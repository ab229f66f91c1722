"""Server-sent events, and what must happen when the client goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dovetail.engine.processor import Update
from dovetail.errors import DovetailError
from dovetail.server.errors import ApiError, ClientGoneError, ErrorBody, describe
from dovetail.server.service import Updates

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"

_encoder = msgspec.json.Encoder()
_logger = logging.getLogger("dovetail.server")


def event(payload: Any) -> bytes:
    """One event; numbers that JSON cannot hold must have been replaced before."""
    return b"data: " + _encoder.encode(payload) + b"\n\n"


class ChunkWriter(Protocol):
    """Turns updates into events."""

    def chunk(self, prompt: int, update: Update) -> bytes:
        """The event for one update."""
        ...

    def end(self) -> bytes:
        """The last events."""
        ...


class EventStream(Response):
    """A response of server-sent events.

    An exception from ``updates`` becomes a last event of its own. Whatever ends the response, be it the client,
    closes ``updates``, which frees what they hold.

    Args:
        first: the update that has been awaited already, so that refusals are ordinary responses.
        updates: the others.
    """

    media_type = "text/event-stream"

    def __init__(self, first: tuple[int, Update], updates: Updates, writer: ChunkWriter) -> None:
        self._first = first
        self._updates = updates
        self._writer = writer
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})

    @classmethod
    async def start(cls, updates: Updates, writer: ChunkWriter) -> EventStream:
        """Wait for the first update.

        Raises:
            Exception: what ``updates`` raises before it, for a response that is no stream.
        """
        return cls(await anext(updates), updates, writer)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events while watching for the client's departure."""
        async with aclosing(self._updates):
            try:
                await until_disconnect(receive, self._send(send))
            except (ClientGoneError, OSError):
                _logger.debug("The client left a stream.")

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await _send_part(send, self._writer.chunk(*self._first))
        try:
            async for update in self._updates:
                await _send_part(send, self._writer.chunk(*update))
            await _send_part(send, self._writer.end())
        except OSError:
            raise
        except Exception as error:
            if isinstance(error, DovetailError | ApiError):
                _logger.warning("A stream ended early: %s", error)
            else:
                _logger.error("A stream ended early: %s", type(error).__name__, exc_info=error)
            await _send_part(send, event(ErrorBody(describe(error)[1])))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``, and cancel it as soon as the client is gone. The request's body must have been read.

    Raises:
        ClientGoneError: it went before ``work`` was done.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for unfinished in (task, watcher):
            unfinished.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def or_disconnect(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """``work``'s response; if the client leaves before, the work is cancelled and nobody reads the response."""
    try:
        return await until_disconnect(request.receive, work)
    except ClientGoneError:
        return Response(status_code=499)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

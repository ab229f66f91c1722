"""Request bodies, up to a limit."""

from __future__ import annotations

from starlette.requests import ClientDisconnect, Request

from dovetail.server.errors import ApiError, ClientGoneError

_PATIENCE = 8
"""How many times the limit is read (and thrown away) before the connection is cut: many clients see the answer
only after they have sent everything."""


async def read_body(request: Request, limit: int) -> bytes:
    """The body, if it has at most ``limit`` bytes. Never holds more than that.

    Raises:
        ApiError: 413 for a larger one.
        ClientGoneError: the client left in the middle.
    """
    declared = request.headers.get("content-length", "")
    fits = not (declared.isdecimal() and int(declared) > limit)
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if fits and size <= limit:
                chunks.append(chunk)
                continue
            fits = False
            chunks.clear()
            if size > limit * _PATIENCE:
                break
    except ClientDisconnect as error:
        raise ClientGoneError from error
    if not fits:
        raise ApiError(
            413,
            f"The request body is larger than {limit / 1e6:g} MB; send less, or start the server with a larger "
            "--max-body-mb.",
            code="request_too_large",
            headers={"connection": "close"} if size > limit * _PATIENCE else None,
        )
    return b"".join(chunks)

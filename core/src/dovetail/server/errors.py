"""Errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from dovetail.errors import (
    EngineDeadError,
    EngineOverloadedError,
    RequestError,
    UnknownModelError,
)

RETRY_AFTER = {"retry-after": "1"}


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong.

    Attributes:
        type: ``invalid_request_error`` for the client's faults, ``server_error`` for ours.
        param: the request field at fault.
        code: a machine-readable code, if one fits.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """A refusal that is about HTTP rather than about the engine."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client closed the connection before it had its answer; nobody reads another one."""


def describe(error: Exception) -> tuple[int, ErrorDetail, dict[str, str]]:
    """Status, body and headers for an exception."""
    message = str(error)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, UnknownModelError) else 400
        detail = ErrorDetail(
            message=message, type="invalid_request_error", param=error.param, code=error.code
        )
        return status, detail, {}
    if isinstance(error, ApiError):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return error.status, ErrorDetail(message=message, type=kind, code=error.code), error.headers
    if isinstance(error, HTTPException):
        code = _HTTP_CODES.get(error.status_code)
        detail = ErrorDetail(message=error.detail, type="invalid_request_error", code=code)
        return error.status_code, detail, dict(error.headers or {})
    if isinstance(error, ClientGoneError):
        return 499, ErrorDetail(message="The client left.", type="invalid_request_error"), {}
    if isinstance(error, EngineOverloadedError):
        detail = ErrorDetail(message=message, type="server_error", code="service_unavailable")
        return 503, detail, RETRY_AFTER
    if isinstance(error, EngineDeadError):
        # The traceback is the operator's business, and in the log.
        message = "The engine process died; the server is going down and should be restarted."
        return 500, ErrorDetail(message=message, type="server_error", code="engine_dead"), {}
    message = "The server failed on this request; its log says why."
    return 500, ErrorDetail(message=message, type="server_error", code="internal_error"), {}


_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


async def answer(request: Request, error: Exception) -> Response:
    """Turn an exception into a response; Starlette calls it."""
    if isinstance(error, HTTPException):
        error = _explained(request, error)
    return error_response(error)


def error_response(error: Exception) -> Response:
    """An exception as a response."""
    status, detail, headers = describe(error)
    body = msgspec.json.encode(ErrorBody(detail))
    return Response(body, status, headers, media_type="application/json")


def _explained(request: Request, error: HTTPException) -> HTTPException:
    """Name route and method, which Starlette's own messages do not."""
    texts = {
        404: f"There is no route {request.url.path}.",
        405: f"{request.method} is not allowed on {request.url.path}.",
    }
    return HTTPException(error.status_code, texts.get(error.status_code, error.detail), error.headers)

"""The API key."""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from dovetail.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version"})
"""What probes and scrapers need; it computes nothing and tells nothing about requests."""


class ApiKeyMiddleware:
    """Refuses requests that do not bring the key as ``Authorization: Bearer KEY``.

    Args:
        key: the key; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if self._key is None or scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        scheme, _, token = Headers(scope=scope).get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1", "replace")
        if scheme.lower() == "bearer" and secrets.compare_digest(given, self._key):
            await self._app(scope, receive, send)
            return
        what = "The API key is wrong." if token else "The API key is missing."
        error = ApiError(
            401,
            f"{what} Send it as `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

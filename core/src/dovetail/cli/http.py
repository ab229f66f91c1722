"""What the client commands share: reading server-sent events, and errors of servers in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dovetail.errors import DovetailError


def event(line: str) -> dict[str, Any] | None:
    """The payload of one line of an event stream; None for blank lines, comments and the end mark.

    Raises:
        DovetailError: the server reports an error, or sends something that is no event.
    """
    if not line.startswith("data:"):
        return None
    data = line[len("data:") :].strip()
    if data == "[DONE]":
        return None
    try:
        payload = json.loads(data)
    except ValueError:
        raise DovetailError(f"The server sent an event that is not JSON: {data[:200]!r}.") from None
    if "error" in payload:
        raise DovetailError(f"The server stopped with an error: {message_of(payload)}")
    assert isinstance(payload, dict)
    return payload


def choices(payload: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The choices of one event."""
    yield from (payload or {}).get("choices") or ()


def message_of(body: Any) -> str:
    """The message of an error body in OpenAI's shape, or the body itself."""
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or body)


def refusal(status: int, body: str) -> DovetailError:
    """The error for an HTTP status that is not 200."""
    try:
        text = message_of(json.loads(body))
    except ValueError:
        text = body.strip()[:500] or "(no message)"
    hint = " Give the server's key with --api-key or DOVETAIL_API_KEY." if status in (401, 403) else ""
    return DovetailError(f"The server answered {status}: {text}{hint}")


def unreachable(url: str, error: Exception) -> DovetailError:
    """The error for a server that does not answer."""
    return DovetailError(
        f"No server answers at {url} ({type(error).__name__}: {error}). "
        "Start one with `dovetail serve`, or name another with --url."
    )


def first_model(status: int, body: str, url: str) -> str:
    """The first model that an answer to ``GET /v1/models`` lists.

    Raises:
        DovetailError: the server refuses, lists none, or is something else.
    """
    if status != 200:
        raise refusal(status, body)
    try:
        models = json.loads(body)["data"]
        return str(models[0]["id"])
    except IndexError:
        raise DovetailError(f"The server at {url} lists no model; name one with --model.") from None
    except (ValueError, KeyError, TypeError):
        raise DovetailError(
            f"What answers at {url} does not list models as an OpenAI-compatible server does; check --url."
        ) from None


def headers(api_key: str | None) -> dict[str, str]:
    """The authorization header, if there is a key."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}

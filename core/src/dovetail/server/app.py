"""The HTTP application: routes, and what surrounds every request."""

from __future__ import annotations

import re
import uuid

import msgspec
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail import __version__
from dovetail.errors import DovetailError, UnknownModelError
from dovetail.server.auth import ApiKeyMiddleware
from dovetail.server.chat import create_chat_completion
from dovetail.server.completions import create_completion
from dovetail.server.configuration import Configuration
from dovetail.server.errors import ApiError, ClientGoneError, answer
from dovetail.server.health import Health
from dovetail.server.metrics import CONTENT_TYPE
from dovetail.server.responses import ModelCard, ModelList
from dovetail.server.service import Phase, ServedModel, Service
from dovetail.server.tokens import detokenize, tokenize

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def create_app(service: Service) -> Starlette:
    """The application of one service; it answers from the start, and says so while the model loads."""
    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/ping", health, methods=["GET", "POST"]),
            Route("/version", version, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
            Route("/v1/config", config, methods=["GET"]),
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
            Route("/v1/completions", create_completion, methods=["POST"]),
            Route("/v1/chat/completions", create_chat_completion, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
        ],
        middleware=[
            Middleware(RequestIdMiddleware),
            Middleware(ApiKeyMiddleware, key=service.options.api_key),
        ],
        exception_handlers={
            HTTPException: answer,
            DovetailError: answer,
            ApiError: answer,
            ClientGoneError: answer,
            Exception: answer,
        },
    )
    app.state.service = service
    return app


async def health(request: Request) -> Response:
    """200 when requests are served, else 503 with the reason; and which plugins are not well."""
    state = Health.of(_service(request))
    return _json(state, 200 if state.status is Phase.READY else 503)


async def version(request: Request) -> Response:
    """The version that runs."""
    return _json({"version": __version__})


async def metrics(request: Request) -> Response:
    """Prometheus text."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), headers={"content-type": CONTENT_TYPE})


async def config(request: Request) -> Response:
    """What was asked for, what runs, and why."""
    return _json(Configuration.of(_service(request)))


async def models(request: Request) -> Response:
    """What is served."""
    return _json(ModelList([_card(_service(request).served())]))


async def model(request: Request) -> Response:
    """One served model."""
    served = _service(request).served()
    name = request.path_params["name"]
    if name != served.name:
        raise UnknownModelError(name, [served.name])
    return _json(_card(served))


class RequestIdMiddleware:
    """Gives every request an id, the client's ``X-Request-Id`` if it is sane, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Note the id for the routes, and add it to the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _card(served: ServedModel) -> ModelCard:
    return ModelCard(
        id=served.name,
        created=served.created,
        root=served.config.model_path,
        max_model_len=served.config.max_model_len,
    )


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")

"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dovetail.errors import RequestError
from dovetail.server.body import read_body
from dovetail.server.chat import render
from dovetail.server.protocol import DetokenizeBody, RequestBody, TokenizeBody, TokenizeChatBody
from dovetail.server.responses import Text, Tokens
from dovetail.server.service import Service


async def tokenize(request: Request) -> Response:
    """Token ids of a text, or of messages as the chat template writes them."""
    service: Service = request.app.state.service
    data = await read_body(request, service.max_body_bytes)
    # The two forms are told apart by one field; what is wrong is then said of that form.
    chat = "messages" in (RequestBody.from_json(data).model_extra or {})
    body = TokenizeChatBody.from_json(data) if chat else TokenizeBody.from_json(data)
    model = service.served(body.model)
    if isinstance(body, TokenizeChatBody):
        token_ids = await service.encode(render(body, model), bool(body.add_special_tokens))
    else:
        token_ids = await service.encode(body.prompt, body.add_special_tokens is not False)
    answer = Tokens(count=len(token_ids), max_model_len=model.config.max_model_len, tokens=token_ids)
    if body.return_token_strs:
        answer.token_strs = [model.tokenizer.id_to_token(token) or "" for token in token_ids]
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def detokenize(request: Request) -> Response:
    """The text of token ids."""
    service: Service = request.app.state.service
    body = DetokenizeBody.from_json(await read_body(request, service.max_body_bytes))
    model = service.served(body.model)
    size = model.config.vocab_size
    for token in body.tokens:
        if not 0 <= token < size:
            raise RequestError(
                f"tokens contains {token}; this model's tokens are 0 to {size - 1}.", param="tokens"
            )
    text = Text(await service.decode(body.tokens))
    return Response(msgspec.json.encode(text), media_type="application/json")

"""Whether the options can be honoured here: by the resolver, in memory, and at the port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

from dovetail.cli.doctor.finding import Finding, ok, problem, warning, with_torch
from dovetail.cli.doctor.subject import Subject
from dovetail.errors import ConfigError
from dovetail.sizes import size

ANSWER_SECONDS = 0.5


@with_torch
def options(subject: Subject) -> Iterator[Finding]:
    """What the resolver says."""
    explanation = subject.explanation
    if explanation is None:
        return
    from dovetail import resolver

    level = problem if explanation.config is None else warning
    for count, reason in enumerate(explanation.reasons, start=1):
        yield level(reason, resolver.suggestion(explanation) if count == len(explanation.reasons) else "")
    config = explanation.config
    if config is not None:
        parts = ", ".join(
            f"{part.part} {part.chosen.name}" for part in explanation.parts if part.chosen is not None
        )
        yield ok(f"{parts}; {config.dtype}, {config.max_model_len} tokens per request")


@with_torch
def memory(subject: Subject) -> Iterator[Finding]:
    """Room for the weights and the KV cache of one request, by estimate."""
    explanation = subject.explanation
    if explanation is None or explanation.config is None or subject.folder is None:
        return
    from dovetail.runner.estimate import needed

    need = needed(explanation.config, subject.folder)
    text = (
        f"about {size(need.weights)} of weights and {size(need.one_request)} of KV cache for one request of "
        f"{explanation.config.max_model_len} tokens; {size(need.available)} are available"
    )
    cache = explanation.config.kv_cache_memory
    if cache is not None and cache < need.one_request:
        yield problem(f"{text}; --kv-cache-memory is less than a request needs", "Raise it, or lower --max-model-len.")
    elif need.weights + (cache or need.one_request) <= need.available:
        yield ok(text)
    elif cache is not None and need.weights + need.one_request <= need.available:
        yield problem(f"{text}, and --kv-cache-memory asks for more", "Lower it, or free memory.")
    else:
        yield problem(text, "Lower --max-model-len, quantize the weights (--quantization), or free memory.")


def port(subject: Subject) -> Iterator[Finding]:
    """Whether the server could listen, and who does if not."""
    from dovetail.server.listener import listen

    host, number = subject.server.host, subject.server.port
    try:
        listen(host, number).close()
    except ConfigError as error:
        yield problem(f"{error} {_who(host, number)}", "Or stop what listens there.")
    else:
        yield ok(f"{host}:{number} is free")


def _who(host: str, port: int) -> str:
    """Who answers there, in words."""
    address = f"[{host}]" if ":" in host else host or "localhost"
    directly = build_opener(ProxyHandler({}))
    try:
        with directly.open(f"http://{address}:{port}/version", timeout=ANSWER_SECONDS) as answer:
            version = json.loads(answer.read(1 << 16))["version"]
    except (HTTPError, HTTPException, ValueError, KeyError, TypeError):
        return "Something else than a Dovetail server answers there."
    except OSError:
        return "Nobody answers there over HTTP."
    else:
        return f"A Dovetail server {version} answers there."

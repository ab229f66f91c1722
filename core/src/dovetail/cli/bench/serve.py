"""``dovetail bench serve``: load on a running server."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from dovetail import env
from dovetail.cli import http
from dovetail.cli.bench import report, workload
from dovetail.cli.options import json_option
from dovetail.errors import DovetailError

if TYPE_CHECKING:
    import httpx


@dataclass(slots=True)
class Load:
    """What to send.

    Attributes:
        concurrency: most requests in flight.
        request_rate: requests per second, at random (Poisson) intervals; None sends all at once.
    """

    url: str
    model: str | None
    prompts: list[list[int]]
    output_len: int
    concurrency: int
    request_rate: float | None
    seed: int


@dataclass(slots=True)
class Sample:
    """One request's times, in seconds since it was sent.

    Attributes:
        arrivals: of each piece that carried text.
        output_tokens: as the server counted them.
        error: why it failed, or None.
    """

    arrivals: list[float] = field(default_factory=list)
    end: float = 0.0
    output_tokens: int = 0
    error: str | None = None


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of the server.")
@click.option("--api-key", help="The server's key; default: DOVETAIL_API_KEY.")
@click.option("--model", help="Model to ask for; default: the first that the server lists.")
@click.option(
    "--num-prompts", type=click.IntRange(1), default=64, show_default=True, help="Requests sent in all."
)
@click.option(
    "--concurrency", type=click.IntRange(1), default=32, show_default=True, help="Most requests in flight."
)
@click.option(
    "--request-rate",
    type=click.FloatRange(0, min_open=True),
    help="Requests per second, at random intervals; default: as fast as --concurrency lets them.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of prompts and intervals.")
@workload.workload_options
@json_option
def serve(
    url: str,
    api_key: str | None,
    model: str | None,
    num_prompts: int,
    concurrency: int,
    request_rate: float | None,
    seed: int,
    input_len: int,
    output_len: int,
    vocab_size: int,
    as_json: bool,
) -> None:
    """Send load to a running server: throughput, time to first token, between tokens, and end to end."""
    load = Load(
        url=url,
        model=model,
        prompts=workload.random_prompts(num_prompts, input_len, vocab_size, seed),
        output_len=output_len,
        concurrency=concurrency,
        request_rate=request_rate,
        seed=seed,
    )
    samples, seconds = asyncio.run(run(load, api_key or env.text("DOVETAIL_API_KEY")))
    report.show("serve", summary(samples, seconds, input_len), as_json)


def summary(samples: list[Sample], seconds: float, input_len: int) -> dict[str, float | int | str]:
    """The numbers of a load.

    Raises:
        DovetailError: not one request succeeded.
    """
    good = [sample for sample in samples if sample.error is None]
    if not good:
        raise DovetailError(f"All {len(samples)} requests failed; the first with: {samples[0].error}")
    tokens = sum(sample.output_tokens for sample in good)
    gaps = [b - a for s in good for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    per_token = [
        (s.arrivals[-1] - s.arrivals[0]) / (s.output_tokens - 1)
        for s in good
        if s.arrivals and s.output_tokens > 1
    ]
    return {
        "requests": len(good),
        "failed": len(samples) - len(good),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds,
        "output_tokens_per_second": tokens / seconds,
        "total_tokens_per_second": (tokens + input_len * len(good)) / seconds,
        **report.spread("ttft", [s.arrivals[0] for s in good if s.arrivals]),
        **report.spread("tpot", per_token),
        **report.spread("itl", gaps),
        **report.spread("e2e", [s.end for s in good]),
    }


async def run(load: Load, api_key: str | None) -> tuple[list[Sample], float]:
    """Send the load; returns each request's sample and the seconds it all took.

    Raises:
        DovetailError: no server answers.
    """
    import httpx

    limits = httpx.Limits(max_connections=None)  # the gate below counts; waiting here would be measured
    async with httpx.AsyncClient(
        base_url=load.url,
        headers=http.headers(api_key),
        timeout=httpx.Timeout(30, read=None, pool=None),
        limits=limits,
    ) as client:
        model = load.model or await _first_model(client, load.url)
        gate = asyncio.Semaphore(load.concurrency)
        intervals = random.Random(load.seed)
        tasks = []
        started = time.perf_counter()
        for prompt in load.prompts:
            tasks.append(asyncio.create_task(_request(client, gate, model, prompt, load.output_len)))
            if load.request_rate is not None:
                await asyncio.sleep(intervals.expovariate(load.request_rate))
        samples = await asyncio.gather(*tasks)
        return list(samples), time.perf_counter() - started


async def _first_model(client: httpx.AsyncClient, url: str) -> str:
    import httpx

    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise http.unreachable(url, error) from error
    return http.first_model(response.status_code, response.text, url)


async def _request(
    client: httpx.AsyncClient, gate: asyncio.Semaphore, model: str, prompt: list[int], output_len: int
) -> Sample:
    import httpx

    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sample = Sample()
    async with gate:
        started = time.perf_counter()
        try:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise http.refusal(response.status_code, response.text)
                async for line in response.aiter_lines():
                    payload = http.event(line)
                    if any(choice.get("text") for choice in http.choices(payload)):
                        sample.arrivals.append(time.perf_counter() - started)
                    if payload is not None and payload.get("usage"):
                        sample.output_tokens = payload["usage"]["completion_tokens"]
        except (httpx.HTTPError, DovetailError) as error:
            sample.error = f"{type(error).__name__}: {error}"
        sample.end = time.perf_counter() - started
    return sample

"""What a user of ``make serve`` sees: the demo model over HTTP, through OpenAI's own client."""

from __future__ import annotations

import asyncio

import httpx
import openai

STREAMS = 32


def prompt(i: int) -> str:
    hero = ("king", "fox", "miller", "queen")[i % 4]
    return f"Once upon a time, number {i}, there lived a {hero} who" + " had" * (i % 5)


async def completion(client: openai.AsyncOpenAI, model: str, i: int) -> str:
    """One greedy stream, put together."""
    stream = await client.completions.create(
        model=model, prompt=prompt(i), max_tokens=40, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    return "".join([chunk.choices[0].text async for chunk in stream])


async def test_parallel_streams_equal_sequential_runs(server: str) -> None:
    """In the dtype that the CPU prefers, bit for bit the same whoever else is in the batch."""
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
        model = (await client.models.list()).data[0].id
        together = await asyncio.gather(*(completion(client, model, i) for i in range(STREAMS)))
        alone = [await completion(client, model, i) for i in range(STREAMS)]
    assert together == alone
    assert len(set(together)) > STREAMS // 2, "the prompts are too alike to tell streams apart"


async def test_chat(server: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client:
        reply = await client.chat.completions.create(
            model=(await client.models.list()).data[0].id,
            messages=[{"role": "user", "content": "Tell me a story about a fox."}],
            max_completion_tokens=60,
            seed=1,
        )
    assert len(reply.choices[0].message.content or "") > 60
    assert reply.usage is not None
    assert reply.usage.completion_tokens <= 60


async def test_metrics_answer_while_the_engine_computes(server: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none") as client, httpx.AsyncClient() as http:
        model = (await client.models.list()).data[0].id
        work = asyncio.gather(*(completion(client, model, i) for i in range(STREAMS)))
        running = 0.0
        while not work.done():
            body = (await http.get(f"{server}/metrics")).text
            line = next(line for line in body.splitlines() if line.startswith("vllm:num_requests_running"))
            running = max(running, float(line.split()[-1]))
        await work
    assert running > 1

"""Many requests at once, clients that leave, and a full queue."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import httpx
import pytest

ENDLESS = {"prompt": "say.", "max_tokens": 3000, "ignore_eos": True, "temperature": 0}


def wait_until_idle(server, waiting=0.0):
    server.wait_for_metric("dovetail:num_requests_running", 0.0)
    server.wait_for_metric("dovetail:num_requests_waiting", waiting)


async def stream_text(client, prompt, tokens):
    text = []
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
    return "".join(text)


def test_parallel_streams_say_what_each_says_alone(server):
    prompts = [f"{'pad ' * (i % 7)}{chr(ord('a') + i % 26)}" for i in range(32)]
    alone = [server.complete(prompt, max_tokens=20 + i, ignore_eos=True) for i, prompt in enumerate(prompts)]

    async def together():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            return await asyncio.gather(*(stream_text(client, prompt, 20 + i) for i, prompt in enumerate(prompts)))

    texts = asyncio.run(together())
    assert texts == [answer["choices"][0]["text"] for answer in alone]
    wait_until_idle(server)


def test_a_stream_whose_client_leaves_frees_its_slot(server):
    with server.begun():
        assert server.metric("dovetail:num_requests_running") == 1
        begin = time.monotonic()
    wait_until_idle(server)
    assert time.monotonic() - begin < 1
    assert server.metric("dovetail:kv_cache_usage_perc") == 0


@pytest.mark.parametrize("fields", [{}, {"n": 3}])
def test_clients_that_give_up_on_a_whole_answer_free_their_slots(server, fields):
    name, label = "dovetail:request_success_total", '{finished_reason="abort"}'
    aborted = server.metric(name, label)
    body = {**ENDLESS, "messages": [{"role": "user", "content": "say."}], **fields}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.3)
    wait_until_idle(server)
    assert server.metric(name, label) == aborted + fields.get("n", 1)


def test_clients_that_leave_before_the_first_token_free_their_place(start):
    server = start(config={"max_num_seqs": 1})
    with server.begun():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=0.3)
        server.wait_for_metric("dovetail:num_requests_waiting", 0.0)
        assert server.metric("dovetail:num_requests_running") == 1
    wait_until_idle(server)


def test_a_full_queue_refuses_with_retry_after(start):
    server = start(config={"max_num_seqs": 2}, max_waiting=1)
    third = threading.Thread(target=give_up, args=(server, 1.0))
    with server.begun(), server.begun():
        server.wait_for_metric("dovetail:num_requests_running", 2.0)
        third.start()
        server.wait_for_metric("dovetail:num_requests_waiting", 1.0)
        refused = server.post("/v1/completions", prompt="k", stream=True)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert "--max-waiting is 1" in refused.json()["error"]["message"]
        third.join()
        server.wait_for_metric("dovetail:num_requests_waiting", 0.0)
    wait_until_idle(server)
    assert server.complete("k", max_tokens=1)


def give_up(server, seconds):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=ENDLESS, timeout=seconds)


def test_metrics_answer_while_a_long_step_runs(start):
    server = start(config={"executor": {"delay": 0.5}})
    with server.begun(), httpx.Client(base_url=server.url) as scraper:
        scraper.get("/metrics")
        times = []
        for _ in range(20):
            begin = time.perf_counter()
            assert scraper.get("/metrics").status_code == 200
            times.append(time.perf_counter() - begin)
    assert sorted(times)[len(times) // 2] < 0.05

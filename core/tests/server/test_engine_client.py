"""EngineClient and the engine process, without a server."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import aclosing
from pathlib import Path

import pytest

from dovetail.contracts.executor import Progress
from dovetail.engine.client import EngineClient
from dovetail.errors import ConfigError, DovetailError, EngineDeadError, RequestError
from dovetail.options import EngineOptions
from dovetail.plugins.registry import Registries
from dovetail.testing import engine_request

LETTER_A = 4 + ord("a")
HERE = Path(__file__).parent


@pytest.fixture
async def launch(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    clients = []

    async def begin(progress=None, observer=None, config="{}"):
        (tmp_path / "config.json").write_text(config)
        client = EngineClient("fake_engine:build", observer=observer)
        clients.append(client)
        await client.start(EngineOptions(model=str(tmp_path)), Registries().encode(), progress)
        return client

    yield begin
    for client in clients:
        await client.close()


async def collect(client, *requests):
    tokens = {request.request_id: [] for request in requests}
    async with aclosing(client.generate(requests)) as deltas:
        async for delta in deltas:
            tokens[delta.request_id] += delta.new_token_ids
    return tokens


async def until(condition, seconds=5):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  (statistics have no event)
            await asyncio.sleep(0.01)


async def test_a_folder_too_deep_for_sockets_is_refused(tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with pytest.raises(ConfigError, match="too long for the engine's sockets; set TMPDIR"):
        await EngineClient("fake_engine:build").launch()
    assert not list(deep.iterdir())


async def test_start_reports_progress_and_what_runs(launch):
    seen = []

    class Recorder(Progress):
        def update(self, stage, done, total):
            seen.append((stage, done, total))

    client = await launch(Recorder())
    assert seen == [("load", 1, 1), ("warm-up", 1, 1)]
    assert client.ready.config.max_num_seqs == 16
    assert client.ready.info.block_size == 16
    assert set(client.ready.seconds) == {"import", "resolve", "load", "warm-up"}


async def test_several_requests_share_a_stream_and_end_apart(launch):
    client = await launch()
    short, long = (engine_request([LETTER_A], max_tokens=n) for n in (2, 5))
    tokens = await collect(client, short, long)
    assert tokens[short.request_id] == [LETTER_A + 1, LETTER_A + 2]
    assert len(tokens[long.request_id]) == 5
    assert client.num_live == 0
    assert client.stats.generation_tokens == 7


async def test_leaving_early_aborts_and_drain_waits(launch):
    finished = []
    client = await launch(observer=lambda outputs: finished.extend(d for d in outputs.deltas if d.finish_reason))
    request = engine_request([5], max_tokens=3000)
    async with aclosing(client.generate([request])) as deltas:
        await anext(deltas)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.drain(), 0.1)
        assert client.num_live == 1
    await asyncio.wait_for(client.drain(), 1)
    await until(lambda: finished)
    assert [(delta.request_id, delta.finish_reason) for delta in finished] == [(request.request_id, "abort")]
    assert client.stats.num_running == 0


async def test_abort_ends_the_stream_with_a_delta(launch):
    client = await launch()
    reasons = []
    async with aclosing(client.generate([engine_request([5], max_tokens=3000)])) as deltas:
        async for delta in deltas:
            reasons.append(delta.finish_reason)
            client.abort_all()
            client.abort(["unknown"])
    assert reasons[-1] == "abort"
    assert set(reasons[:-1]) <= {None}


async def test_a_rejected_request_leaves_the_others_alone(launch):
    client = await launch()
    good = asyncio.create_task(collect(client, engine_request([LETTER_A], max_tokens=25, request_id="good")))
    with pytest.raises(RequestError, match="token 9999") as caught:
        await collect(client, engine_request([5], max_tokens=3000), engine_request([9999]))
    assert caught.value.param == "prompt"
    assert len((await good)["good"]) == 25
    await asyncio.wait_for(client.drain(), 1)


async def test_an_idle_engine_sleeps(launch):
    client = await launch()
    await collect(client, engine_request([LETTER_A], max_tokens=2))

    def cpu_ticks():
        return sum(map(int, Path(f"/proc/{client.pid}/stat").read_text().rpartition(")")[2].split()[11:13]))

    before = cpu_ticks()
    await asyncio.sleep(0.5)
    assert cpu_ticks() - before <= 2


@pytest.mark.parametrize("way", ["crash", "kill"])
async def test_death_reaches_every_stream(launch, way):
    client = await launch()
    streams = [asyncio.create_task(collect(client, engine_request([5], max_tokens=3000))) for _ in range(3)]
    await until(lambda: client.stats.num_running == 3)
    if way == "crash":
        streams.append(asyncio.create_task(collect(client, engine_request([0]))))
    else:
        os.kill(client.pid, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(EngineDeadError, match="<crash>" if way == "crash" else "SIGKILL"):
            await stream
    assert client.dead.is_set()
    with pytest.raises(EngineDeadError):
        await collect(client, engine_request([5]))


@pytest.mark.parametrize("closes", ["true", "false"])
async def test_a_dead_engine_is_closed(launch, tmp_path, closes):
    client = await launch(config=f'{{"executor": {{"closes": {closes}}}}}')
    with pytest.raises(EngineDeadError, match="<crash>"):
        await collect(client, engine_request([0]))
    await client.close()
    assert (tmp_path / "closed").exists()
    assert "<crash>" in client.summary


async def test_sigterm_is_the_parents_business(launch):
    client = await launch()
    os.kill(client.pid, signal.SIGTERM)
    assert len(await collect(client, engine_request([LETTER_A], max_tokens=2))) == 1


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ('{"refuse": "odd option"}', ConfigError, "odd option"),
        ('{"misfit": "odd file"}', DovetailError, "odd file"),
        ('{"vanish": 9}', EngineDeadError, "exit code 9"),
        ('{"nonsense": 1}', EngineDeadError, "Traceback"),
    ],
)
async def test_start_fails_with_the_reason(launch, config, error, words):
    with pytest.raises(error, match=words):
        await launch(config=config)


async def test_a_factory_that_cannot_be_imported(monkeypatch):
    client = EngineClient("no_such_module:build")
    with pytest.raises(EngineDeadError, match="no_such_module"):
        await client.start(EngineOptions(), Registries().encode())
    await client.close()


async def test_close_is_idempotent_and_final(launch):
    client = await launch()
    stream = asyncio.create_task(collect(client, engine_request([5], max_tokens=3000)))
    await until(lambda: client.stats.num_running)
    pid = client.pid
    await client.close()
    await client.close()
    with pytest.raises(EngineDeadError, match="stopped"):
        await stream
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not client.dead.is_set()
    assert client.pid is None


async def test_close_before_launch_does_nothing():
    await EngineClient().close()

"""The server's life: bind, spawn the engine, load, serve, drain, exit."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

import uvicorn
from rich.console import Console

from dovetail import checkpoint
from dovetail.engine.client import LOCAL, EngineClient
from dovetail.engine.generation_config import recommended_params
from dovetail.engine.startup_progress import StartupProgress
from dovetail.engine.tokenizer import Tokenizer
from dovetail.options import EngineOptions, ServerOptions, asked
from dovetail.plugins.host import PluginHost
from dovetail.server.app import create_app
from dovetail.server.console import print_configuration
from dovetail.server.listener import listen
from dovetail.server.metrics import Metrics
from dovetail.server.service import Phase, ServedModel, Service

T = TypeVar("T")

_FLUSH_SECONDS = 5
"""What finished responses get to reach their clients."""
_KEEP_ALIVE_SECONDS = 60
"""Longer than the pools of common clients keep idle connections, so that they do not meet a closed one."""
_DEAD_SECONDS = 1.0
"""How long /health says that the engine is dead before the process exits."""

_logger = logging.getLogger("dovetail.server")


def run(engine_options: EngineOptions, server_options: ServerOptions, *, engine_factory: str = LOCAL) -> int:
    """Serve until a signal comes or the engine dies.

    Args:
        engine_factory: see :class:`EngineClient`.

    Returns:
        The exit code: 0 after a signal, 1 if the engine died.

    Raises:
        ConfigError: the options cannot be honoured, or the port is taken.
        DovetailError: the checkpoint does not fit the model.
        EngineDeadError: the engine died while it started.
    """
    listener = listen(server_options.host, server_options.port)
    with listener:
        return asyncio.run(Server(engine_options, server_options, listener, engine_factory).run())


async def in_thread(work: Callable[[], T]) -> T:
    """Run ``work`` in a thread that does not keep the process alive: a download cannot be cancelled."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(outcome: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(lambda: None if future.done() else outcome())

    def body() -> None:
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  (whoever awaits gets it)
            failure = error
            settle(lambda: future.set_exception(failure))
        else:
            settle(lambda: future.set_result(result))

    threading.Thread(target=body, daemon=True).start()
    return await future


class HttpServer(uvicorn.Server):
    """uvicorn, except that a signal is passed on instead of ending it at once."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.signalled, self.forced = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain. Second one: leave now."""
        if self.signalled.is_set():
            self.force_exit = True
            self._loop.call_soon_threadsafe(self.forced.set)
        self._loop.call_soon_threadsafe(self.signalled.set)


class Server:
    """One run of ``dovetail serve``.

    Args:
        listener: the bound socket.
        engine_factory: see :class:`EngineClient`.
    """

    def __init__(
        self,
        engine_options: EngineOptions,
        server_options: ServerOptions,
        listener: socket.socket,
        engine_factory: str,
    ) -> None:
        self._engine_options = engine_options
        self._options = server_options
        self._listener = listener
        self._factory = engine_factory
        self._console = Console(stderr=True)

    async def run(self) -> int:
        """The whole life; returns the exit code. Nothing is left behind, whatever happens."""
        self._metrics = Metrics(compat=self._options.compat_metrics)
        self._client = EngineClient(
            self._factory, log_level=self._options.log_level, observer=self._metrics.observe
        )
        self._service = Service(self._options, self._client, self._metrics)
        await self._client.launch()  # first, so that its heavy imports run beside everything below
        self._http = HttpServer(
            uvicorn.Config(
                create_app(self._service),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_FLUSH_SECONDS,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                server_header=False,
            )
        )
        serving = asyncio.create_task(self._http.serve([self._listener]))
        try:
            return await self._live()
        finally:
            self._http.should_exit = True
            await serving
            self._service.close()
            await self._client.close()

    async def _live(self) -> int:
        """Load, serve until something ends it, and say how it ended."""
        signalled = asyncio.create_task(self._http.signalled.wait())
        dead = asyncio.create_task(self._client.dead.wait())
        opening = asyncio.create_task(self._open())
        try:
            await asyncio.wait((opening, signalled), return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                return 0
            opening.result()
            await asyncio.wait((signalled, dead), return_when=asyncio.FIRST_COMPLETED)
            if dead.done():
                return await self._bury()
            return await self._drain(dead)
        finally:
            for task in (signalled, dead, opening):
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await asyncio.wait((task,))

    async def _open(self) -> None:
        """Find plugins and model, load engine and tokenizer side by side, and let requests in."""
        registries = (await in_thread(lambda: PluginHost().discover())).registries
        self._service.note_plugins(registries.plugins)
        registries.refuse_broken()
        path, name = await in_thread(lambda: checkpoint.select(self._engine_options, registries))
        with StartupProgress.shown(self._console) as progress:
            ready, tokenizer = await asyncio.gather(
                self._client.start(self._engine_options, registries.encode(), progress),
                in_thread(lambda: self._load_tokenizer(path)),
            )
        model = ServedModel(
            name=self._options.served_model_name or name,
            tokenizer=tokenizer,
            config=ready.config,
            info=ready.info,
            defaults=recommended_params(path),
            asked=asked(self._engine_options),
        )
        self._service.open(model)
        print_configuration(self._console, model, ready, self._url())

    def _load_tokenizer(self, model: Path) -> Tokenizer:
        name = self._engine_options.tokenizer
        folder = model if name is None else checkpoint.locate_tokenizer(name)
        return Tokenizer.from_folder(folder, self._options.chat_template)

    async def _drain(self, dead: asyncio.Task[bool]) -> int:
        """Let running requests finish, up to the timeout; new ones are refused meanwhile."""
        self._service.phase = Phase.DRAINING
        _logger.info("Draining: %d requests are running.", self._client.num_live)
        start = time.monotonic()
        idle = asyncio.create_task(self._client.drain())
        forced = asyncio.create_task(self._http.forced.wait())
        waiting = (idle, forced, dead)
        await asyncio.wait(
            waiting, timeout=self._options.drain_timeout, return_when=asyncio.FIRST_COMPLETED
        )
        for task in (idle, forced):
            task.cancel()
        if dead.done():
            return await self._bury()
        if self._client.num_live:
            _logger.warning("%d requests did not finish in time.", self._client.num_live)
            self._client.abort_all()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._client.drain(), _FLUSH_SECONDS)
        _logger.info("Drained in %.1f s.", time.monotonic() - start)
        return 0

    async def _bury(self) -> int:
        """The engine died: give clients and probes a moment to learn it, then end with the cause."""
        self._service.phase = Phase.DEAD
        self._metrics.engine_down()
        _logger.error("The engine died:\n%s", self._client.cause)
        await asyncio.sleep(_DEAD_SECONDS)
        return 1

    def _url(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

"""EngineClient: the asyncio side of the engine process."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from dovetail.contracts.executor import Progress
from dovetail.engine import process, socket_folder
from dovetail.engine.process import (
    Abort,
    Add,
    Command,
    Died,
    Outputs,
    Progressed,
    Ready,
    Refused,
    Rejection,
    Start,
    Stop,
)
from dovetail.errors import ConfigError, DovetailError, EngineDeadError, RequestError
from dovetail.messages import EngineRequest, EngineStats, RequestOutputDelta
from dovetail.options import EngineOptions

LOCAL = "dovetail.engine.local:build_engine"
_STOPPED = "The engine was stopped."
_STOP_SECONDS = 5.0
_LAST_WORDS_SECONDS = 0.3
_OUT_OF_MEMORY = (
    " Unless somebody sent that, the system did, for lack of memory: give it more, or lower --kv-cache-memory."
)
_RECONNECT_MS = 10

Observer = Callable[[Outputs], None]
"""Sees every step's news, also of requests whose caller is gone."""


class Stream:
    """The live requests of one :meth:`EngineClient.generate` call."""

    def __init__(self, request_ids: Iterable[str]) -> None:
        self.live = set(request_ids)
        self.aborted: set[str] = set()
        self.news: asyncio.Queue[RequestOutputDelta | Exception] = asyncio.Queue()


class EngineClient:
    """Starts the engine process and talks to it. One event loop calls everything.

    Args:
        factory: ``"module:function"`` that builds the engine there (:data:`dovetail.engine.process.Factory`).
        log_level: of that process.
        observer: called with every step's news.

    Attributes:
        stats: the engine's latest.
        ready: what it reported when it was ready; None before.
        dead: set when the process is gone without having been asked to stop.
        cause: why, once ``dead`` is set; ``summary`` says it on one line.
    """

    def __init__(self, factory: str = LOCAL, *, log_level: str = "info", observer: Observer | None = None) -> None:
        self.stats = EngineStats()
        self.ready: Ready | None = None
        self.dead = asyncio.Event()
        self.cause = ""
        self.summary = ""
        self._factory = factory
        self._log_level = log_level
        self._observer = observer
        self._streams: dict[str, Stream] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._started: asyncio.Future[Ready] | None = None
        self._progress = Progress()
        self._process: Process | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def pid(self) -> int | None:
        """Of the engine process; None before :meth:`launch`."""
        return self._process.pid if self._process is not None else None

    @property
    def num_live(self) -> int:
        """Requests that are sent and not finished."""
        return len(self._streams)

    async def launch(self) -> None:
        """Start the process, which begins its heavy imports at once.

        Raises:
            ConfigError: the folder for temporary files has too long a path for sockets.
        """
        self._folder = Path(tempfile.mkdtemp(prefix=socket_folder.PREFIX, dir=socket_folder.root()))
        context = zmq.Context()
        self._context = context
        self._commands = context.socket(zmq.PUSH)
        self._reports = zmq.asyncio.Context.shadow(context).socket(zmq.PULL)
        for socket in (self._commands, self._reports):
            socket.set_hwm(0)
            socket.linger = 0
        self._commands.reconnect_ivl = _RECONNECT_MS
        self._commands.connect(process.address(self._folder, "commands"))
        self._reports.bind(process.address(self._folder, "reports"))
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", process.__name__, str(self._folder), self._factory),
            *("--log-level", self._log_level),
            stdin=PIPE,  # its end tells the process that we are gone
            start_new_session=True,  # Ctrl-C is for us alone
        )
        self._started = asyncio.get_running_loop().create_future()
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch(self._process))]

    async def start(self, options: EngineOptions, registries: bytes, progress: Progress | None = None) -> Ready:
        """Tell the process what to serve, and wait until it can.

        Args:
            registries: the plugins, from :meth:`Registries.encode`.
            progress: hears of loading and warm-up.

        Raises:
            ConfigError: the options cannot be honoured.
            DovetailError: the checkpoint does not fit the model.
            EngineDeadError: the process failed.
        """
        if self._started is None:
            await self.launch()
        assert self._started is not None
        self._progress = progress or Progress()
        self._send(Start(options, registries))
        self.ready = await self._started
        return self.ready

    async def generate(self, requests: Sequence[EngineRequest]) -> AsyncGenerator[RequestOutputDelta, None]:
        """Run requests and yield what each step adds to any of them, until all are finished.

        Closing the iterator early aborts what is unfinished.

        Raises:
            RequestError: the engine does not take one of them; the others are aborted.
            EngineDeadError: the engine is gone.
        """
        if self.dead.is_set() or self._stopping:
            raise EngineDeadError(self.cause or _STOPPED)
        stream = Stream(request.request_id for request in requests)
        self._streams.update((request_id, stream) for request_id in stream.live)
        self._idle.clear()
        self._send(Add(list(requests)))
        try:
            while stream.live or not stream.news.empty():
                news = await stream.news.get()
                if isinstance(news, Exception):
                    raise news
                yield news
        finally:
            self.abort(stream.live)
            for request_id in stream.live:
                del self._streams[request_id]
            self._note_idle()

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests at once. Their iterators get a last delta with finish reason ``"abort"``."""
        live = [
            request_id
            for request_id in request_ids
            if request_id in self._streams and request_id not in self._streams[request_id].aborted
        ]
        for request_id in live:
            self._streams[request_id].aborted.add(request_id)
        if live and not self.dead.is_set() and not self._stopping:
            self._send(Abort(live))

    def abort_all(self) -> None:
        """End every live request."""
        self.abort(list(self._streams))

    async def drain(self) -> None:
        """Wait until no request is live."""
        await self._idle.wait()

    async def close(self) -> None:
        """Stop the process, by force if it takes long, and remove the sockets. Idempotent."""
        if self._process is None:
            return
        self._stopping = True
        if self._process.returncode is None:
            self._send(Stop())
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS if self.ready else 0.0)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(EngineDeadError(_STOPPED))
        self._commands.close()
        self._reports.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._process = None

    def _send(self, command: Command) -> None:
        # Unlimited queues on a connected socket: never blocks, even before the process has bound its end.
        self._commands.send(self._encoder.encode(command), zmq.NOBLOCK)

    async def _read(self) -> None:
        decoder = msgspec.msgpack.Decoder(process.Report)
        while True:
            report = decoder.decode(await self._reports.recv())
            if isinstance(report, Outputs):
                self._deliver(report)
            elif isinstance(report, Progressed):
                self._progress.update(report.stage, report.done, report.total)
            elif isinstance(report, Ready):
                self._set_started(report)
            elif isinstance(report, Refused):
                self._set_started(ConfigError(report.message) if report.usage else DovetailError(report.message))
            elif isinstance(report, Died):
                self._die(report.cause, report.summary)

    def _deliver(self, outputs: Outputs) -> None:
        self.stats = outputs.stats
        for delta in outputs.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue
            if delta.finish_reason is not None:
                self._forget(delta.request_id, stream)
            stream.news.put_nowait(delta)
        for rejection in outputs.rejections:
            stream = self._streams.get(rejection.request_id)
            if stream is not None:
                self._forget(rejection.request_id, stream)
                stream.news.put_nowait(_request_error(rejection))
        if self._observer is not None:
            self._observer(outputs)

    def _forget(self, request_id: str, stream: Stream) -> None:
        del self._streams[request_id]
        stream.live.discard(request_id)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams:
            self._idle.set()

    async def _watch(self, engine: Process) -> None:
        code = await engine.wait()
        await asyncio.sleep(_LAST_WORDS_SECONDS)  # what it sent before it ended may still be on its way
        if not self._stopping:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            cause = f"The engine process ended {how}.{_OUT_OF_MEMORY if code == -signal.SIGKILL else ''}"
            self._die(cause, cause)

    def _die(self, cause: str, summary: str) -> None:
        if self.dead.is_set():
            return
        self.cause = cause.strip()
        self.summary = summary
        self.dead.set()
        self._fail(EngineDeadError(self.cause))

    def _fail(self, error: EngineDeadError) -> None:
        self._set_started(error)
        for stream in {id(stream): stream for stream in self._streams.values()}.values():
            stream.news.put_nowait(error)

    def _set_started(self, outcome: Ready | DovetailError) -> None:
        if self._started is None or self._started.done():
            return
        if isinstance(outcome, Ready):
            self._started.set_result(outcome)
        else:
            self._started.set_exception(outcome)
            self._started.exception()  # whoever waits is told; nobody waiting is no fault


def _request_error(rejection: Rejection) -> RequestError:
    return RequestError(rejection.message, param=rejection.param, code=rejection.code)

"""The engine process: commands in, steps, reports out.

Started by :class:`dovetail.engine.client.EngineClient` as ``python -m dovetail.engine.process FOLDER FACTORY``:
where its two sockets lie, and the dotted path of what builds the engine. The factory's module is imported
before the first command arrives, so that heavy imports run while the parent still reads its options.

Standard input is a lifeline: it never carries data, and its end means that the parent is gone, however it died.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import zmq

from dovetail.config import EngineConfig
from dovetail.contracts.executor import ExecutorInfo, Progress
from dovetail.errors import ConfigError, DovetailError, PluginError, RequestError
from dovetail.messages import EngineRequest, EngineStats, RequestOutputDelta
from dovetail.options import EngineOptions
from dovetail.plugins.registry import Registries
from dovetail.plugins.remedy import one_line

if TYPE_CHECKING:
    from dovetail.engine.engine import Engine

Factory = Callable[[EngineOptions, Registries, Progress], "tuple[Engine, EngineConfig, ExecutorInfo]"]
"""Builds and loads an engine."""

EXIT_DIED, EXIT_REFUSED, EXIT_ORPHANED = 1, 2, 3
_LINGER_MS = 2000


class Start(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The first command: what to serve, and the parent's plugins (:meth:`Registries.encode`)."""

    options: EngineOptions
    registries: bytes


class Add(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Queue requests."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """End requests; ids that are not live are ignored."""

    request_ids: list[str]


class Stop(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """Close the engine and exit with 0."""


class Progressed(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """``done`` of ``total`` units of a start-up stage are finished."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The engine takes requests.

    Attributes:
        seconds: start-up time by stage, from the start of the process.
    """

    config: EngineConfig
    info: ExecutorInfo
    seconds: dict[str, float]


class Refused(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The engine does not start, for a reason that the user can change.

    Attributes:
        usage: whether the fault is in the options, rather than in the files they name.
    """

    message: str
    usage: bool


class Rejection(msgspec.Struct, frozen=True, array_like=True):
    """One request that the engine did not take; see :class:`RequestError`."""

    request_id: str
    message: str
    param: str | None
    code: str | None


class Outputs(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """One step's news."""

    deltas: list[RequestOutputDelta]
    stats: EngineStats
    rejections: list[Rejection]


class Died(msgspec.Struct, tag=True, frozen=True, array_like=True):
    """The engine failed and the process ends; ``cause`` is the traceback, ``summary`` its essence on one line."""

    cause: str
    summary: str


Command = Start | Add | Abort | Stop
Report = Progressed | Ready | Refused | Outputs | Died


class Channel:
    """The process's two sockets.

    Args:
        commands, reports: ZeroMQ addresses to bind and to connect to.
    """

    def __init__(self, commands: str, reports: str) -> None:
        self._context = zmq.Context()
        self._commands = self._context.socket(zmq.PULL)
        self._reports = self._context.socket(zmq.PUSH)
        for socket in (self._commands, self._reports):
            socket.set_hwm(0)  # neither side ever waits for the other; memory is bounded by the live requests
        self._commands.bind(commands)
        self._reports.connect(reports)
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._encoder = msgspec.msgpack.Encoder()

    def receive(self, wait: bool) -> Iterator[Command]:
        """Every command that is here; with ``wait``, at least one, sleeping until it comes."""
        while self._commands.poll(None if wait else 0):
            yield self._decoder.decode(self._commands.recv())
            wait = False

    def send(self, report: Report) -> None:
        """Never blocks."""
        self._reports.send(self._encoder.encode(report))

    def close(self) -> None:
        """Deliver what is under way, then close."""
        self._commands.close(0)
        self._reports.close(_LINGER_MS)
        self._context.term()


class Reporter(Progress):
    """Passes start-up progress on to the parent."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def update(self, stage: str, done: int, total: int) -> None:
        """Send it."""
        self._channel.send(Progressed(stage, done, total))


def run(channel: Channel, factory: str) -> int:
    """Start, serve, stop and close the engine; returns the exit code. Every failure reaches the parent."""
    try:
        engine = start(channel, factory)
    except DovetailError as error:
        channel.send(Refused(str(error), isinstance(error, ConfigError | PluginError)))
        return EXIT_REFUSED
    except Exception as error:  # noqa: BLE001  (the parent hears of it, whatever it is)
        return _report_death(channel, error)
    if engine is None:
        return 0
    code = 0
    try:
        serve(channel, engine)
    except Exception as error:  # noqa: BLE001
        code = _report_death(channel, error)  # at once: a dead engine may be long in closing
    try:
        engine.close()
    except Exception as error:  # noqa: BLE001
        code = _report_death(channel, error)  # of two, the parent keeps the first
    return code


def _report_death(channel: Channel, error: Exception) -> int:
    """Tell the parent of the error that is being handled; returns the exit code."""
    summary = str(error) if isinstance(error, DovetailError) else one_line(error)
    channel.send(Died(traceback.format_exc(), summary))
    return EXIT_DIED


def start(channel: Channel, factory: str) -> Engine | None:
    """Build the engine and report it ready; None if told to stop instead.

    Raises:
        DovetailError: it cannot be built as asked.
    """
    begin = time.time()
    module, _, name = factory.partition(":")
    build: Factory = getattr(import_module(module), name)
    imported = time.time()
    command = next(channel.receive(wait=True))
    if isinstance(command, Stop):
        return None
    assert isinstance(command, Start), command
    waited = time.time()
    engine, config, info = build(command.options, Registries.decode(command.registries), Reporter(channel))
    gc.collect()
    gc.freeze()  # what start-up made stays; later collections need not look at it
    built = time.time()
    seconds = {
        "import": imported - begin,
        "resolve": max(0.0, built - waited - info.load_seconds - info.warm_up_seconds),
        "load": info.load_seconds,
        "warm-up": info.warm_up_seconds,
    }
    channel.send(Ready(config, info, seconds))
    return engine


def serve(channel: Channel, engine: Engine) -> None:
    """Step while there is work, sleep while there is none, until told to stop.

    Raises:
        Exception: whatever the engine raises; it is then dead.
    """
    while True:
        rejections: list[Rejection] = []
        for command in channel.receive(wait=not engine.has_work()):
            if isinstance(command, Add):
                rejections += _add(engine, command.requests)
            elif isinstance(command, Abort):
                engine.abort(command.request_ids)
            elif isinstance(command, Stop):
                return
        deltas = engine.step() if engine.has_work() else []
        channel.send(Outputs(deltas, engine.stats(), rejections))


def _add(engine: Engine, requests: list[EngineRequest]) -> list[Rejection]:
    rejections = []
    for request in requests:
        try:
            engine.add(request)
        except RequestError as error:
            rejections.append(Rejection(request.request_id, str(error), error.param, error.code))
    return rejections


def hold_lifeline(folder: Path) -> None:
    """Exit at once when standard input ends: the parent is gone. ``folder`` holds the sockets and goes too."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def main() -> int:
    """The process's entry."""
    parser = argparse.ArgumentParser(prog="python -m dovetail.engine.process")
    parser.add_argument("folder", type=Path, help="private folder for the sockets")
    parser.add_argument("factory", help="module:function that builds the engine")
    parser.add_argument("--log-level", default="info")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("dovetail").setLevel(arguments.log_level.upper())
    # A supervisor that signals the whole group means the parent, which drains and then stops this process.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hold_lifeline(arguments.folder)
    channel = Channel(address(arguments.folder, "commands"), address(arguments.folder, "reports"))
    try:
        return run(channel, arguments.factory)
    finally:
        channel.close()


def address(folder: Path, name: str) -> str:
    """The ZeroMQ address of one socket."""
    return f"ipc://{folder / name}"


if __name__ == "__main__":
    sys.exit(main())

"""Where the sockets between server and engine lie."""

from __future__ import annotations

import tempfile
from pathlib import Path

import zmq

from dovetail.errors import ConfigError

PREFIX = "dovetail-"


def root() -> Path:
    """The folder for temporary files, in which each server makes one of its own.

    Raises:
        ConfigError: its path is too long for sockets.
    """
    folder = Path(tempfile.gettempdir())
    if len(bytes(folder / f"{PREFIX}12345678" / "commands")) > zmq.IPC_PATH_MAX_LEN:
        raise ConfigError(f"The path {folder} is too long for the engine's sockets; set TMPDIR to a shorter one.")
    return folder

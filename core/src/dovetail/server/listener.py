"""The socket that a server listens on."""

from __future__ import annotations

import socket

from dovetail.errors import ConfigError


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. It is taken before anything is loaded, so that a clash shows at once.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        return _bound(host, port)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name that a network knows
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Cannot listen on {host}:{port}: {reason}. Choose another --host or --port.") from error


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener

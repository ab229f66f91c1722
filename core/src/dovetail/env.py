"""The environment variables that Dovetail reads. Each is also an option; a bad value is an error.

============================  ===========================================================================
``DOVETAIL_PLUGINS``          comma-separated entry-point names: load these plugins only
``DOVETAIL_DISABLE_PLUGINS``  comma-separated entry-point names: do not import these
``DOVETAIL_TRACE_HOOKS``      1 prints every hook call to stderr
``DOVETAIL_API_KEY``          the server's ``--api-key``
``DOVETAIL_CACHE``            the engine's ``--compile-cache``; without it, ``dovetail`` in ``XDG_CACHE_HOME``
============================  ===========================================================================
"""

from __future__ import annotations

import os
from pathlib import Path

from dovetail.errors import ConfigError


def names(variable: str) -> tuple[str, ...] | None:
    """A comma-separated list, or None when unset."""
    value = os.environ.get(variable)
    if value is None:
        return None
    return tuple(part.strip() for part in value.split(",") if part.strip())


def switch(variable: str) -> bool:
    """A 0/1 switch; unset is 0.

    Raises:
        ConfigError: any other value.
    """
    value = os.environ.get(variable, "0")
    if value not in ("0", "1"):
        raise ConfigError(f"{variable} is {value!r}; set it to 0 or 1.")
    return value == "1"


def text(variable: str) -> str | None:
    """A string, or None when unset."""
    return os.environ.get(variable)


def compile_cache() -> str | None:
    """Where compiled code is kept for the next start; None if the user has no folder to keep anything in."""
    if folder := text("DOVETAIL_CACHE"):
        return folder
    try:
        return str(Path(text("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dovetail")
    except RuntimeError:  # there is no home
        return None

"""Logging of the command line's own process."""

from __future__ import annotations

import logging


def set_up(level: str) -> None:
    """Send Dovetail's messages of at least ``level`` to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("dovetail")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())

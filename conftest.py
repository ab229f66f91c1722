"""What holds for the tests of every package."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Commands that run in this process set up logging, to a stream that is gone after their test."""
    logger = logging.getLogger("dovetail")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    handlers, logger.propagate, level = before
    logger.handlers[:] = handlers
    logger.setLevel(level)

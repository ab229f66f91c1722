"""What plugin authors and our own tests use to test without a device or a model.

``ScriptedExecutor`` stands in for everything below the scheduler: its tokens are a pure function of the
tokens before them, and it checks every plan it is given. ``ScriptedModel.complete`` says, by brute force,
what a request must produce. ``engine_config``, ``engine_request`` and ``run_until_idle`` take the noise out
of a test. Nothing here imports torch.
"""

from __future__ import annotations

from dovetail.testing.engines import (
    Completion,
    engine_config,
    engine_request,
    run_until_idle,
    scripted_engine,
)
from dovetail.testing.scripted_executor import PlanError, ScriptedExecutor, ScriptedFailureError
from dovetail.testing.scripted_model import ScriptedModel

__all__ = [
    "Completion",
    "PlanError",
    "ScriptedExecutor",
    "ScriptedFailureError",
    "ScriptedModel",
    "engine_config",
    "engine_request",
    "run_until_idle",
    "scripted_engine",
]

"""Dovetail: serve large language models on any accelerator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.engine.llm import LLM
    from dovetail.engine.outputs import CompletionOutput, RequestOutput
    from dovetail.hookspecs import hookimpl
    from dovetail.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__", "hookimpl"]

_LAZY = {
    "hookimpl": "dovetail.hookspecs",
    "LLM": "dovetail.engine.llm",
    "CompletionOutput": "dovetail.engine.outputs",
    "RequestOutput": "dovetail.engine.outputs",
    "SamplingParams": "dovetail.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use: plugins import this package during discovery, which must stay light."""
    if name not in _LAZY:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)

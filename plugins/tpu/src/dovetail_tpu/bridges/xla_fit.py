"""Whether torch_xla is here, and fits torch: asked before it is imported, which would name symbols and no versions."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from dovetail.errors import ConfigError

REMEDY = (
    "Install torch_xla with the torch that it fits, in an environment of their own: pip install"
    " 'dovetail-tpu[torch-xla]'. Or take the bridge that runs on current versions of torch: --tpu-bridge jax."
)


def why_not() -> str:
    """Why the bridge over torch_xla cannot be used here, and what to do; empty if it can."""
    missing = [name for name in ("torch_xla", "jax") if importlib.util.find_spec(name) is None]
    if missing:
        return f"The bridge torch_xla needs {' and '.join(missing)}, which is not installed. {REMEDY}"
    ours, theirs = _version("torch"), _version("torch_xla")
    if _minor(ours) != _minor(theirs):
        return f"torch_xla {theirs} works with torch {_minor(theirs)} alone; here is torch {ours}. {REMEDY}"
    return ""


def check_fit() -> None:
    """Before torch_xla is imported.

    Raises:
        ConfigError: it is not installed, or beside another torch than it was built for.
    """
    reason = why_not()
    if reason:
        raise ConfigError(reason)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])

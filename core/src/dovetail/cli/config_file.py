"""``--config FILE.yaml``: the same keys as the command line, checked as strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dovetail.errors import ConfigError
from dovetail.options import KIND_WORDS, is_kind
from dovetail.plugins.registry import nearest


def read(path: Path, known: Mapping[str, type]) -> dict[str, Any]:
    """The values of a YAML file, by field name; dashes and underscores are the same, and null means the default.

    Args:
        known: the type of each key that may stand there.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or given twice, or a value has the wrong type.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML{_place(error)}; write `option: value` lines.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}; write `option: value` lines.")
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ConfigError(
                f"--config {path} has the unknown key {key!r}.{nearest(name, known)} "
                f"Known: {', '.join(known)}."
            )
        if name in values:
            raise ConfigError(f"--config {path} gives {name} twice; keep one.")
        values[name] = None if value is None else _checked(path, name, value, known[name])
    return {name: value for name, value in values.items() if value is not None}


def _place(error: Any) -> str:
    """Where the parser stopped, and at what; only some of its errors know."""
    mark = getattr(error, "problem_mark", None)
    return f" at line {mark.line + 1}, column {mark.column + 1}: {error.problem}" if mark else f": {error.reason}"


def _checked(path: Path, name: str, value: Any, kind: type) -> Any:
    if not is_kind(value, kind):
        hint = " (quote it if it looks like a number)" if kind is str else ""
        raise ConfigError(f"--config {path}: {name} is {value!r}; it must be {KIND_WORDS[kind]}{hint}.")
    return float(value) if kind is float else value

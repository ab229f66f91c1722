"""Reading config.json with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dovetail.errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SHOWN = 80
"""Characters of a value that an error shows."""


class Fields:
    """A checkpoint's config.json.

    A field that is absent or null takes its default, unless a method says otherwise; without a default it is an error.
    """

    def __init__(self, config: Mapping[str, Any], where: str = "config.json") -> None:
        self._config = config
        self._where = where

    def raw(self, name: str) -> Any:
        """The value as it is; None if absent."""
        return self._config.get(name)

    def names(self) -> set[str]:
        """The fields that are there."""
        return set(self._config)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.bad(name, "a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.bad(name, "a positive number")
        return float(value)

    def integer_or_null(self, name: str, default: int | None) -> int | None:
        """A positive integer; null means None, and absent means the default."""
        return None if self._is_null(name, default) else self.integer(name, default)

    def number_or_null(self, name: str, default: float | None) -> float | None:
        """A positive number; null means None, and absent means the default."""
        return None if self._is_null(name, default) else self.number(name, default)

    def switch(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def choice(self, name: str, choices: tuple[Any, ...], default: Any) -> Any:
        """One of a few values."""
        value = self._value(name, default)
        if value not in choices:
            raise self.bad(name, f"{' or '.join(repr(choice) for choice in choices)} in this family")
        return value

    def unset(self, name: str) -> None:
        """A field without a meaning in this family: absent or null."""
        if self.raw(name) is not None:
            raise self.bad(name, "absent in this family")

    def section(self, name: str) -> Fields | None:
        """A nested object; None if absent, null or empty."""
        value = self.raw(name)
        if not value:
            return None
        if not isinstance(value, Mapping):
            raise self.bad(name, "an object")
        return Fields(value, f"{name} of {self._where}")

    def dtype(self) -> torch.dtype:
        """Of the weights: ``dtype``, or ``torch_dtype`` in older files; float32 without either."""
        name = "torch_dtype" if self.raw("dtype") is None else "dtype"
        return DTYPES[self.choice(name, tuple(DTYPES), "float32")]

    def bad(self, name: str, wanted: str) -> ConfigError:
        """The error for a value that cannot be honoured."""
        value = repr(self.raw(name))
        value = value if len(value) <= SHOWN else f"{value[:SHOWN]}…"
        return ConfigError(f"{name!r} in {self._where} is {value}; it must be {wanted}.")

    def _is_null(self, name: str, default: float | None) -> bool:
        return self._config.get(name, default) is None

    def _value(self, name: str, default: Any) -> Any:
        value = self._config.get(name)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self._where} has no {name!r}; the checkpoint is incomplete.")
        return value

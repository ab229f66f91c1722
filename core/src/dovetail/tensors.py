"""The tensors inside a step's tables and metadata, whatever containers hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor


def leaves(value: Any) -> Iterator[Any]:
    """What a value holds, in order: tensors, and whatever is neither a tensor nor a container."""
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def replaced(value: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """The same containers around other tensors."""
    if isinstance(value, Tensor):
        return swap(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: replaced(getattr(value, field.name), swap) for field in fields(value)})
    if isinstance(value, Mapping):
        return {key: replaced(item, swap) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [replaced(item, swap) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value

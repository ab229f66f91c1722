"""KV groups: which layers share pages, and which of a request's pages a group needs.

Every group draws blocks from one pool, so every group's page has the same number of bytes. The j-th layers of
all groups share the same storage, which is possible only if their keys and values have the same shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from dovetail.contracts.executor import KVGroup

LayerKey = tuple[int | None, int, int]
"""Window (None for full attention), key/value heads, head size."""

MAX_PADDING = 8
"""Padding may be one part in this many of the layers: small groups waste less, large ones are fewer."""


def group_layers(layers: Sequence[LayerKey]) -> tuple[KVGroup, ...]:
    """Divide a model's layers, given in order, into KV groups.

    Layers with the same window go together. If windows differ, each window's layers are cut into groups of
    one common size, so that all pages are equal. If shapes differ as well, pages cannot be shared between
    windows, and all layers form one group that keeps every page: attention still masks by each layer's own
    window.
    """
    by_window: dict[int | None, list[int]] = defaultdict(list)
    for index, (window, _, _) in enumerate(layers):
        by_window[window].append(index)
    if len(by_window) == 1:
        (window, members), *_ = by_window.items()
        return (KVGroup(layers=tuple(members), window=window),)
    if len({(heads, size) for _, heads, size in layers}) > 1:
        return (KVGroup(layers=tuple(range(len(layers)))),)
    size = _common_size([len(members) for members in by_window.values()])
    return tuple(
        KVGroup(layers=tuple(members[start : start + size]), window=window)
        for window, members in sorted(by_window.items(), key=lambda item: item[0] or 0)
        for start in range(0, len(members), size)
    )


def _common_size(counts: Sequence[int]) -> int:
    """The largest group size whose padding stays within one ``MAX_PADDING``-th of the layers."""
    total = sum(counts)
    for size in range(max(counts), 1, -1):
        padded = sum(-(-count // size) for count in counts) * size
        if (padded - total) * MAX_PADDING <= total:
            return size
    return 1


def pages_out_of_window(window: int | None, num_computed: int, block_size: int) -> int:
    """Leading pages that no later query sees, when ``num_computed`` tokens are stored.

    The next query is at position ``num_computed`` and sees ``window`` positions, its own included.
    """
    if window is None:
        return 0
    return max(0, num_computed - window + 1) // block_size


def most_pages(window: int | None, num_tokens: int, max_step_tokens: int, block_size: int) -> int:
    """Most pages that ``num_tokens`` tokens hold at once, growing by at most ``max_step_tokens`` per step."""
    pages = -(-num_tokens // block_size)
    if window is None:
        return pages
    return min(pages, -(-(window - 1 + max_step_tokens) // block_size) + 1)


def longest_hit(window: int | None, limit: int, block_size: int, is_cached: Callable[[int], bool]) -> int:
    """The most leading pages, at most ``limit``, that a group can take over from the cache.

    A full group needs each of them, and is searched from the left. A window group needs only those that the
    next query sees, and is searched from the right.
    """
    if window is None:
        for page in range(limit):
            if not is_cached(page):
                return page
        return limit
    end = page = limit
    while page > pages_out_of_window(window, end * block_size, block_size):
        page -= 1
        if not is_cached(page):
            end = page
    return end

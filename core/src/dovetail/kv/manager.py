"""KVCacheManager: gives requests blocks, finds shared prefixes, and takes blocks back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from dovetail.contracts.executor import ExecutorInfo
from dovetail.kv.groups import longest_hit, most_pages, pages_out_of_window
from dovetail.kv.hashing import extend_chain, root_hash
from dovetail.kv.pool import BlockPool
from dovetail.kv.table import BlockTable
from dovetail.messages import NULL_BLOCK

TableUpdate = tuple[int, int, list[int]]
"""KV group, index of the first page that changed, new block ids from there."""


class KVCacheManager:
    """Every request's block table over one pool.

    Args:
        info: pool size, block size and groups.
        enable_caching: whether full blocks can be found again by their content.
        max_step_tokens: most tokens by which a request grows in one step.
        seed: of the hash chain.
    """

    def __init__(self, info: ExecutorInfo, *, enable_caching: bool, max_step_tokens: int, seed: int) -> None:
        self.block_size = info.block_size
        self.pool = BlockPool(info.num_blocks)
        self.windows = [group.window for group in info.groups]
        self.slides = any(window is not None for window in self.windows)
        self._caching = enable_caching
        self._max_step_tokens = max_step_tokens
        self._seed = seed

    def new_table(self, salt: str | None, token_ids: Sequence[int]) -> BlockTable:
        """An empty table for a request that knows ``token_ids``."""
        root = root_hash(self._seed, salt)
        return BlockTable(len(self.windows), root, token_ids if self._caching else (), self.block_size)

    def most_blocks(self, num_tokens: int) -> int:
        """Most blocks that a sequence of ``num_tokens`` holds at once, over all groups."""
        step, size = self._max_step_tokens, self.block_size
        return sum(most_pages(window, num_tokens, step, size) for window in self.windows)

    def find_prefix(self, table: BlockTable, num_known: int) -> int:
        """Pages of the longest cached prefix that every group accepts; it never covers the last known token.

        Each group may only shorten the candidate; when none does, all accept it.
        """
        pages = min(len(table.hashes), (num_known - 1) // self.block_size)
        accepted = -1
        while pages != accepted:
            accepted = pages
            for group, window in enumerate(self.windows):
                pages = longest_hit(window, pages, self.block_size, self._probe(table, group))
        return pages

    def blocks_to_admit(self, table: BlockTable, num_known: int, num_pages: int) -> int:
        """Free blocks that ``num_known`` tokens take, if ``num_pages`` pages come from the cache."""
        shared = sum(sum(map(self.pool.in_use, ids)) for ids in self._prefix(table, num_pages))
        return self.most_blocks(num_known) - shared

    def adopt(self, table: BlockTable, num_pages: int) -> None:
        """Give an empty table the first ``num_pages`` pages of its content from the cache."""
        for group, ids in enumerate(self._prefix(table, num_pages)):
            held = [block for block in ids if block != NULL_BLOCK]
            for block in held:
                self.pool.take(block)
            table.blocks[group].extend(ids)
            table.num_slid[group] = len(ids) - len(held)
        table.capacity = num_pages * self.block_size
        table.num_cached = num_pages

    def grow(self, table: BlockTable, num_tokens: int) -> list[TableUpdate] | None:
        """Make room for ``num_tokens`` tokens.

        Returns:
            What changed; None, and nothing changed, if there are too few free blocks.
        """
        first = table.capacity // self.block_size
        pages = -(-num_tokens // self.block_size) - first
        if pages <= 0:
            return []
        needed = pages * len(self.windows)
        if needed > self.pool.num_free:
            return None
        updates: list[TableUpdate] = []
        for group, ids in enumerate(table.blocks):
            new = self.pool.allocate(pages)
            ids.extend(new)
            updates.append((group, first, new))
        table.capacity += pages * self.block_size
        return updates

    def slide(self, table: BlockTable, num_computed: int) -> list[TableUpdate]:
        """Free the pages that no query at ``num_computed`` or later sees; return what changed.

        Nothing does before ``num_computed`` reaches ``table.slides_at``.
        """
        updates: list[TableUpdate] = []
        for group, window in enumerate(self.windows):
            ids, first = table.blocks[group], table.num_slid[group]
            end = pages_out_of_window(window, num_computed, self.block_size)
            if end <= first:
                continue
            self.pool.free(reversed(ids[first:end]))
            nulls = [NULL_BLOCK] * (end - first)
            ids[first:end] = nulls
            table.num_slid[group] = end
            updates.append((group, first, nulls))
        table.slides_at = self._next_slide(table)
        return updates

    def cache(self, table: BlockTable, token_ids: Sequence[int], num_verified: int) -> None:
        """Offer later requests the full pages of the first ``num_verified`` (computed, accepted) tokens."""
        if not self._caching:
            table.full_at = sys.maxsize
            return
        end = num_verified // self.block_size
        extend_chain(table.hashes, table.root, token_ids, self.block_size)
        for page in range(table.num_cached, end):
            for group, ids in enumerate(table.blocks):
                if ids[page] != NULL_BLOCK:
                    self.pool.register(ids[page], (group, table.hashes[page]))
        table.num_cached = end
        table.full_at = (end + 1) * self.block_size

    def forget(self, table: BlockTable) -> None:
        """Let nobody find this request's pages any more: what they hold is not sound."""
        for ids in table.blocks:
            for block in ids:
                self.pool.forget(block)

    def release(self, table: BlockTable) -> None:
        """Take every block back, tails first, so that prefixes outlive what follows them."""
        for ids in table.blocks:
            self.pool.free(reversed(ids))
        table.clear()

    def _next_slide(self, table: BlockTable) -> int:
        ends = [
            (slid + 1) * self.block_size + window - 1
            for slid, window in zip(table.num_slid, self.windows, strict=True)
            if window is not None
        ]
        return min(ends)

    def _probe(self, table: BlockTable, group: int) -> Callable[[int], bool]:
        """Whether a page of this request is cached for a group."""
        lookup, hashes = self.pool.lookup, table.hashes
        return lambda page: lookup((group, hashes[page])) is not None

    def _prefix(self, table: BlockTable, num_pages: int) -> list[list[int]]:
        """Per group, the cached blocks of the first ``num_pages`` pages; null beyond the window."""
        prefix, lookup = [], self.pool.lookup
        for group, window in enumerate(self.windows):
            slid = pages_out_of_window(window, num_pages * self.block_size, self.block_size)
            found = [lookup((group, digest)) for digest in table.hashes[slid:num_pages]]
            prefix.append([NULL_BLOCK] * slid + [block for block in found if block is not None])
        return prefix

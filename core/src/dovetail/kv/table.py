"""BlockTable: the blocks of one request."""

from __future__ import annotations


class BlockTable:
    """One request's blocks and the hash chain of its tokens.

    Attributes:
        root: parent of the chain's first hash.
        hashes: one per full block of known tokens; outlives preemption, so that nothing is hashed twice.
        blocks: per KV group, one block id per page; all groups have equally many pages.
        capacity: tokens that the pages can store.
        num_cached: leading pages whose content was offered to the prefix cache.
        full_at: verified tokens from which on there is a page to offer; 0 asks the manager.
        num_slid: per KV group, leading pages that slid out of the window.
        slides_at: computed tokens at which the next page slides out of a window.
    """

    __slots__ = ("blocks", "capacity", "full_at", "hashes", "num_cached", "num_slid", "root", "slides_at")

    def __init__(self, num_groups: int, root: bytes) -> None:
        self.root = root
        self.hashes: list[bytes] = []
        self.blocks: list[list[int]] = [[] for _ in range(num_groups)]
        self.capacity = 0
        self.num_cached = 0
        self.full_at = 0
        self.num_slid = [0] * num_groups
        self.slides_at = 0

    def clear(self) -> None:
        """Forget the blocks, keep the hashes."""
        for ids in self.blocks:
            ids.clear()
        self.num_slid = [0] * len(self.blocks)
        self.capacity = self.num_cached = self.full_at = self.slides_at = 0

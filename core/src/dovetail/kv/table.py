"""BlockTable: the blocks of one request."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.kv.hashing import extend_chain


class BlockTable:
    """One request's blocks and the hash chain of its tokens.

    Args:
        root: parent of the chain's first hash.
        token_ids: known tokens to hash, in full blocks of ``block_size``.

    Attributes:
        blocks: per KV group, one block id per page; all groups have equally many pages.
        capacity: tokens that the pages can store.
        num_cached: leading pages whose content was offered to the prefix cache.
        full_at: verified tokens from which on there is a page to offer; 0 asks the manager.
        num_slid: per KV group, leading pages that slid out of the window.
        slides_at: computed tokens at which the next page slides out of a window.
    """

    __slots__ = (
        "_block_size",
        "_hashes",
        "_unhashed",
        "blocks",
        "capacity",
        "full_at",
        "num_cached",
        "num_slid",
        "root",
        "slides_at",
    )

    def __init__(self, num_groups: int, root: bytes, token_ids: Sequence[int], block_size: int) -> None:
        self.root = root
        self._hashes: list[bytes] = []
        self._unhashed: Sequence[int] | None = token_ids
        self._block_size = block_size
        self.blocks: list[list[int]] = [[] for _ in range(num_groups)]
        self.capacity = 0
        self.num_cached = 0
        self.full_at = 0
        self.num_slid = [0] * num_groups
        self.slides_at = 0

    @property
    def hashes(self) -> list[bytes]:
        """One per full block of known tokens; outlives preemption, so that nothing is hashed twice.

        The first look hashes: a request that waits for its turn keeps nobody waiting.
        """
        if self._unhashed is not None:
            token_ids, self._unhashed = self._unhashed, None
            extend_chain(self._hashes, self.root, token_ids, self._block_size)
        return self._hashes

    def clear(self) -> None:
        """Forget the blocks, keep the hashes."""
        for ids in self.blocks:
            ids.clear()
        self.num_slid = [0] * len(self.blocks)
        self.capacity = self.num_cached = self.full_at = self.slides_at = 0

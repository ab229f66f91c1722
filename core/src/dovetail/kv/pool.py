"""BlockPool: equal blocks, reference counts, and a free list that is also the LRU order of cached content."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dovetail.messages import NULL_BLOCK

BlockKey = tuple[int, bytes]
"""KV group and content hash: what a cached block holds."""


class BlockPool:
    """Blocks ``1 … num_blocks - 1``; block 0 is the null block and never handed out.

    A block with references is in use. One without is free, and keeps its content (and key) until it is handed
    out again: eviction is lazy. The free list is a doubly linked list threaded through two integer arrays,
    with the null block as sentinel, so that a hit removes its block from the middle in O(1). Blocks leave at
    the head; cached ones enter at the tail (least recently used first), others at the head, because nothing
    is lost with them.

    Attributes:
        num_blocks: the null block included.
        num_free: blocks without references.
        lookup: the block that holds a content, in use or free; None if there is none.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self._refs = [0] * num_blocks
        self._keys: list[BlockKey | None] = [None] * num_blocks
        self._block_of: dict[BlockKey, int] = {}
        self.lookup: Callable[[BlockKey], int | None] = self._block_of.get
        self._next = [(block + 1) % num_blocks for block in range(num_blocks)]
        self._prev = [(block - 1) % num_blocks for block in range(num_blocks)]

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        total = self.num_blocks - 1
        return (total - self.num_free) / total if total else 0.0

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks from the head; what they held is forgotten. There must be enough."""
        assert count <= self.num_free, f"{count} blocks asked for, {self.num_free} free"
        return [self._pop_head() for _ in range(count)]

    def take(self, block: int) -> None:
        """Add a reference; a free block leaves the free list with its content."""
        if self._refs[block] == 0:
            self._unlink(block)
            self.num_free -= 1
        self._refs[block] += 1

    def in_use(self, block: int) -> bool:
        """Whether anyone holds the block."""
        return self._refs[block] > 0

    def free(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each, in this order; null blocks are skipped.

        Pass the tail of a sequence first: it is then evicted first, and the shared prefix lasts longest.
        """
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} freed twice"
            if self._refs[block] == 0:
                self._link(block, at_head=self._keys[block] is None)
                self.num_free += 1

    def register(self, block: int, key: BlockKey) -> None:
        """Make a block's content findable. The first block with it wins; a later copy stays private."""
        if self._keys[block] is None and key not in self._block_of:
            self._keys[block] = key
            self._block_of[key] = block

    def forget(self, block: int) -> None:
        """Make a block's content unfindable; who holds it keeps it."""
        key = self._keys[block]
        if key is not None:
            del self._block_of[key]
            self._keys[block] = None

    def key_of(self, block: int) -> BlockKey | None:
        """The content that this block is findable by."""
        return self._keys[block]

    def free_order(self) -> Sequence[int]:
        """The free blocks, next to be handed out first."""
        order = []
        block = self._next[NULL_BLOCK]
        while block != NULL_BLOCK:
            order.append(block)
            block = self._next[block]
        return order

    def _pop_head(self) -> int:
        block = self._next[NULL_BLOCK]
        self._unlink(block)
        self.num_free -= 1
        self._refs[block] = 1
        self.forget(block)
        return block

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before] = after
        self._prev[after] = before

    def _link(self, block: int, *, at_head: bool) -> None:
        before = NULL_BLOCK if at_head else self._prev[NULL_BLOCK]
        after = self._next[before]
        self._prev[block], self._next[block] = before, after
        self._next[before] = self._prev[after] = block

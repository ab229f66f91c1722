"""The block pool against a model of it: a list of free blocks and a dictionary of contents."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.kv.pool import BlockPool


def key(name):
    return (0, str(name).encode())


class ModelPool:
    """The same behaviour, with lists."""

    def __init__(self, num_blocks):
        self.order = list(range(1, num_blocks))
        self.refs = dict.fromkeys(range(1, num_blocks), 0)
        self.content = {}

    def allocate(self, count):
        taken, self.order = self.order[:count], self.order[count:]
        for block in taken:
            self.refs[block] = 1
            self.content.pop(block, None)
        return taken

    def take(self, block):
        if self.refs[block] == 0:
            self.order.remove(block)
        self.refs[block] += 1

    def free(self, blocks):
        for block in blocks:
            if block == 0:
                continue
            self.refs[block] -= 1
            if self.refs[block] == 0:
                self.order = [*self.order, block] if block in self.content else [block, *self.order]

    def register(self, block, key):
        if block not in self.content and key not in self.content.values():
            self.content[block] = key

    def lookup(self, key):
        return next((block for block, content in self.content.items() if content == key), None)


@settings(max_examples=150, deadline=None)
@given(num_blocks=st.integers(2, 12), seed=st.integers(0, 2**32))
def test_random_operations_match_the_model(num_blocks, seed):
    rng = random.Random(seed)
    pool, model, held = BlockPool(num_blocks), ModelPool(num_blocks), []
    for _ in range(120):
        action = rng.choice(["allocate", "free", "take", "register"])
        if action == "allocate":
            count = rng.randint(0, pool.num_free)
            blocks = pool.allocate(count)
            assert blocks == model.allocate(count)
            assert 0 not in blocks
            held += blocks
        elif action == "free" and held:
            rng.shuffle(held)
            split = rng.randrange(len(held) + 1)
            gone, held = held[:split], held[split:]
            pool.free([0, *gone])
            model.free([0, *gone])
        elif action == "take":
            name = key(rng.randrange(8))
            block = pool.lookup(name)
            assert block == model.lookup(name)
            if block is not None:
                pool.take(block)
                model.take(block)
                held.append(block)
        elif action == "register" and held:
            block, name = rng.choice(held), key(rng.randrange(8))
            pool.register(block, name)
            model.register(block, name)
        assert list(pool.free_order()) == model.order
        assert pool.num_free == len(model.order)
        assert {b: pool.key_of(b) for b in range(1, num_blocks) if pool.key_of(b)} == model.content
    pool.free(held)
    assert pool.num_free == num_blocks - 1
    assert pool.usage == 0


def test_cached_blocks_are_evicted_least_recently_freed_first():
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    for block in blocks:
        pool.register(block, key(block))
    for block in (3, 1, 4, 2):
        pool.free([block])
    assert pool.allocate(2) == [3, 1]
    assert pool.lookup(key(3)) is None
    assert pool.lookup(key(4)) == 4


def test_uncached_blocks_go_before_cached_ones():
    pool = BlockPool(4)
    pool.allocate(3)
    pool.register(1, key("a"))
    pool.free([1])
    pool.free([2])
    assert pool.allocate(1) == [2]
    assert pool.lookup(key("a")) == 1


def test_content_survives_until_the_block_is_handed_out():
    pool = BlockPool(3)
    first, _second = pool.allocate(2)
    pool.register(first, key("a"))
    pool.free([first])
    assert pool.lookup(key("a")) == first
    pool.take(first)
    assert pool.in_use(first)
    assert pool.num_free == 0
    pool.free([first])
    assert pool.allocate(1) == [first]
    assert pool.lookup(key("a")) is None


def test_the_first_copy_of_a_content_wins():
    pool = BlockPool(3)
    pool.allocate(2)
    pool.register(1, key("a"))
    pool.register(2, key("a"))
    assert pool.lookup(key("a")) == 1
    assert pool.key_of(2) is None


def test_misuse_is_an_internal_error():
    pool = BlockPool(3)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    pool.allocate(1)
    pool.free([1])
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([1])


def test_usage_is_a_share_of_the_usable_blocks():
    pool = BlockPool(5)
    pool.allocate(1)
    assert pool.usage == 0.25
    assert BlockPool(1).usage == 0.0

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.contracts.executor import ExecutorInfo, KVGroup
from dovetail.kv.groups import pages_out_of_window
from dovetail.kv.manager import KVCacheManager
from dovetail.messages import NULL_BLOCK

FULL = KVGroup(layers=(0,))


def window(tokens):
    return KVGroup(layers=(1,), window=tokens)


def manager(groups=(FULL,), num_blocks=20, block_size=4, **options):
    info = ExecutorInfo(num_blocks=num_blocks, block_size=block_size, groups=groups)
    return KVCacheManager(info, **{"enable_caching": True, "max_step_tokens": 64, "seed": 0, **options})


def computed(kv, token_ids, salt=None, verified=None):
    """A table whose tokens are computed and cached."""
    table = kv.new_table(salt, token_ids)
    pages = kv.find_prefix(table, len(token_ids))
    kv.adopt(table, pages)
    assert kv.grow(table, len(token_ids)) is not None
    kv.cache(table, token_ids, len(token_ids) if verified is None else verified)
    return table


def hit(kv, token_ids, salt=None):
    return kv.find_prefix(kv.new_table(salt, token_ids), len(token_ids)) * kv.block_size


def test_a_hit_shares_the_blocks_of_an_equal_prefix():
    kv = manager()
    first = computed(kv, list(range(10)))
    second = computed(kv, [*range(8), 99, 98])
    assert second.blocks[0][:2] == first.blocks[0][:2]
    assert second.blocks[0][2] != first.blocks[0][2]


def test_a_hit_never_covers_the_last_token():
    kv = manager()
    computed(kv, list(range(8)))
    assert hit(kv, list(range(8))) == 4
    assert hit(kv, list(range(9))) == 8
    assert hit(kv, list(range(4))) == 0


def test_only_verified_tokens_are_cached():
    kv = manager()
    computed(kv, list(range(12)), verified=7)
    assert hit(kv, list(range(12))) == 4


def test_a_hit_stops_at_the_first_difference_even_if_later_blocks_are_equal():
    kv = manager()
    computed(kv, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert hit(kv, [1, 1, 1, 9, 2, 2, 2, 2, 3]) == 0


def test_salts_do_not_share():
    kv = manager()
    computed(kv, list(range(9)), salt="a")
    assert hit(kv, list(range(9)), salt="a") == 8
    assert hit(kv, list(range(9))) == 0
    assert hit(kv, list(range(9)), salt="b") == 0


def test_without_caching_nothing_is_hashed_or_hit():
    kv = manager(enable_caching=False)
    table = computed(kv, list(range(9)))
    assert table.hashes == []
    assert hit(kv, list(range(9))) == 0


def test_the_tail_of_a_freed_sequence_is_evicted_first():
    kv = manager(num_blocks=6)
    table = computed(kv, list(range(20)))
    kv.release(table)
    assert hit(kv, list(range(21))) == 20
    other = kv.new_table(None, [50])
    assert kv.grow(other, 8) is not None
    assert hit(kv, list(range(21))) == 12


def test_growing_takes_all_groups_or_nothing():
    kv = manager(groups=(FULL, window(8)), num_blocks=6)
    table = kv.new_table(None, [1])
    assert kv.grow(table, 12) is None
    assert kv.pool.num_free == 5
    assert table.blocks == [[], []]
    assert kv.grow(table, 8) == [(0, 0, [1, 2]), (1, 0, [3, 4])]
    assert kv.grow(table, 8) == []
    assert table.capacity == 8


def test_pages_slide_out_of_the_window_and_come_back_to_the_pool():
    kv = manager(groups=(FULL, window(6)))
    table = computed(kv, list(range(16)))
    free = kv.pool.num_free
    assert kv.slide(table, 8) == []
    assert kv.slide(table, 9) == [(1, 0, [NULL_BLOCK])]
    assert table.slides_at == 13
    assert kv.slide(table, 16) == [(1, 1, [NULL_BLOCK])]
    assert table.blocks[1][:2] == [NULL_BLOCK] * 2
    assert NULL_BLOCK not in table.blocks[0]
    assert kv.pool.num_free == free + 2
    kv.release(table)
    assert kv.pool.num_free == kv.pool.num_blocks - 1


def test_a_window_hit_needs_only_the_last_pages():
    kv = manager(groups=(window(5),), num_blocks=6)
    tokens = list(range(21))
    table = kv.new_table(None, tokens)
    for end in range(4, 21, 4):
        if end > 4:
            kv.slide(table, end - 4)
        kv.grow(table, end)
        kv.cache(table, tokens, end)
    kv.slide(table, 20)
    thief = kv.new_table(None, [77])
    assert kv.grow(thief, 8) is not None
    assert hit(kv, tokens[:9]) == 0
    again = kv.new_table(None, tokens)
    assert kv.find_prefix(again, 21) == 5
    kv.adopt(again, 5)
    assert again.blocks[0] == [NULL_BLOCK] * 4 + table.blocks[0][4:]
    assert again.num_slid == [4]


def test_shared_blocks_in_use_cost_an_admission_nothing():
    kv = manager()
    running = computed(kv, list(range(9)))
    fresh = kv.new_table(None, [*range(8), 50, 51])
    pages = kv.find_prefix(fresh, 10)
    assert kv.blocks_to_admit(fresh, 10, pages) == 1
    kv.release(running)
    assert kv.blocks_to_admit(fresh, 10, pages) == 3


@settings(max_examples=200, deadline=None)
@given(
    windows=st.lists(st.one_of(st.none(), st.integers(1, 14)), min_size=1, max_size=3),
    evicted=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 6))),
    block_size=st.integers(1, 4),
    known=st.integers(1, 29),
)
def test_the_hit_of_several_groups_is_the_longest_that_all_accept(windows, evicted, block_size, known):
    groups = tuple(KVGroup(layers=(i,), window=w) for i, w in enumerate(windows))
    kv = manager(groups=groups, block_size=block_size, num_blocks=200)
    tokens = list(range(7 * block_size))
    table = kv.new_table(None, tokens)
    kv.grow(table, len(tokens))
    for group, ids in enumerate(table.blocks):
        for page, block in enumerate(ids):
            if (group, page) not in evicted:
                kv.pool.register(block, (group, table.hashes[page]))

    def accepts(pages):
        return all(
            (group, page) not in evicted
            for group, w in enumerate(windows)
            for page in range(pages_out_of_window(w, pages * block_size, block_size), pages)
        )

    known = min(known, len(tokens))
    most = (known - 1) // block_size
    again = kv.new_table(None, tokens[:known])
    pages = kv.find_prefix(again, known)
    assert pages == max(n for n in range(most + 1) if accepts(n))
    kv.adopt(again, pages)
    for group, w in enumerate(windows):
        out = pages_out_of_window(w, pages * block_size, block_size)
        assert again.blocks[group] == [NULL_BLOCK] * out + table.blocks[group][out:pages]

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dovetail.kv.hashing import block_hash, extend_chain, root_hash

TOKENS = st.lists(st.integers(0, 3), max_size=14)


def chain(token_ids, root, block_size=3):
    hashes = []
    extend_chain(hashes, root, token_ids, block_size)
    return hashes


@given(TOKENS, TOKENS)
def test_equal_hashes_mean_equal_prefixes(first, second):
    root = root_hash(0)
    for page, (one, other) in enumerate(zip(chain(first, root), chain(second, root), strict=False)):
        end = (page + 1) * 3
        assert (one == other) == (first[:end] == second[:end])


@given(TOKENS, st.integers(0, 14))
def test_extending_a_chain_gives_the_same_as_building_it(token_ids, cut):
    root, hashes = root_hash(0), []
    extend_chain(hashes, root, token_ids[:cut], 3)
    extend_chain(hashes, root, token_ids, 3)
    assert hashes == chain(token_ids, root)
    assert len(hashes) == len(token_ids) // 3


def test_repeated_blocks_differ_by_their_parents():
    hashes = chain([1, 2, 3] * 4, root_hash(0))
    assert len(set(hashes)) == 4
    for parent, child in pairwise(hashes):
        assert child == block_hash(parent, [1, 2, 3])


def test_roots_keep_salts_and_seeds_apart():
    roots = [root_hash(0), root_hash(1), root_hash(0, ""), root_hash(0, "a"), root_hash(0, "\ud800"), root_hash(10)]
    assert len(set(roots)) == len(roots)
    assert root_hash(0, "a") == root_hash(0, "a")


def test_large_token_ids_do_not_wrap():
    root = root_hash(0)
    assert block_hash(root, [2**32 - 1]) != block_hash(root, [2**31 - 1])

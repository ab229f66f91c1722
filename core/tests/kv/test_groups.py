import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.contracts.executor import KVGroup
from dovetail.kv.groups import group_layers, longest_hit, most_pages, pages_out_of_window


def layers(pattern, shape=(2, 16)):
    return [({"f": None, "w": 8, "v": 4}[kind], *shape) for kind in pattern]


def test_equal_layers_form_one_group():
    assert group_layers(layers("ffff")) == (KVGroup(layers=(0, 1, 2, 3)),)
    assert group_layers(layers("www")) == (KVGroup(layers=(0, 1, 2), window=8),)


def test_alternating_layers_form_two_groups():
    groups = group_layers(layers("fwfw"))
    assert groups == (KVGroup(layers=(0, 2)), KVGroup(layers=(1, 3), window=8))


def test_five_windows_per_full_layer_form_groups_of_equal_size():
    groups = group_layers(layers("wwwwwf" * 5))
    assert [len(group.layers) for group in groups] == [5] * 6
    assert [group.window for group in groups] == [None] + [8] * 5
    assert groups[0].layers == (5, 11, 17, 23, 29)


def test_layers_of_different_windows_and_shapes_share_one_group():
    mixed = [(None, 2, 16), (8, 2, 32), (8, 2, 32)]
    assert group_layers(mixed) == (KVGroup(layers=(0, 1, 2)),)


@given(st.text("fwv", min_size=1, max_size=48))
def test_every_layer_is_in_one_group_of_its_window_and_padding_is_bounded(pattern):
    specs = layers(pattern)
    groups = group_layers(specs)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(specs)))
    for group in groups:
        assert {specs[layer][0] for layer in group.layers} == {group.window}
        assert list(group.layers) == sorted(group.layers)
    if len(groups) > 1:
        size = max(len(group.layers) for group in groups)
        assert (size * len(groups) - len(specs)) * 8 <= len(specs)


@given(st.integers(1, 20), st.integers(0, 60), st.integers(1, 7))
def test_a_page_is_out_of_the_window_when_no_later_query_sees_it(window, num_computed, block_size):
    out = pages_out_of_window(window, num_computed, block_size)
    seen = range(max(0, num_computed - window + 1), num_computed + 1)
    for page in range(num_computed // block_size + 1):
        visible = any(page * block_size <= position < (page + 1) * block_size for position in seen)
        assert (page < out) == (not visible)


@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 7), st.integers(0, 60), st.integers(1, 12))
def test_most_pages_is_never_exceeded(window, max_step, block_size, start, step):
    step = min(step, max_step)
    end = start + step
    held = -(-end // block_size) - pages_out_of_window(window, start, block_size)
    assert held <= most_pages(window, end, max_step, block_size)
    assert most_pages(None, end, max_step, block_size) == -(-end // block_size)


@given(
    st.one_of(st.none(), st.integers(1, 20)), st.integers(1, 5), st.lists(st.booleans(), max_size=12)
)
def test_longest_hit_is_the_longest_that_the_definition_allows(window, block_size, cached):
    def accepts(pages):
        return all(cached[page] for page in range(pages_out_of_window(window, pages * block_size, block_size), pages))

    best = max(pages for pages in range(len(cached) + 1) if accepts(pages))
    assert longest_hit(window, len(cached), block_size, cached.__getitem__) == best


@pytest.mark.parametrize("num_computed", [0, 1, 100])
def test_full_attention_keeps_every_page(num_computed):
    assert pages_out_of_window(None, num_computed, 4) == 0

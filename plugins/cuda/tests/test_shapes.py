from itertools import pairwise

import pytest

from dovetail_cuda.shapes import GraphShapes, rungs


@pytest.mark.parametrize("largest", [1, 3, 8, 37, 512, 8192, 16384])
def test_rungs_end_at_the_largest_step_and_waste_little(largest):
    sizes = rungs(largest)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1 or largest == 1
    assert sizes[-1] == largest
    assert all(after - before <= max(8, before / 4) for before, after in pairwise(sizes))
    assert len(sizes) <= 3 + 4 * largest.bit_length()


def test_decodes_are_padded_finely_and_prompts_to_all_requests():
    shapes = GraphShapes(max_tokens=8192, max_requests=64)
    assert shapes.fit(1, 1) == (1, 1)
    assert shapes.fit(33, 33) == (40, 40)
    assert shapes.fit(60, 3) == (64, 64)
    assert shapes.fit(65, 3) == (80, 64)
    assert shapes.fit(8192, 64) == (8192, 64)


def test_a_start_that_compiles_nothing_tries_few_sizes():
    few = GraphShapes(max_tokens=2048, max_requests=64, every_size=False).ladder()
    assert few == [(512, 64), (64, 64), (8, 8), (1, 1)]
    every = GraphShapes(max_tokens=2048, max_requests=64).ladder()
    assert [bucket.num_tokens for bucket in every] == rungs(2048)[::-1]
    assert set(few) <= set(every)


def test_what_exceeds_the_largest_step_is_refused():
    shapes = GraphShapes(max_tokens=64, max_requests=8)
    for size in ((65, 1), (9, 9)):
        with pytest.raises(ValueError, match="exceed the largest step"):
            shapes.fit(*size)

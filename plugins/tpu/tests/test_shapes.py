import pytest

from dovetail.contracts.platform import Bucket
from dovetail_tpu.shapes import TpuShapes


def test_rungs_are_powers_of_two_with_as_many_requests():
    assert TpuShapes(100, 24).ladder() == [Bucket(128, 24), Bucket(64, 24), Bucket(32, 24), Bucket(16, 16)]


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1, 1), (16, 16)), ((16, 16), (16, 16)), ((17, 3), (32, 24)), ((20, 20), (32, 24)), ((100, 1), (128, 24))],
)
def test_a_step_takes_the_next_rung(size, bucket):
    assert TpuShapes(100, 24).fit(*size) == bucket


@pytest.mark.parametrize("size", [(129, 1), (30, 25)])
def test_a_step_beyond_the_largest_is_refused(size):
    with pytest.raises(ValueError, match=str(size[0])):
        TpuShapes(100, 24).fit(*size)

"""Sizes of memory, in words."""

import pytest

from dovetail.sizes import GIB, KIB, MIB, gib_up, size


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 KiB"), (512, "0.5 KiB"), (MIB, "1.0 MiB"), (300 * MIB, "300.0 MiB"), (3 << 29, "1.50 GiB")],
)
def test_the_largest_unit_that_is_filled(count, text):
    assert size(count) == text


@pytest.mark.parametrize(("count", "gib"), [(1, 0.001), (GIB, 1.0), (GIB + 1, 1.001), (9 * KIB * MIB + 5 * MIB, 9.005)])
def test_what_an_option_in_gib_must_be_given(count, gib):
    assert gib_up(count) == gib
    assert gib_up(count) * GIB >= count

"""Stateless random numbers: distribution, independence and reproducibility."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dovetail.ops.random import Stream, gumbel, row_keys, uniform

N = 1 << 16
KEYS = [4555703879086989499, -2044925084415746977]
BITS = [[338141632, 952363520, 1115632256], [1386531968, 234391728, 1405670400]]


def noise(seeds, positions, columns=N, stream=Stream.SAMPLE):
    return uniform(row_keys(torch.as_tensor(seeds), torch.as_tensor(positions), stream), torch.arange(columns))


def ks_distance(sample, cdf):
    """Kolmogorov–Smirnov distance between a sample and a distribution."""
    values = np.sort(sample)
    expected = cdf(values)
    steps = np.arange(1, len(values) + 1) / len(values)
    return max(np.abs(steps - expected).max(), np.abs(steps - 1 / len(values) - expected).max())


def chi_square(counts, expected):
    """The statistic, in standard deviations from its mean."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = counts.size - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, 123456789])
def test_uniform_is_uniform_over_the_vocabulary(seed):
    u = noise([seed], [0])[0].double().numpy()
    assert u.min() > 0
    assert u.max() < 1
    assert ks_distance(u, lambda x: x) < 1.63 / math.sqrt(N)  # 1 % level
    assert abs(chi_square(np.histogram(u, 256, (0, 1))[0], N / 256)) < 4


def test_uniform_is_uniform_over_positions_and_over_seeds():
    index = torch.arange(N)
    for seeds, positions in ((index, torch.zeros_like(index)), (torch.zeros_like(index), index), (index, index)):
        u = noise(seeds, positions, 1)[:, 0].double().numpy()
        assert ks_distance(u, lambda x: x) < 1.63 / math.sqrt(N)


def test_small_numbers_are_finely_resolved():
    u = noise(torch.arange(64), torch.zeros(64, dtype=torch.int64)).double()
    assert u.min() < 4 / u.numel()
    below = u[u < 2**-12]
    assert below.unique().numel() > 0.99 * below.numel()
    assert abs(below.numel() - u.numel() * 2**-12) < 5 * math.sqrt(u.numel() * 2**-12)


def test_the_largest_bits_do_not_round_to_one():
    """At this column of row (0, 0) the 31 bits are 2³¹ - 21, which float32 rounds up."""
    keys, column = row_keys(torch.tensor([0]), torch.tensor([0]), Stream.SAMPLE), torch.tensor([19968244])
    assert uniform(keys, column).item() == 1 - 2**-24
    assert gumbel(keys, column).isfinite().all()


def test_gumbel_has_the_gumbel_distribution():
    g = gumbel(row_keys(torch.tensor([5]), torch.tensor([9]), Stream.SAMPLE), torch.arange(N))[0].double().numpy()
    assert np.isfinite(g).all()
    assert ks_distance(g, lambda x: np.exp(-np.exp(-x))) < 1.63 / math.sqrt(N)


NEIGHBOURS = {
    "positions": (([7], [10]), ([7], [11])),
    "seeds": (([7], [10]), ([8], [10])),
    "seed and position swapped": (([7], [10]), ([10], [7])),
    "distant seeds": (([7], [10]), ([7 + 2**32], [10])),
    "negated seeds": (([7], [10]), ([-7], [10])),
}


@pytest.mark.parametrize(("one", "other"), NEIGHBOURS.values(), ids=NEIGHBOURS.keys())
def test_neighbouring_rows_are_independent(one, other):
    a, b = noise(*one)[0], noise(*other)[0]
    assert_independent(a, b)
    # Rounding to float32 makes about 170 values equal by chance; were one row a permutation of the other, all.
    assert np.intersect1d(a, b).size < 300


def test_streams_are_independent():
    rows = [noise([7], [10], stream=stream)[0] for stream in Stream]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert_independent(row, other)


def test_streams_do_not_meet_at_other_positions():
    keys = torch.cat([row_keys(torch.zeros(N, dtype=torch.int64), torch.arange(N), stream) for stream in Stream])
    assert keys.unique().numel() == keys.numel()


def test_adjacent_columns_are_independent():
    u = noise([3], [4], N + 1)[0]
    for lag in (1, 2, 3):
        assert_independent(u[:-lag], u[lag:])


def assert_independent(a, b):
    a, b = a.double().numpy(), b.double().numpy()
    assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(len(a))
    cells = np.histogram2d(a, b, bins=16, range=((0, 1), (0, 1)))[0]
    assert abs(chi_square(cells, len(a) / 256)) < 4


def test_positions_have_no_serial_correlation():
    u = noise(torch.zeros(4096, dtype=torch.int64), torch.arange(4096), 16).double()
    for column in u.unbind(1):
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 4 / math.sqrt(4095)


def test_same_inputs_give_same_numbers_in_any_batch_and_for_any_columns():
    seeds, positions = torch.tensor([3, 4, 5]), torch.tensor([0, 1, 2])
    together = noise(seeds, positions, 100)
    for i in range(3):
        assert torch.equal(noise(seeds[i : i + 1], positions[i : i + 1], 100)[0], together[i])
    columns = torch.tensor([[99, 0], [5, 5], [1, 98]])
    chosen = uniform(row_keys(seeds, positions, Stream.SAMPLE), columns)
    assert torch.equal(chosen, together.gather(1, columns))


def test_numbers_never_change():
    """Seeded requests must repeat on any day, so the values are part of the interface."""
    keys = row_keys(torch.tensor([1, -1]), torch.tensor([2, 2**40]), Stream.SAMPLE)
    assert keys.tolist() == KEYS
    bits = uniform(keys, torch.tensor([0, 1, 31999])).mul(2**31).to(torch.int64)
    assert bits.tolist() == BITS


def python_reference(seed, position, stream, column):
    """The same function in Python integers."""

    def mix64(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def mix32(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x ^ (x >> 16)

    golden = 0x9E3779B97F4A7C15
    counter = position * len(Stream) + stream
    key = mix64((mix64((seed + golden) % 2**64) + counter * golden) % 2**64)
    bits = mix32((mix32(column) * (key >> 32 | 1) + key) % 2**32)
    return key, min((bits % 2**31 + 0.5) / 2**31, 1 - 2**-24)


@pytest.mark.parametrize("stream", list(Stream))
def test_matches_the_definition_in_integers(stream):
    for seed, position in ((0, 0), (1, 2), (-1, 77), (2**62, 2**33)):
        keys = row_keys(torch.tensor([seed]), torch.tensor([position]), stream)
        u = uniform(keys, torch.arange(50))[0].tolist()
        for column in range(50):
            key, expected = python_reference(seed, position, int(stream), column)
            assert keys.item() % 2**64 == key
            assert u[column] == pytest.approx(expected, rel=2**-23)


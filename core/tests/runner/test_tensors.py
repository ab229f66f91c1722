from dataclasses import dataclass
from typing import NamedTuple

import torch

from dovetail.tensors import leaves, replaced


@dataclass(frozen=True, slots=True)
class Tables:
    rows: torch.Tensor
    splits: int


class Pair(NamedTuple):
    first: object
    second: object


def test_tensors_are_found_and_replaced_in_every_container():
    a, b, c = (torch.full((2,), i) for i in range(3))
    value = (Tables(a, 4), [Pair(b, "x")], {"c": c, "none": None})
    assert [leaf for leaf in leaves(value) if not isinstance(leaf, torch.Tensor)] == [4, "x", None]
    assert [int(leaf[0]) for leaf in leaves(value) if isinstance(leaf, torch.Tensor)] == [0, 1, 2]
    other = replaced(value, lambda tensor: tensor + 10)
    assert [int(leaf[0]) for leaf in leaves(other) if isinstance(leaf, torch.Tensor)] == [10, 11, 12]
    assert (other[0].splits, type(other[1][0]), other[2]["none"]) == (4, Pair, None)
    assert a.tolist() == [0, 0]

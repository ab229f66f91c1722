"""The format, against arithmetic written down element by element."""

import torch
from dovetail_nibble.packing import quantize


def test_every_weight_is_within_half_a_step():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    packed, scales = quantize(weight, 16)
    assert packed.shape == (6, 32)
    assert scales.shape == (6, 4)
    for o in range(6):
        for i in range(64):
            byte = int(packed[o, i // 2])
            value = byte & 15 if i % 2 == 0 else byte >> 4
            scale = float(scales[o, i // 16])
            # one end of the range has 7 steps: a weight there may be cut off by a whole step
            room = 0.5 if 0 < value < 15 else 1.0
            assert abs((value - 8) * scale - float(weight[o, i])) <= room * abs(scale) + 1e-6


def test_the_largest_of_a_group_is_exact():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    packed, scales = quantize(weight, 4)
    assert (int(packed[0, 0]) >> 4) - 8 == -8
    assert float(scales[0, 0]) * -8 == -3.0
    assert packed[1].tolist() == [0x88, 0x88]

"""What the kernels' tests share: the device, random inputs, and the comparison."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# the interpreter's bfloat16 and float8 are not the chip's
DTYPES = [torch.float32] if INTERPRETED else list(TOLERANCE)


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def close(actual, expected, dtype, looser=1.0):
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    assert bool(actual.isfinite().all())
    error = (actual.cpu().double() - expected.cpu().double()).abs().max()
    assert error <= looser * TOLERANCE[dtype] * expected.abs().max().clamp(min=1e-2).item()

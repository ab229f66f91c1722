"""Gumbel noise of :mod:`dovetail.ops.random`: the same integers, and the same floats as torch's on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.ops.random import Stream

STREAMS = tl.constexpr(len(Stream))


@triton.jit
def row_key(seed: tl.tensor, position: tl.tensor, STREAM: tl.constexpr) -> tl.tensor:
    """See :func:`dovetail.ops.random.row_keys`; uint64, of one row."""
    counter = (position * STREAMS + STREAM).to(tl.uint64)
    return _mix64(_mix64(seed.to(tl.uint64) + 0x9E3779B97F4A7C15) + counter * 0x9E3779B97F4A7C15)


@triton.jit
def gumbel(key: tl.tensor, columns: tl.tensor) -> tl.tensor:
    """See :func:`dovetail.ops.random.gumbel`; float32, of the given columns of one row."""
    odd, offset = (key >> 32).to(tl.uint32) | 1, key.to(tl.uint32)
    bits = _mix32(_mix32(columns.to(tl.uint32)) * odd + offset)
    u = tl.minimum(((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * 2.0**-31, 1.0 - 2.0**-24)
    return -tl.log(-_log1p(-u))


@triton.jit
def _mix64(z: tl.tensor) -> tl.tensor:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _mix32(x: tl.tensor) -> tl.tensor:
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _log1p(x: tl.tensor) -> tl.tensor:
    """CUDA's ``log1pf`` for -1 < x ≤ 0, step by step, because Triton's interpreter has no device library."""
    exponent = ((1.0 + x).to(tl.int32, bitcast=True) - 0x3F400000) & -0x800000
    scaled = (x.to(tl.int32, bitcast=True) - exponent).to(tl.float32, bitcast=True)
    scale = (0x40800000 - exponent).to(tl.float32, bitcast=True)
    m = tl.fma(scale, 0.25, -1.0) + scaled
    series = tl.fma(m, -0.04534861445426941, 0.10546888411045074)
    series = tl.fma(series, m, -0.13229703903198242)
    series = tl.fma(series, m, 0.14491446316242218)
    series = tl.fma(series, m, -0.16641564667224884)
    series = tl.fma(series, m, 0.199888676404953)
    series = tl.fma(series, m, -0.2500019669532776)
    series = tl.fma(series, m, 0.33333510160446167)
    series = m * tl.fma(series, m, -0.5)
    return tl.fma(exponent.to(tl.float32) * 2.0**-23, 0.6931471824645996, tl.fma(series, m, m))

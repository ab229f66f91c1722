"""Norms of heads, rotation and the KV write in one launch, against the operations one by one."""

import pytest
import torch
from inputs import DEVICE, DTYPES, INTERPRETED, close, randn

from dovetail.contracts.attention import AttentionSpec, Preparation
from dovetail.contracts.ops import OpTable
from dovetail_cuda.kernels.cache import write_kv
from dovetail_cuda.kernels.norm import rms_norm
from dovetail_cuda.kernels.projection import HeadTiling, prepare_and_store
from dovetail_cuda.kernels.rotary import rotary

BLOCKS, PAGE = 5, 4
SLOTS = torch.tensor([11, 4, 5, 19, 0, 0, 7], device=DEVICE)
POSITIONS = torch.tensor([31, 2, 3, 14, 0, 0, 49], device=DEVICE)
REFERENCE, ALONE = OpTable(), OpTable(rms_norm=rms_norm, rotary=rotary, write_kv=write_kv)
PLAIN = AttentionSpec(num_heads=5, num_kv_heads=2, head_size=32, scale=1.0)
NARROW = [] if INTERPRETED else [torch.float8_e4m3fn]


def projection(spec, dtype):
    heads = spec.num_heads + 2 * spec.num_kv_heads
    return 3 * randn(len(SLOTS), heads * spec.head_size, dtype=dtype)


def preparation(spec, *, turned=None, weights=None, ops=REFERENCE):
    table = randn(50, turned or spec.head_size, seed=1)
    norms = None if weights is None else tuple(1 + randn(spec.head_size, dtype=weights, seed=s) for s in (2, 3))
    return Preparation(cos_sin_PK=table, norm_weights_K=norms, eps=1e-5, ops=ops)


def caches(spec, dtype, heads_first=True):
    shape = [BLOCKS, spec.num_kv_heads, PAGE, spec.head_size]
    made = [torch.zeros(shape, device=DEVICE).to(dtype) for _ in range(2)]
    return [x.transpose(1, 2) if heads_first else x.transpose(1, 2).contiguous() for x in made]


def one_by_one(qkv, given, spec, kv_dtype):
    """Queries, and keys and values of all blocks but the null block, where padding tokens overwrite each other."""
    stores = caches(spec, kv_dtype)
    q, k, v = given.heads(qkv.clone(), POSITIONS, spec)
    given.ops.write_kv(k, v, *stores, SLOTS)
    return q, *(x[1:] for x in stores)


def at_once(qkv, given, spec, kv_dtype, heads_first=True, tiling=None):
    stores = caches(spec, kv_dtype, heads_first)
    q = prepare_and_store(qkv, POSITIONS, given, spec, *stores, SLOTS, tiling)
    return q, *(x[1:] for x in stores)


def agree(spec, dtype, given, **how):
    qkv = projection(spec, dtype)
    wanted = one_by_one(qkv, given, spec, dtype)
    for out, expected in zip(at_once(qkv, given, spec, dtype, **how), wanted, strict=True):
        close(out, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("size", "turned"), [(32, 32), (24, 24), (40, 16)])
def test_shapes(dtype, norms, size, turned):
    spec = AttentionSpec(num_heads=5, num_kv_heads=2, head_size=size, scale=1.0)
    agree(spec, dtype, preparation(spec, turned=turned, weights=dtype if norms else None))


@pytest.mark.parametrize("tiling", [HeadTiling(1, 1), HeadTiling(2, 1), HeadTiling(16, 4)], ids=str)
def test_cuts(tiling):
    weights = torch.float32
    for dtype in DTYPES:
        agree(PLAIN, dtype, preparation(PLAIN, weights=weights), tiling=tiling, heads_first=False)


def test_strides():
    given, wide = preparation(PLAIN), torch.cat([projection(PLAIN, torch.float32)] * 2, dim=1)
    width = wide.shape[1] // 2
    wanted = one_by_one(wide[:, :width], given, PLAIN, torch.float32)
    for view in (wide.clone()[:, :width], wide.t().contiguous().t()[:, :width]):
        for out, expected in zip(at_once(view, given, PLAIN, torch.float32), wanted, strict=True):
            close(out, expected, torch.float32)


@pytest.mark.parametrize("norms", [False, True])
def test_rounds_where_the_operations_do(norms):
    for dtype in {torch.float16, *DTYPES} - {torch.float32}:
        given = preparation(PLAIN, weights=dtype if norms else None, ops=ALONE)
        for kv_dtype in (dtype, *NARROW):
            qkv = 1000 * projection(PLAIN, dtype)  # more than a narrow cache holds
            wanted = one_by_one(qkv, given, PLAIN, kv_dtype)
            for out, expected in zip(at_once(qkv, given, PLAIN, kv_dtype), wanted, strict=True):
                # a sum in another order may round its mean to another neighbour
                assert (out.float() == expected.float()).float().mean() > (0.99 if norms else 0.9999)
                assert bool(out.float().isfinite().all())


def test_finite():
    for dtype in DTYPES:
        given, qkv = preparation(PLAIN, weights=dtype), projection(PLAIN, dtype)
        qkv[2], qkv[3, -1], qkv[6, -2] = torch.nan, torch.inf, -torch.inf
        stores = caches(PLAIN, dtype)
        prepare_and_store(qkv, POSITIONS, given, PLAIN, *stores, SLOTS, finite=True)
        assert all(bool(x.isfinite().all()) for x in stores)
        slots, largest = SLOTS[[2, 3, 6]], torch.finfo(dtype).max
        assert stores[1][slots // PAGE, slots % PAGE, -1, -2:].tolist()[1:] == [
            [float(qkv[3, -2]), largest],
            [-largest, float(qkv[6, -1])],
        ]


def test_nothing():
    spec, given = PLAIN, preparation(PLAIN)
    q = prepare_and_store(
        projection(spec, torch.float32)[:0], POSITIONS[:0], given, spec, *caches(spec, torch.float32), SLOTS[:0]
    )
    assert q.shape == (0, 5, 32)

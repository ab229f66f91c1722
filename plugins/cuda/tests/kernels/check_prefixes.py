"""Shared prefixes: what is found, and attention that reads them once."""

import pytest
import torch
from check_attention import agree, expected, step
from inputs import DEVICE, DTYPES, close

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.ops import OpTable
from dovetail_cuda.attention import TritonAttention
from dovetail_cuda.kernels import prefixes
from dovetail_cuda.kernels.attention import Tiling, attend, scale_and_cap
from dovetail_cuda.kernels.prefixes import Grouping, attend_prefixes, grouping, shared_tokens
from dovetail_cuda.paged import PagedCache, PagedMetadata

DECODES = [(1, 150), (1, 140), (1, 135), (1, 139), (1, 150), (1, 160), (0, 0), (1, 131), (0, 0), (1, 100), (0, 0)]


def shared(requests=DECODES, pages=8, **choices):
    """The first 8 requests share their first pages."""
    arguments = step(requests, **choices)
    arguments[3][:8, :pages] = arguments[3][0, :pages].clone()
    return arguments


def apart(arguments, request, page):
    """From a page on, a request shares none."""
    arguments[3][request, page] = arguments[3][request, page - 1].clone()
    return arguments


def test_what_is_shared():
    _, _, _, *tables = apart(shared(), 7, 5)
    assert shared_tokens(*tables, 16, 4, least=64).tolist() == [128] * 4 + [64] * 4 + [0] * 3
    assert shared_tokens(*tables, 16, 4, least=65).tolist() == [128] * 4 + [0] * 7


def test_long_prefixes():
    arguments = shared([(1, 900)] * 8, pages=50)
    assert shared_tokens(*arguments[3:], 16, 8).tolist() == [768] * 8
    assert shared_tokens(*apart(arguments, 3, 40)[3:], 16, 8).tolist() == [640] * 8


@pytest.mark.parametrize(
    "requests", [[(2, 150), (1, 150)], [(0, 0), (1, 150)], [(1, 150), (0, 0)], [(1, 64), (1, 150)]]
)
def test_nothing_is_shared(requests):
    _, _, _, *tables = shared(requests)
    assert not shared_tokens(*tables, 16, 2, least=1).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("splits", "cap"), [(1, None), (2, 3.0)])
@pytest.mark.parametrize("parts", [1, 3])
def test_attention(dtype, splits, cap, parts):
    arguments = apart(shared(dtype=dtype), 7, 5)
    tokens_R = shared_tokens(*arguments[3:], 16, 4, least=64)
    assert tokens_R.any()
    found = attend_prefixes(
        *arguments[:5], tokens_R, *scale_and_cap(0.125, cap), cap is not None, Grouping(4, 16, parts)
    )
    tiling = Tiling(rows=16, keys=32, splits=splits, warps=4, stages=2)
    agree(attend(*arguments, 0.125, None, cap, tiling, found), arguments, 0.125, None, cap, dtype=dtype)


def test_backend(monkeypatch):
    monkeypatch.setattr(prefixes, "FEWEST_REQUESTS", 16)
    requests = [(1, 140 + r) for r in range(16)]
    q, keys, values, table, starts, lengths = shared(requests, heads=(4, 2))
    table[:16, :8] = table[0, :8].clone()
    backend = TritonAttention(ops=OpTable(), device=DEVICE, dtype=torch.float32, kv_dtype=torch.float32, block_size=16)
    cache = PagedCache(*(x.transpose(1, 2).contiguous() for x in (keys, values)))
    last = lengths.long() - 1
    slots = table[torch.arange(16), last // 16].long() * 16 + last % 16
    tables = {"block_table_RB": table, "query_start_R1": starts, "seq_lens_R": lengths}
    metadata = PagedMetadata(**tables, slot_mapping_T=slots)
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125)
    last_keys, last_values = (x.flatten(0, 1)[slots] for x in (keys, values))
    out = backend.forward(q[:16], last_keys, last_values, cache, metadata, spec)
    close(out, expected([q, keys, values, table, starts, lengths], 0.125)[:16], torch.float32)
    assert [tokens_R.tolist() for tokens_R in metadata.derived.values()] == [[128] * 4 * 4]


def test_grouping():
    assert grouping(64, 8, 4, 128, 132) is None
    assert grouping(256, 8, 4, 4, 132) is None
    assert grouping(256, 1, 24, 16, 132) is None, "heads that share keys fill more rows than a tile has"
    assert grouping(256, 8, 4, 128, 132) == Grouping(requests=32, rows=128, parts=2)
    assert grouping(80, 4, 8, 128, 132) == Grouping(requests=16, rows=128, parts=6)
    assert grouping(80, 8, 3, 128, 132) == Grouping(requests=32, rows=128, parts=5)

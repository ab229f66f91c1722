"""What surrounds the kernels: the cuts of a step, sizes of caches, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dovetail.contracts.attention import AttentionSpec
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail_tpu import bridges
from dovetail_tpu.attention import Tables, TpuAttention, TpuGatherAttention
from dovetail_tpu.kernels.block_sizes import Blocks

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.125)
VMEM = 64 << 20


def backend(cls=TpuAttention, kv_dtype=torch.float32):
    bridges.open_bridge("jax")
    return cls(ops=OpTable(), device=torch.device("cpu"), dtype=torch.float32, kv_dtype=kv_dtype, block_size=16)


class TwoCuts(TpuAttention):
    """As for a chip: one cut for decodes alone, and another."""

    def _static(self, q_THK, table_RB, spec):
        cuts = (Blocks(8, 2, 2, VMEM), Blocks(16, 1, 1, VMEM))
        return super()._static(q_THK, table_RB, spec) | {"blocks": cuts}


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 6, 1]], ids=["decodes", "mixed"])
def test_either_cut_of_a_step_is_right(counts):
    draw = torch.Generator().manual_seed(0)
    tokens = sum(counts)
    q, k, v = (torch.randn(tokens, heads, 64, generator=draw) for heads in (4, 2, 2))
    ends = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    slots = torch.cat([torch.arange(count) + 16 * (1 + i) for i, count in enumerate(counts)])
    table = torch.arange(1, 4, dtype=torch.int32).unsqueeze(1)
    tables = Tables(table, ends, torch.tensor(counts, dtype=torch.int32), slots)
    outs = []
    for cls in (TwoCuts, TpuGatherAttention):
        attention = backend(cls)
        outs.append(attention.forward(q, k, v, attention.allocate(SPEC, 4), tables, SPEC))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8], ids=str)
def test_pages_take_what_caches_of_them_do(kv_dtype):
    attention = backend(kv_dtype=kv_dtype)
    cache = attention.allocate(SPEC, 5).tensor.jax()
    assert cache.nbytes == 5 * attention.page_bytes(SPEC) == 5 * 16 * 4 * 128 * kv_dtype.itemsize


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.int16)], ids=str)
def test_other_dtypes_are_refused(dtypes):
    bridges.open_bridge("jax")
    dtype, kv_dtype = dtypes
    with pytest.raises(ConfigError, match=r"not in float16|over int16"):
        TpuAttention(ops=OpTable(), device=torch.device("cpu"), dtype=dtype, kv_dtype=kv_dtype, block_size=16)

"""Attention on the CPU: paged, ragged and causal in one native kernel; see ``native/attention.c``."""

from __future__ import annotations

from ctypes import Structure, addressof, c_long, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail.platforms.cpu import kernels
from dovetail.platforms.cpu.ops import MANY_ROWS, NATIVE_DTYPES, SCRATCH, heads_side_by_side
from dovetail.platforms.cpu.pages import zeroed

STRIP = 16
"""Tokens that the kernel handles as one vector; blocks are made of them."""
MAX_HEAD_SIZE = 512


class _Step(Structure):
    """``struct step`` of the kernel."""

    _fields_ = (
        ("block_table", c_void_p),
        ("query_start", c_void_p),
        ("seq_lens", c_void_p),
        ("slot_mapping", c_void_p),
        ("table_stride", c_long),
        ("requests", c_long),
        ("tokens", c_long),
    )


class _Cache(Structure):
    """``struct cache`` of the kernel."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("kv_heads", c_long),
        ("head_size", c_long),
        ("block_size", c_long),
        ("bf16", c_long),
    )


@dataclass(frozen=True, slots=True)
class CpuMetadata:
    """One step's tables as the kernel reads them.

    Attributes:
        address: of ``step``.
        tensors: what ``step`` points into.
    """

    address: int
    step: _Step
    tensors: tuple[Tensor, ...]


class CpuCache:
    """One layer's keys and values: pages of strips, see ``native/attention.c``."""

    __slots__ = ("_described", "keys", "values")

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self._described: dict[tuple[int, int], tuple[int, _Cache]] = {}

    def describe(self, spec: AttentionSpec, block_size: int, bf16: int) -> int:
        """Address of the kernel's view of this cache for layers of ``spec``."""
        key = (spec.num_kv_heads, spec.head_size)
        found = self._described.get(key)
        if found is None:
            cache = _Cache(self.keys.data_ptr(), self.values.data_ptr(), *key, block_size, bf16)
            found = self._described[key] = (addressof(cache), cache)
        return found[0]


class CpuAttention(AttentionBackend):
    """Online softmax over tiles of keys at fixed positions.

    A token's result depends on its own request alone, bit for bit: not on the batch, the chunking or the threads.
    """

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        if device.type != "cpu":
            raise ConfigError(f"The cpu attention backend needs cpu tensors, not {device}; choose another --attention.")
        if dtype not in NATIVE_DTYPES:
            raise ConfigError(f"The cpu attention backend computes in bfloat16 or float32, not {dtype}; set --dtype.")
        if kv_dtype != dtype:
            raise ConfigError(
                f"The cpu attention backend stores keys and values in the activation dtype {dtype}, not in {kv_dtype}; "
                "leave --kv-cache-dtype at auto."
            )
        if block_size % STRIP:
            raise ConfigError(f"--block-size is {block_size}; the cpu attention backend needs a multiple of {STRIP}.")
        self._attend = kernels.load().library.dovetail_attention
        self._dtype = dtype
        self._bf16 = int(dtype == torch.bfloat16)
        self._block_size = block_size

    def page_bytes(self, spec: AttentionSpec) -> int:
        """Keys and values of one block; heads are padded to a multiple of 16.

        Raises:
            ConfigError: the head is larger than the kernel's.
        """
        if spec.head_size > MAX_HEAD_SIZE:
            raise ConfigError(
                f"The model's heads have {spec.head_size} elements; the cpu attention backend handles up to "
                f"{MAX_HEAD_SIZE}. Choose --attention reference."
            )
        padded = -(-spec.head_size // STRIP) * STRIP
        return 2 * self._block_size * spec.num_kv_heads * padded * self._dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> CpuCache:
        """Zeroed pages, which take memory when they are first written."""
        half = num_blocks * self.page_bytes(spec) // 2
        return CpuCache(zeroed(half), zeroed(half))

    def build_metadata(self, step: StepTensors, group: int) -> CpuMetadata:
        """Point the kernel at the group's tables."""
        table, mapping = step.block_tables[group], step.slot_mapping[group]
        if table.stride(1) != 1:
            table = table.contiguous()
        tensors = (table, step.query_start_R1, step.seq_lens_R, mapping)
        described = _Step(*(t.data_ptr() for t in tensors), table.stride(0), len(step.seq_lens_R), len(mapping))
        return CpuMetadata(addressof(described), described, tensors)

    def forward(
        self,
        q_THK: Tensor,
        k_TNK: Tensor,
        v_TNK: Tensor,
        cache: CpuCache,
        metadata: CpuMetadata,
        spec: AttentionSpec,
    ) -> Tensor:
        """Store and attend in one call."""
        q, k, v = heads_side_by_side(q_THK), heads_side_by_side(k_TNK), heads_side_by_side(v_TNK)
        assert q.dtype is k.dtype is v.dtype is self._dtype, (q.dtype, k.dtype, v.dtype)
        tokens, heads, head_size = q.shape
        shape = (tokens, heads * head_size)
        out = q.new_empty(shape) if tokens < MANY_ROWS else SCRATCH.empty(shape, self._dtype)
        failed = self._attend(
            metadata.address, cache.describe(spec, self._block_size, self._bf16),
            q.data_ptr(), q.stride(0), heads, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr(),
            spec.scale, spec.window or 0, spec.soft_cap or 0.0,
        )  # fmt: skip
        if failed:
            raise MemoryError("The attention kernel could not allocate its work list.")
        return out

"""The attention backend ``cudnn``: NVIDIA's library, over the same cache as ``triton``."""

from __future__ import annotations

from dataclasses import dataclass

import cudnn
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError
from dovetail_cuda.cudnn_plans import Name, Shape, plan
from dovetail_cuda.paged import PagedAttention, PagedCache, PagedMetadata

DTYPES = (torch.bfloat16, torch.float16)
OLDEST = 91000
"""Version of cuDNN that first takes pages with windows, single tokens and heads of up to 256."""
LARGEST = 2**31 - 1
"""Offset of queries or results: they are int32."""
CHIPS = 9
"""Major compute capability. Older chips take no requests of unequal lengths; on newer ones, releases since 9.19 decode
wrongly, which is why torch does not use them there either.
"""
_OTHER = "use --attention triton"


@dataclass(frozen=True, kw_only=True, slots=True)
class CudnnMetadata(PagedMetadata):
    """The step's tables, and whether no request has more than one token."""

    single: bool


class CudnnAttention(PagedAttention):
    """Two plans of cuDNN for each number of tokens: with one token per request, and with any. Long prompts are computed
    with numbers of the cache that no query sees, and which no result may depend on: so they must be finite.
    """

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"cudnn attention computes in {', '.join(map(str, DTYPES))}, not {dtype}; {_OTHER}.")
        if kv_dtype != dtype:
            raise ConfigError(
                f"cudnn attention stores keys and values in {dtype}, not {kv_dtype}; use --kv-cache-dtype auto, "
                f"or {_OTHER}."
            )
        if block_size & (block_size - 1):
            raise ConfigError(f"cudnn attention has blocks of a power of two, not {block_size}; use --block-size 16.")
        if cudnn.backend_version() < OLDEST:
            raise ConfigError(
                f"cudnn attention needs cuDNN 9.10, and {cudnn.backend_version_string()} is installed; update it "
                f"(pip install -U nvidia-cudnn-cu{_cuda_major()}), or {_OTHER}."
            )
        capability = torch.cuda.get_device_capability(device)
        if capability[0] != CHIPS:
            found = ".".join(map(str, capability))
            raise ConfigError(f"cudnn attention needs a GPU of compute capability 9.0, and this has {found}; {_OTHER}.")
        super().__init__(device, kv_dtype, block_size, finite=True)
        self._dtype = dtype

    def build_metadata(self, step: StepTensors, group: int) -> CudnnMetadata:
        """References only: nothing is launched."""
        return CudnnMetadata(
            block_table_RB=step.block_tables[group],
            query_start_R1=step.query_start_R1,
            seq_lens_R=step.seq_lens_R,
            slot_mapping_T=step.slot_mapping[group],
            single=step.max_query_len <= 1,
        )

    def attend(self, q_THK: Tensor, cache: PagedCache, metadata: CudnnMetadata, spec: AttentionSpec) -> Tensor:
        """Attend to what is stored."""
        if q_THK.stride()[1:] != (spec.head_size, 1):
            q_THK = q_THK.contiguous()
        _check_offsets(len(q_THK), q_THK.stride(0))
        # the other kind of step will come, too, and building takes long
        single, mixed = (plan(self._shape(kind, q_THK, cache, metadata, spec)) for kind in (True, False))
        out_THK = q_THK.new_zeros(q_THK.shape)  # padding is left out, and must be finite
        tensors = {Name.QUERIES: q_THK, Name.KEYS: cache.keys, Name.VALUES: cache.values, Name.OUT: out_THK}
        if metadata.single:
            single({**tensors, **_one_each(metadata, len(q_THK))})
        else:
            mixed({**tensors, **_one_after_the_other(metadata, q_THK.stride(0), out_THK.stride(0))})
        return out_THK.flatten(1)

    def _shape(
        self, single: bool, q_THK: Tensor, cache: PagedCache, metadata: CudnnMetadata, spec: AttentionSpec
    ) -> Shape:
        requests, pages = metadata.block_table_RB.shape
        return Shape(
            single=single,
            spec=spec,
            dtype=self._dtype,
            requests=len(q_THK) if single else requests,
            pages=pages,
            tokens=len(q_THK),
            query_stride=q_THK.stride(0),
            blocks=len(cache.keys),
            block_size=self._block_size,
        )


def _check_offsets(tokens: int, stride: int) -> None:
    """Where the first is that a step of this size may have, which is at start-up.

    Raises:
        ConfigError: where a token's queries begin cannot be said.
    """
    if tokens * stride > LARGEST:
        raise ConfigError(
            f"cudnn attention finds queries by offsets of 32 bits, which end at {LARGEST}; a step of {tokens} tokens "
            f"of {stride} elements each exceeds them. Use --max-num-batched-tokens {LARGEST // stride}, or {_OTHER}."
        )


def _one_each(metadata: CudnnMetadata, tokens: int) -> dict[Name, Tensor]:
    """Tables with a row for each token instead of each request; those of padding have neither tokens nor keys."""
    starts_R1, lengths_R, once = metadata.query_start_R1, metadata.seq_lens_R, metadata.once
    indices_T = once("indices", lambda: torch.arange(tokens, dtype=torch.int32, device=starts_R1.device))
    rows_T = once(
        "rows", lambda: torch.searchsorted(starts_R1[1:], indices_T, right=True).clamp_(max=len(lengths_R) - 1)
    )
    counts_T = once("counts", lambda: (indices_T < starts_R1[-1]).to(torch.int32))
    table_TB = once("table", lambda: metadata.block_table_RB[rows_T])
    return {
        Name.KEY_TABLE: table_TB,
        Name.VALUE_TABLE: table_TB,
        Name.COUNTS: counts_T,
        Name.LENGTHS: once("lengths", lambda: lengths_R[rows_T] * counts_T),
    }


def _one_after_the_other(metadata: CudnnMetadata, query_stride: int, out_stride: int) -> dict[Name, Tensor]:
    """The step's own tables, and where requests begin."""
    starts_R1, once = metadata.query_start_R1, metadata.once
    table_RB = once("table", metadata.block_table_RB.contiguous)
    return {
        Name.KEY_TABLE: table_RB,
        Name.VALUE_TABLE: table_RB,
        Name.COUNTS: once("counts", starts_R1.diff),
        Name.LENGTHS: metadata.seq_lens_R,
        Name.QUERY_OFFSETS: once(("offsets", query_stride), lambda: starts_R1 * query_stride),
        Name.OUT_OFFSETS: once(("offsets", out_stride), lambda: starts_R1 * out_stride),
    }


def _cuda_major() -> str:
    return (torch.version.cuda or "13").partition(".")[0]

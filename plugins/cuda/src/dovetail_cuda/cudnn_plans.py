"""Plans of cuDNN for attention over pages: one per shape, built when that is first met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, auto
from functools import cache
from typing import Any

import cudnn
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """All that a plan is built for.

    Attributes:
        single: each request has one token or none, so that the queries lie apart by the same stride, and cuDNN may
            divide long contexts. Else each request has any number of them, one request after the other.
        requests, pages: rows and columns of the block table.
        tokens: of the step.
        query_stride: elements from the queries of a token to those of the next.
        blocks, block_size: of the cache, whose keys and values are ``[blocks, N, block_size, K]`` each.
    """

    single: bool
    spec: AttentionSpec
    dtype: torch.dtype
    requests: int
    pages: int
    tokens: int
    query_stride: int
    blocks: int
    block_size: int

    @property
    def longest(self) -> int:
        """Most tokens of a request. That they are fewer costs nothing."""
        return 1 if self.single else self.tokens


class Name(IntEnum):
    """A plan's tensors. Counts are int32 tokens of each request in the step; offsets are int32 elements before each
    request's queries or results, and before what follows the last; plans for single tokens have none.
    """

    QUERIES = auto()
    KEYS = auto()
    VALUES = auto()
    OUT = auto()
    KEY_TABLE = auto()
    VALUE_TABLE = auto()
    COUNTS = auto()
    LENGTHS = auto()
    QUERY_OFFSETS = auto()
    OUT_OFFSETS = auto()


class Plan:
    """How cuDNN computes one shape. Where tokens lie and how many there are it reads on the device."""

    def __init__(self, shape: Shape) -> None:
        graph = _Description(shape).finished()
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        self._graph, self._workspace = graph, graph.get_workspace_size()

    def __call__(self, tensors: Mapping[Name, Tensor]) -> None:
        """Write the results of all tokens that belong to a request."""
        handle = _handle()
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=tensors[Name.QUERIES].device)
        pointers = {int(name): tensor.data_ptr() for name, tensor in tensors.items()}
        self._graph.execute(pointers, workspace.data_ptr(), handle=handle)


@cache
def plan(shape: Shape) -> Plan:
    """Never forgotten: captured steps launch its kernels."""
    return Plan(shape)


@cache
def _handle() -> Any:
    return cudnn.create_handle()


class _Description:
    """cuDNN's description of a shape, tensor by tensor."""

    def __init__(self, shape: Shape) -> None:
        self._shape, types = shape, cudnn.data_type
        self._number = types.BFLOAT16 if shape.dtype == torch.bfloat16 else types.HALF
        self._graph = cudnn.pygraph(
            handle=_handle(),
            io_data_type=self._number,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
        )

    def finished(self) -> Any:
        """The graph: one operation."""
        shape = self._shape
        queries = self._tensor(Name.QUERIES, *self._rows(shape.query_stride), self._number)
        out, _ = self._graph.sdpa(
            name="attention",
            q=queries,
            k=self._cache(Name.KEYS),
            v=self._cache(Name.VALUES),
            attn_scale=shape.spec.scale,
            generate_stats=False,
            use_padding_mask=True,
            seq_len_q=self._integers(Name.COUNTS, shape.requests),
            seq_len_kv=self._integers(Name.LENGTHS, shape.requests),
            paged_attention_k_table=self._table(Name.KEY_TABLE),
            paged_attention_v_table=self._table(Name.VALUE_TABLE),
            paged_attention_max_seq_len_kv=shape.pages * shape.block_size,
            **_mask(shape),
        )
        dim, stride = self._rows(shape.spec.num_heads * shape.spec.head_size)
        out.set_output(True).set_uid(int(Name.OUT)).set_data_type(self._number).set_dim(dim).set_stride(stride)
        if not shape.single:
            queries.set_ragged_offset(self._integers(Name.QUERY_OFFSETS, shape.requests + 1))
            out.set_ragged_offset(self._integers(Name.OUT_OFFSETS, shape.requests + 1))
        return self._graph

    def _tensor(self, name: Name, dim: list[int], stride: list[int], dtype: Any) -> Any:
        return self._graph.tensor(uid=int(name), name=name.name, dim=dim, stride=stride, data_type=dtype)

    def _rows(self, between: int) -> tuple[list[int], list[int]]:
        """Size and strides of queries or results: elements ``between`` those of a token and of the next."""
        shape, size = self._shape, self._shape.spec.head_size
        dim = [shape.requests, shape.spec.num_heads, shape.longest, size]
        return dim, [shape.longest * between, size, between, 1]

    def _cache(self, name: Name) -> Any:
        shape, heads, size = self._shape, self._shape.spec.num_kv_heads, self._shape.spec.head_size
        page = shape.block_size * size
        return self._tensor(
            name, [shape.blocks, heads, shape.block_size, size], [heads * page, page, size, 1], self._number
        )

    def _table(self, name: Name) -> Any:
        requests, pages = self._shape.requests, self._shape.pages
        return self._tensor(name, [requests, 1, pages, 1], [pages, pages, 1, 1], cudnn.data_type.INT32)

    def _integers(self, name: Name, count: int) -> Any:
        return self._tensor(name, [count, 1, 1, 1], [1, 1, 1, 1], cudnn.data_type.INT32)


def _mask(shape: Shape) -> dict[str, Any]:
    """Beyond what a request has: a single token sees all of that, unless there is a window."""
    window = shape.spec.window
    if shape.single and window is None:
        return {}
    causal = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
    return causal if window is None else {**causal, "diagonal_band_left_bound": window}

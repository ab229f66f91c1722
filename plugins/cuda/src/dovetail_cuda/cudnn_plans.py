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
        graph = _described(shape)
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


def _described(shape: Shape) -> Any:
    """cuDNN's description of the operation."""
    spec, types = shape.spec, cudnn.data_type
    number = types.BFLOAT16 if shape.dtype == torch.bfloat16 else types.HALF
    graph = cudnn.pygraph(
        handle=_handle(), io_data_type=number, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT
    )

    def tensor(name: Name, dim: list[int], stride: list[int], dtype: Any = types.INT32) -> Any:
        return graph.tensor(uid=int(name), name=name.name, dim=dim, stride=stride, data_type=dtype)

    def per_request(name: Name, count: int) -> Any:
        return tensor(name, [count, 1, 1, 1], [1, 1, 1, 1])

    size, width = spec.head_size, spec.num_heads * spec.head_size
    queries = tensor(
        Name.QUERIES,
        [shape.requests, spec.num_heads, shape.longest, size],
        [shape.longest * shape.query_stride, size, shape.query_stride, 1],
        number,
    )
    page = shape.block_size * size
    keys, values = (
        tensor(
            name,
            [shape.blocks, spec.num_kv_heads, shape.block_size, size],
            [spec.num_kv_heads * page, page, size, 1],
            number,
        )
        for name in (Name.KEYS, Name.VALUES)
    )
    key_table, value_table = (
        tensor(name, [shape.requests, 1, shape.pages, 1], [shape.pages, shape.pages, 1, 1])
        for name in (Name.KEY_TABLE, Name.VALUE_TABLE)
    )
    out, _ = graph.sdpa(
        name="attention",
        q=queries,
        k=keys,
        v=values,
        attn_scale=spec.scale,
        generate_stats=False,
        use_padding_mask=True,
        seq_len_q=per_request(Name.COUNTS, shape.requests),
        seq_len_kv=per_request(Name.LENGTHS, shape.requests),
        paged_attention_k_table=key_table,
        paged_attention_v_table=value_table,
        paged_attention_max_seq_len_kv=shape.pages * shape.block_size,
        **_mask(shape),
    )
    out.set_output(True).set_uid(int(Name.OUT)).set_data_type(number)
    out.set_dim([shape.requests, spec.num_heads, shape.longest, size])
    out.set_stride([shape.longest * width, size, width, 1])
    if not shape.single:
        queries.set_ragged_offset(per_request(Name.QUERY_OFFSETS, shape.requests + 1))
        out.set_ragged_offset(per_request(Name.OUT_OFFSETS, shape.requests + 1))
    return graph


def _mask(shape: Shape) -> dict[str, Any]:
    """Beyond what a request has: a single token sees all of that, unless there is a window."""
    window = shape.spec.window
    if shape.single and window is None:
        return {}
    causal = {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
    return causal if window is None else {**causal, "diagonal_band_left_bound": window}

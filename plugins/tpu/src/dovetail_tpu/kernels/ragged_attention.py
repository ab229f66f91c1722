"""Paged attention over a ragged batch: any mix of prompt chunks, decodes and drafts in one launch.

Queries are cut into blocks of as many tokens each; a *visit* is one request's part of one block. Visits are numbered in
order of tokens, and a program of the grid computes one: it walks the keys that its queries see with an online softmax
(Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Pages of keys and values stay in
HBM (Kwon et al. 2023, arXiv:2309.06180); the program copies some at a time into one half of a buffer while it
computes on the other half. The first pages of a visit are copied while the visit before it computes its last ones.
Blocks of queries are laid out by key/value head, so that a head's queries are the rows of one matrix.

Where a device has two cores, each takes a run of whole blocks, about half of all copies: no block of results is
written by both, and neither waits for the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dovetail_tpu.kernels.block_sizes import Blocks
from dovetail_tpu.kernels.chip import LANES
from dovetail_tpu.kernels.kv_rows import scales_of

START = -1e30
"""The best score of a query that has seen no key: below all scores."""
HIDDEN = -2e30
"""The score of a key that a query does not see: so far below :data:`START` that its weight is exactly 0."""


def ragged_attention(
    q_THK: Array,
    kv_X2NK: Array,
    table_RB: Array,
    starts_R1: Array,
    lengths_R: Array,
    *,
    kv_heads: int,
    page: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    blocks: Blocks,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """Causal attention of each request's newest tokens over all of its tokens, whose keys and values are stored.

    Request ``r`` holds query tokens ``starts[r] : starts[r + 1]``, the last of its ``lengths[r]`` tokens. Query head
    ``h`` reads key/value head ``h // (H / N)``. Products are of the dtype of ``q``, sums and the softmax float32.

    Args:
        q_THK: ``[T, H, K]``, bfloat16 or float32.
        kv_X2NK: the cache, see :mod:`dovetail_tpu.kernels.kv_write`.
        table_RB: integers ``[R, B]``, page of each ``P`` tokens of a request; only those with visible tokens are read.
        starts_R1, lengths_R: integers ``[R + 1]`` and ``[R]``. A request without query tokens is padding, and so are
            tokens from ``starts[R]`` on.
        kv_heads, page: key/value heads ``N``, and tokens per page ``P``.
        scale: factor on ``q · k``.
        window: each query sees itself and the ``window - 1`` tokens before it; None sees all before.
        soft_cap: scores become ``cap × tanh(score / cap)``.
        blocks: how to cut the step, see :func:`dovetail_tpu.kernels.block_sizes.attention_blocks`.
        interpret: execute on the host, or simulate the chip's memories there.

    Returns:
        ``[T, H, K]`` in the dtype of ``q``; zeros for padding tokens.
    """
    with jax.enable_x64(False):
        group = q_THK.shape[1] // kv_heads
        q_NRK = _by_kv_head(q_THK, kv_heads, blocks.queries, kv_X2NK.shape[2])
        table_RB, starts_R1, lengths_R = (x.astype(jnp.int32) for x in (table_RB, starts_R1, lengths_R))
        shape = _Shape(
            queries=blocks.queries,
            group=group,
            page=page,
            pages=blocks.pages,
            chunk=blocks.chunk,
            columns=table_RB.shape[1],
            scale=scale,
            window=window,
            soft_cap=soft_cap,
        )
        num_blocks = q_NRK.shape[1] // shape.rows
        visits = plan_visits(starts_R1, lengths_R, num_blocks, shape)
        visits = deal(visits, num_blocks, min(blocks.cores, num_blocks))
        out_NRK = _launch(visits, table_RB, q_NRK, kv_X2NK, shape, blocks.vmem_bytes, interpret)
        return _by_token(out_NRK, group)[: len(q_THK), :, : q_THK.shape[2]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """What a launch is compiled for, besides shapes of arrays."""

    queries: int
    group: int
    page: int
    pages: int
    chunk: int
    columns: int
    scale: float
    window: int | None
    soft_cap: float | None

    @property
    def rows(self) -> int:
        """Queries of a block for one key/value head."""
        return self.queries * self.group

    @property
    def keys(self) -> int:
        """That are attended to at a time."""
        return self.chunk * self.page


class Visit(NamedTuple):
    """One request's part of one block of queries, or such numbers of all visits.

    Attributes:
        request: whose; the number of requests for padding tokens.
        block: of queries.
        opens, closes: whether it is the block's first, and its last.
        first, stop: range of its tokens in the step.
        shift: from a token's place in the step to its position in the request.
        page: first visible page, counted in the request.
        pages: visible ones; none for padding.
        step: number of steps before this visit. Their parity is the half of the buffer.
    """

    request: Array
    block: Array
    opens: Array
    closes: Array
    first: Array
    stop: Array
    shift: Array
    page: Array
    pages: Array
    step: Array


def plan_visits(starts_R1: Array, lengths_R: Array, num_blocks: int, shape: _Shape) -> Visit:
    """All visits, ``[num_blocks + R + 1]`` of each number. The last ones are of no tokens, at least one.

    Padding tokens count as those of one more request, which sees nothing.
    """
    requests = len(lengths_R)
    count = num_blocks + requests + 1
    stops_R1 = jnp.append(starts_R1[1:], num_blocks * shape.queries)
    lengths_R1 = jnp.append(lengths_R, 0)
    first_block_R1 = starts_R1 // shape.queries
    visits_R1 = jnp.where(stops_R1 > starts_R1, pl.cdiv(stops_R1, shape.queries) - first_block_R1, 0)
    first_visit_R1 = jnp.cumsum(visits_R1) - visits_R1

    request_V = jnp.repeat(jnp.arange(requests + 1), visits_R1, total_repeat_length=count)
    block_V = first_block_R1[request_V] + jnp.arange(count) - first_visit_R1[request_V]
    begin_V = block_V * shape.queries
    first_V = jnp.maximum(starts_R1[request_V], begin_V)
    stop_V = jnp.minimum(stops_R1[request_V], begin_V + shape.queries)
    shift_V = lengths_R1[request_V] - stops_R1[request_V]

    visible_V = 0 if shape.window is None else jnp.maximum(first_V + shift_V - shape.window + 1, 0)
    page_V = visible_V // shape.page + jnp.zeros_like(first_V)
    pages_V = jnp.maximum(pl.cdiv(stop_V + shift_V, shape.page) - page_V, 1)
    pages_V = jnp.where(request_V < requests, pages_V, 0)
    steps_V = pl.cdiv(pages_V, shape.pages)

    block_V = jnp.minimum(block_V, num_blocks - 1)
    is_new_V = block_V[1:] != block_V[:-1]
    return Visit(
        request=request_V,
        block=block_V,
        opens=jnp.append(True, is_new_V),
        closes=jnp.append(is_new_V, True),
        first=first_V,
        stop=stop_V,
        shift=shift_V,
        page=page_V,
        pages=pages_V,
        step=jnp.cumsum(steps_V) - steps_V,
    )


def deal(visits: Visit, num_blocks: int, cores: int) -> Visit:
    """The visits of each core, ``[cores, V]`` of each number. A core has blocks of its own, one at least.

    After a core's visits come some of no tokens to its last block, one at least.
    """
    count = len(visits.block)
    share_C = jnp.arange(cores) * visits.step[-1] // cores
    reached_C = visits.block[jnp.searchsorted(visits.step, share_C, side="left", method="compare_all")]
    first_block_C = jnp.clip(reached_C, jnp.arange(cores), jnp.arange(cores) + num_blocks - cores)
    first_block_C = lax.cummax(first_block_C.at[0].set(0))
    first_C1 = jnp.append(jnp.searchsorted(visits.block, first_block_C, method="compare_all"), count)
    place_CV = first_C1[:-1, None] + jnp.arange(count)
    is_own_CV = place_CV < first_C1[1:, None]
    dealt = Visit(*(x_V[jnp.minimum(place_CV, first_C1[1:, None] - 1)] for x_V in visits))
    ends = {name: jnp.where(is_own_CV, getattr(dealt, name), 0) for name in ("opens", "closes", "pages")}
    return dealt._replace(**ends)


def _by_kv_head(q_THK: Array, kv_heads: int, queries: int, padded: int) -> Array:
    """Queries as ``[N, T × group, Kp]``, with tokens rounded up to whole blocks."""
    tokens, heads, size = q_THK.shape
    q_THK = jnp.pad(q_THK, ((0, -tokens % queries), (0, 0), (0, padded - size)))
    q_TNGK = q_THK.reshape(len(q_THK), kv_heads, heads // kv_heads, padded)
    return q_TNGK.transpose(1, 0, 2, 3).reshape(kv_heads, -1, padded)


def _by_token(out_NRK: Array, group: int) -> Array:
    """The inverse, ``[T, H, Kp]``."""
    kv_heads, rows, padded = out_NRK.shape
    out_NTGK = out_NRK.reshape(kv_heads, rows // group, group, padded)
    return out_NTGK.transpose(1, 0, 2, 3).reshape(rows // group, kv_heads * group, padded)


def _launch(
    visits: Visit,
    table_RB: Array,
    q_NRK: Array,
    kv_X2NK: Array,
    shape: _Shape,
    vmem_bytes: int,
    interpret: bool | pltpu.InterpretParams,
) -> Array:
    kv_heads, _, padded = q_NRK.shape
    cores, count = visits.block.shape
    block = pl.BlockSpec(
        (kv_heads, shape.rows, padded), lambda core, v, visits, table: (0, _visit(visits, core * count + v).block, 0)
    )
    softmax = pltpu.VMEM((kv_heads, shape.rows, LANES), jnp.float32)
    return pl.pallas_call(
        functools.partial(_attend_kernel, shape=shape),
        out_shape=jax.ShapeDtypeStruct(q_NRK.shape, q_NRK.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, count),
            in_specs=[block, pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=block,
            scratch_shapes=[
                pltpu.VMEM((2, shape.pages * shape.page, *kv_X2NK.shape[1:]), kv_X2NK.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                softmax,
                softmax,
                pltpu.VMEM((kv_heads, shape.rows, padded), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpret,
        name="ragged_attention",
    )(jnp.stack([x_CV.reshape(-1).astype(jnp.int32) for x_CV in visits]), table_RB.reshape(-1), q_NRK, kv_X2NK)


def _visit(visits_ref: Array, v: Array) -> Visit:
    return Visit(*(visits_ref[i, v] for i in range(len(Visit._fields))))


def _attend_kernel(
    visits_ref: Array,
    table_ref: Array,
    q_ref: Array,
    kv_ref: Array,
    out_ref: Array,
    buffer_ref: Array,
    arrived: Array,
    best_ref: Array,
    total_ref: Array,
    acc_ref: Array,
    *,
    shape: _Shape,
) -> None:
    """One visit. What is in ``best``, ``total`` and ``acc`` belongs to the block, what is in the buffer to the steps.

    Args:
        visits_ref, table_ref: scalar memory: :class:`Visit` as ``[numbers, cores × visits]``, and tables in a row.
        q_ref, out_ref: the visit's block, ``[N, rows, Kp]``.
        kv_ref: the whole cache, in HBM.
        buffer_ref: two halves for ``pages`` pages each.
        arrived: semaphores that count what has been copied into each half.
        best_ref, total_ref: best score and sum of weights of each query, the same in all lanes.
        acc_ref: weighted sum of values.
    """
    v = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1)
    visit = _visit(visits_ref, v)
    steps = pl.cdiv(visit.pages, shape.pages)
    copies = functools.partial(_copies, table_ref, kv_ref, buffer_ref, arrived, shape)

    @pl.when(visit.opens != 0)
    def open_block() -> None:
        best_ref[...] = jnp.full_like(best_ref, START)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(pl.program_id(1) == 0)
    def start_first() -> None:
        copies(visit, 0, lambda copy: copy.start())

    def step(i: Array, _: None) -> None:
        @pl.when(i + 1 < steps)
        def start_next() -> None:
            copies(visit, i + 1, lambda copy: copy.start())

        @pl.when(i + 1 == steps)
        def start_next_visit() -> None:  # there is one: a core's last visits are of no tokens
            copies(_visit(visits_ref, v + 1), 0, lambda copy: copy.start())

        copies(visit, i, lambda copy: copy.wait())
        half = lax.rem(visit.step + i, 2)

        def attend(c: Array, _: None) -> None:
            first_key = (visit.page + i * shape.pages) * shape.page + c * shape.keys
            kv_L2NK = buffer_ref[half, pl.ds(c * shape.keys, shape.keys)]
            _attend(visit, first_key, q_ref, kv_L2NK, best_ref, total_ref, acc_ref, shape)

        lax.fori_loop(0, pl.cdiv(_pages_of(visit, i, shape), shape.chunk), attend, None)

    lax.fori_loop(0, steps, step, None)

    @pl.when(visit.closes != 0)
    def close_block() -> None:
        total = total_ref[:, :, :1]
        out = acc_ref[...] / jnp.where(total == 0.0, 1.0, total)
        out_ref[...] = out.astype(out_ref.dtype)


def _copies(
    table_ref: Array,
    kv_ref: Array,
    buffer_ref: Array,
    arrived: Array,
    shape: _Shape,
    visit: Visit,
    step: Array | int,
    do: Callable[[Any], None],
) -> None:
    """Start, or await, the copies of all pages that a step of a visit reads: visible ones only."""
    half = lax.rem(visit.step + step, 2)
    first = visit.request * shape.columns + visit.page + step * shape.pages

    def body(i: Array, _: None) -> None:
        place = table_ref[first + i] * shape.page
        source = kv_ref.at[pl.ds(place, shape.page)]
        do(pltpu.make_async_copy(source, buffer_ref.at[half, pl.ds(i * shape.page, shape.page)], arrived.at[half]))

    lax.fori_loop(0, _pages_of(visit, step, shape), body, None)


def _pages_of(visit: Visit, step: Array | int, shape: _Shape) -> Array:
    """Visible pages of a step: all that fit into half of the buffer, or those that are left."""
    return jnp.minimum(visit.pages - step * shape.pages, shape.pages)


def _attend(
    visit: Visit,
    first_key: Array,
    q_ref: Array,
    kv_L2NK: Array,
    best_ref: Array,
    total_ref: Array,
    acc_ref: Array,
    shape: _Shape,
) -> None:
    """One step of the online softmax, for all heads: a chunk of keys, the first of which is at ``first_key``."""
    dtype = q_ref.dtype
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = functools.partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)
    is_scaled = kv_L2NK.dtype == jnp.int8
    sees_RL = _seen(visit, first_key, shape)
    is_seen_L1 = _seen_by_any(visit, first_key, shape)
    kv_2NLK = jnp.swapaxes(kv_L2NK, 0, 1)
    for n in range(q_ref.shape[0]):
        k_LK, v_LK = kv_2NLK[2 * n].astype(dtype), kv_2NLK[2 * n + 1].astype(dtype)
        # what nobody sees may be anything; a weight of 0 would not hide infinities and NaN
        v_LK = jnp.where(is_seen_L1, v_LK, jnp.zeros_like(v_LK))
        scores_RL = dot(q_ref[n], k_LK, (((1,), (1,)), ((), ()))) * shape.scale
        if is_scaled:
            scores_RL *= scales_of(kv_2NLK[2 * n])
        if shape.soft_cap is not None:
            scores_RL = shape.soft_cap * jnp.tanh(scores_RL / shape.soft_cap)
        scores_RL = jnp.where(sees_RL, scores_RL, HIDDEN)
        old_R = best_ref[n]
        best_R = jnp.maximum(old_R, jnp.max(scores_RL, axis=1, keepdims=True))
        weights_RL = jnp.exp(scores_RL - best_R[:, :1])
        fade_R = jnp.exp(old_R - best_R)
        best_ref[n] = best_R
        total_ref[n] = total_ref[n] * fade_R + jnp.sum(weights_RL, axis=1, keepdims=True)
        if is_scaled:
            weights_RL = jnp.where(sees_RL, weights_RL * scales_of(kv_2NLK[2 * n + 1]), 0.0)
        acc_ref[n] = acc_ref[n] * fade_R[:, :1] + dot(weights_RL.astype(dtype), v_LK, (((1,), (0,)), ((), ())))


def _seen(visit: Visit, first_key: Array, shape: _Shape) -> Array:
    """Which rows see which keys, ``[rows, keys]``: of the visit's tokens, each itself and those before it."""
    size = (shape.rows, shape.keys)
    tokens = visit.block * shape.queries + lax.broadcasted_iota(jnp.int32, size, 0) // shape.group
    distance = tokens + visit.shift - first_key - lax.broadcasted_iota(jnp.int32, size, 1)
    sees = (tokens >= visit.first) & (tokens < visit.stop) & (distance >= 0)
    return sees if shape.window is None else sees & (distance < shape.window)


def _seen_by_any(visit: Visit, first_key: Array, shape: _Shape) -> Array:
    """Which keys some query of the visit may see, ``[keys, 1]``."""
    keys = first_key + lax.broadcasted_iota(jnp.int32, (shape.keys, 1), 0)
    seen = keys < visit.stop + visit.shift
    return seen if shape.window is None else seen & (keys > visit.first + visit.shift - shape.window)

"""The conformance suite of attention backends."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionSpec, Preparation
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Platform, PlatformConfig
from dovetail.errors import ConfigError
from dovetail.testing.conformance.paged_batch import PLAIN, Bench, Layout, Part, Request, dense, whole, with_values
from dovetail.testing.conformance.projected import STYLES, preparation, prepared
from dovetail.testing.conformance.subject import installed, registered
from dovetail.testing.conformance.suite import TOLERANCE, Suite, needs

HEADS = ((4, 4), (4, 2), (6, 2), (8, 1), (12, 4), (24, 1))
SIZES = (8, 16, 21, 64, 80, 96, 128, 256)
"""Head sizes that are tried where the manifest allows any."""
BLOCK_SIZES = (16, 1, 5, 64)
LENGTHS = (1, 15, 16, 17, 50)
WINDOWS = (1, 2, 16, 17, 30, 1000)
FAR = 1e6
"""Dtypes that reach further hold whatever a model computes."""
NARROW = {torch.float8_e4m3fn: 0.1, torch.float8_e5m2: 0.2, torch.int8: 0.05}
"""Tolerance for a cache in a dtype so narrow that backends may scale what they store."""


class AttentionSuite(Suite):
    """What every attention backend does, on its own device.

    Attributes:
        platform: name of the registered platform whose device and operations it gets; by default the first whose
            manifest lists the backend, else the reference operations on the first of its device types. Where that
            platform is not available, everything is skipped with the reason of its probe.
    """

    contract = "attention"
    kind = "attention"
    platform: ClassVar[str | None] = None

    def bench(
        self, dtype: torch.dtype, kv_dtype: torch.dtype | None = None, block_size: int | None = None
    ) -> Bench:
        """A backend for these dtypes, by default with the first of its block sizes."""
        device, ops = self._place(dtype)
        size = block_size or self.block_sizes()[0]
        backend = self.tested.cls(ops=ops, device=device, dtype=dtype, kv_dtype=kv_dtype or dtype, block_size=size)
        return Bench(backend=backend, device=device, ops=ops, dtype=dtype, block_size=size, fail=self.fail)

    def block_sizes(self) -> Sequence[int]:
        """Some that the manifest declares: the usual one, and extremes."""
        declared = sorted(self.manifest.block_sizes)
        if not declared:
            return BLOCK_SIZES
        usual = 16 if 16 in declared else declared[0]
        return tuple(dict.fromkeys([usual, declared[0], declared[len(declared) // 8], declared[-1]]))

    def head_size(self) -> int:
        """64, or the declared size that is nearest."""
        return min(self.manifest.head_sizes or (64,), key=lambda size: abs(int(size) - 64))

    def spec(self, **changes: Any) -> AttentionSpec:
        """A layer that every backend can run, with changes."""
        size = self.head_size()
        return replace(PLAIN, **{"head_size": size, "scale": size**-0.5, **changes})

    def run_whole(self, bench: Bench, spec: AttentionSpec, request: Request, blocks: int) -> Tensor:
        """All of one request in one step, on a new cache."""
        return bench.run([whole(request)], bench.backend.allocate(spec, blocks), spec)[0]

    def _place(self, dtype: torch.dtype) -> tuple[torch.device, OpTable]:
        name = self.platform or _platform_of(self.manifest.name)
        if name is None:
            return torch.device(self.manifest.device_types[0]), OpTable()
        self.need_device(registered(name).find("platforms").cls)
        chip = _platform(name)
        return chip.device, OpTable.resolve(chip.ops(dtype), name)

    # ---- memory

    def test_page_bytes(self, dtype: torch.dtype) -> None:
        """attention.1: page_bytes is what one more block takes, and holds the keys and values of its tokens."""
        bench, spec = self.bench(dtype), self.spec()
        page = bench.backend.page_bytes(spec)
        bare = 2 * bench.block_size * spec.num_kv_heads * spec.head_size * dtype.itemsize
        self.check(page >= bare, f"page_bytes({spec}) is {page}, but keys and values take {bare} bytes.")
        sizes = [_visible_bytes(bench.backend.allocate(spec, blocks)) for blocks in (3, 8)]
        if any(sizes):
            self.equal((sizes[1] - sizes[0]) / 5, page, f"bytes that allocate() takes per block, for {spec}")

    def test_page_bytes_depends_on_storage_alone(self, dtype: torch.dtype) -> None:
        """attention.2: layers that store the same keys and values have pages of the same size, whatever their query
        heads, scale, window and soft cap, so that KV groups can share blocks.
        """
        backend, spec = self.bench(dtype).backend, self.spec()
        variants = [replace(spec, num_heads=8), replace(spec, scale=1.0)]
        variants += [replace(spec, window=20)] if self.manifest.sliding_window else []
        variants += [replace(spec, soft_cap=20.0)] if self.manifest.soft_cap else []
        for variant in variants:
            self.equal(backend.page_bytes(variant), backend.page_bytes(spec), f"page_bytes({variant})")

    # ---- results

    @pytest.mark.parametrize("size", range(len(BLOCK_SIZES)), ids="block size {}".format)
    def test_prefill(self, dtype: torch.dtype, size: int) -> None:
        """attention.3: whole prompts in one step get causal attention, for every declared block size."""
        sizes = self.block_sizes()
        bench = self.bench(dtype, block_size=sizes[min(size, len(sizes) - 1)])
        spec = self.spec()
        requests, blocks = bench.requests(spec, LENGTHS)
        outs = bench.run([whole(r) for r in requests], bench.backend.allocate(spec, blocks), spec)
        self._agree(outs, requests, spec, dtype, f"prefill, block size {bench.block_size}")

    def test_decode(self, dtype: torch.dtype) -> None:
        """attention.4: requests that grow by one token per step get the same as in one step."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (35, 20))
        store = bench.backend.allocate(spec, blocks)
        steps: list[list[Tensor]] = [[] for _ in requests]
        for position in range(35):
            alive = [i for i, request in enumerate(requests) if position < len(request)]
            parts = [Part(requests[i], position, position + 1) for i in alive]
            for i, out in zip(alive, bench.run(parts, store, spec), strict=True):
                steps[i].append(out)
        self._agree([torch.cat(outs) for outs in steps], requests, spec, dtype, "one token per step")

    def test_ragged_mix(self, dtype: torch.dtype) -> None:
        """attention.5: prefill chunks, whole prompts and decodes mix in one step, in any order."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (1, 17, 40, 65, 90, 33))
        outs = _ragged(bench, spec, requests, bench.backend.allocate(spec, blocks), (1, 3, 20, 50))
        self._agree(outs, requests, spec, dtype, "chunks of 1, 3, 20 or 50 tokens, mixed")

    @pytest.mark.parametrize("chunks", [(16, 16, 16, 16), (1, 62, 1), (31, 2, 31), (63, 1)], ids=str)
    def test_chunked_prefill(self, dtype: torch.dtype, chunks: tuple[int, ...]) -> None:
        """attention.6: a prompt in chunks, cut anywhere, gets the same as in one step."""
        bench, spec = self.bench(dtype), self.spec()
        (request,), blocks = bench.requests(spec, (64,))
        store = bench.backend.allocate(spec, blocks)
        bounds = pairwise(accumulate(chunks, initial=0))
        out = torch.cat([bench.run([Part(request, a, b)], store, spec)[0] for a, b in bounds])
        self._agree([out], [request], spec, dtype, f"chunks {chunks}")

    @pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
    def test_grouped_queries(self, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
        """attention.7: query head h reads key/value head h // (query heads / key/value heads)."""
        spec = self.spec(num_heads=heads, num_kv_heads=kv_heads)
        self._ragged_agrees(dtype, spec, f"{heads} query heads, {kv_heads} key/value heads")

    def test_head_sizes(self, dtype: torch.dtype) -> None:
        """attention.8: every declared head size works; where none is declared, any does."""
        for size in self.manifest.head_sizes or SIZES:
            spec = self.spec(num_heads=2, num_kv_heads=1, head_size=size, scale=size**-0.5)
            self._ragged_agrees(dtype, spec, f"head size {size}")

    @pytest.mark.parametrize("factor", [0.25, 4.0])
    def test_scale(self, dtype: torch.dtype, factor: float) -> None:
        """attention.9: the spec's scale is used, not one derived from the head size."""
        spec = self.spec(scale=factor * self.head_size() ** -0.5)
        self._ragged_agrees(dtype, spec, f"scale {factor} / sqrt(head size)", looser=max(1.0, factor))

    @needs("sliding_window")
    @pytest.mark.parametrize("window", WINDOWS)
    def test_sliding_window(self, dtype: torch.dtype, window: int) -> None:
        """attention.10: each query sees itself and the window - 1 tokens before it, whatever pages those lie in."""
        self._ragged_agrees(dtype, self.spec(window=window), f"window {window}")

    @needs("sliding_window")
    def test_pages_outside_of_the_window(self, dtype: torch.dtype) -> None:
        """attention.11: pages wholly outside of the window are null blocks in the table, and are not read."""
        bench, spec = self.bench(dtype), self.spec(window=20)
        size = bench.block_size
        length = 20 + 5 * size
        requests, blocks = bench.requests(spec, (length, length + 3))
        store = bench.backend.allocate(spec, blocks)
        self._poison_null_block(bench, store, spec)
        bench.run([Part(r, 0, len(r) - 2) for r in requests], store, spec)
        freed = (length - 2 - 19) // size
        for back in (2, 1):
            parts = [Part(r, len(r) - back, len(r) - back + 1) for r in requests]
            outs = bench.run(parts, store, spec, Layout(null_pages=freed))
            for request, out in zip(requests, outs, strict=True):
                expected = dense(request, spec)[len(request) - back].unsqueeze(0)
                self.close(out, expected, f"window 20 after {freed} freed pages of {size}", dtype=dtype)

    @needs("soft_cap")
    @pytest.mark.parametrize("cap", [1.0, 5.0, 50.0])
    def test_soft_cap(self, dtype: torch.dtype, cap: float) -> None:
        """attention.12: logits become cap × tanh(logits / cap) before the softmax, after the scale."""
        self._ragged_agrees(dtype, self.spec(soft_cap=cap, scale=0.5), f"soft cap {cap}", looser=4)

    @needs("sliding_window", "soft_cap")
    def test_window_and_soft_cap(self, dtype: torch.dtype) -> None:
        """attention.13: window and soft cap work together."""
        self._ragged_agrees(dtype, self.spec(window=9, soft_cap=3.0), "window 9, soft cap 3")

    @needs("verify")
    def test_verification(self, dtype: torch.dtype) -> None:
        """attention.14: the tokens of a draft, each with its own view of the past, are computed in one step, and
        rejected ones are written over by the next.
        """
        bench, spec = self.bench(dtype), self.spec()
        (drafted, truth), blocks = bench.requests(spec, (40, 40))
        store = bench.backend.allocate(spec, blocks)
        truth = replace(truth, blocks=drafted.blocks)
        for name in ("q_LHK", "k_LNK", "v_LNK"):  # both agree up to position 33
            getattr(drafted, name)[:33] = getattr(truth, name)[:33]
        bench.run([Part(truth, 0, 30)], store, spec)
        first = bench.run([Part(drafted, 30, 36)], store, spec)[0]
        self.close(first, dense(drafted, spec)[30:36], "5 drafts after 30 tokens", dtype=dtype)
        second = bench.run([Part(truth, 33, 39)], store, spec)[0]
        self.close(second, dense(truth, spec)[33:39], "5 other drafts, after 3 were rejected", dtype=dtype)

    def test_long_context(self, dtype: torch.dtype) -> None:
        """attention.15: a context of thousands of tokens is attended to in full, in decodes and in long prefills."""
        bench = self.bench(dtype)
        spec = self.spec(num_heads=2, num_kv_heads=1)
        (request,), blocks = bench.requests(spec, (2100,))
        store = bench.backend.allocate(spec, blocks)
        outs = [bench.run([Part(request, a, b)], store, spec)[0] for a, b in ((0, 2050), (2050, 2099), (2099, 2100))]
        self._agree([torch.cat(outs)], [request], spec, dtype, "2100 tokens", looser=2)

    def test_large_scores(self, dtype: torch.dtype) -> None:
        """attention.16: scores of some hundreds neither overflow nor lose the largest."""
        bench, spec = self.bench(dtype), self.spec()
        (request,), blocks = bench.requests(spec, (40,))
        loud = replace(request, q_LHK=torch.sign(request.q_LHK) * 128)
        out = self.run_whole(bench, spec, loud, blocks)
        # a score of some hundreds is rounded to 1e-4 even in float32
        self._agree([out], [loud], spec, dtype, "queries of ±128", looser=20)

    def test_many_requests(self, dtype: torch.dtype) -> None:
        """attention.17: a step of many requests of very different lengths gives each its own result."""
        bench = self.bench(dtype)
        spec = self.spec(num_heads=2, num_kv_heads=1)
        lengths = [1 + (37 * i) % 150 for i in range(48)]
        requests, blocks = bench.requests(spec, lengths)
        store = bench.backend.allocate(spec, blocks)
        before = [Part(r, 0, len(r) - 1) for r in requests if len(r) > 1]
        bench.run(before, store, spec)
        outs = bench.run([Part(r, len(r) - 1, len(r)) for r in requests], store, spec)
        for request, out in zip(requests, outs, strict=True):
            expected = dense(request, spec)[-1:]
            self.close(out, expected, f"the last of {len(request)} tokens among 48 requests", dtype=dtype)

    # ---- pages

    def test_page_placement(self, dtype: torch.dtype) -> None:
        """attention.18: where a request's blocks lie, and in which order, changes nothing."""
        bench, spec = self.bench(dtype), self.spec()
        for shuffled, spread in ((False, 1), (True, 1), (True, 7)):
            requests, blocks = bench.requests(spec, (70, 45), shuffled=shuffled, spread=spread)
            outs = bench.run([whole(r) for r in requests], bench.backend.allocate(spec, blocks), spec)
            what = f"blocks {requests[0].blocks}"
            self._agree(outs, requests, spec, dtype, what)

    def test_former_owners(self, dtype: torch.dtype) -> None:
        """attention.19: what a block's former owner left in it, infinities and NaN included, is never seen."""
        bench, spec = self.bench(dtype), self.spec()
        (request,), blocks = bench.requests(spec, (23,))
        pages = -(-23 // bench.block_size)
        former = bench.request(spec, pages * bench.block_size, request.blocks, seed=9)
        for value in (1e4, torch.inf, torch.nan):
            store = bench.backend.allocate(spec, blocks)
            bench.run([whole(with_values(former, value))], store, spec)
            outs = [bench.run([Part(request, a, b)], store, spec)[0] for a, b in ((0, 18), (18, 19), (19, 23))]
            self._agree([torch.cat(outs)], [request], spec, dtype, f"blocks that were full of {value}")

    def test_null_block(self, dtype: torch.dtype) -> None:
        """attention.20: what padding tokens leave in the null block is never seen."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (23, 40))
        store = bench.backend.allocate(spec, blocks)
        self._poison_null_block(bench, store, spec)
        outs = _ragged(bench, spec, requests, store, (1, 7, 30), Layout(spare_columns=3))
        self._agree(outs, requests, spec, dtype, "with 1e4 in the null block")

    def test_shared_pages(self, dtype: torch.dtype) -> None:
        """attention.21: requests read pages of a common prefix that an earlier step filled."""
        bench, spec = self.bench(dtype), self.spec()
        (first, second), blocks = self._with_common_prefix(bench, spec)
        store = bench.backend.allocate(spec, blocks)
        start = len(_common_blocks(first, second)) * bench.block_size
        bench.run([whole(first)], store, spec)
        out = bench.run([Part(second, start, len(second))], store, spec)[0]
        self.close(out, dense(second, spec)[start:], f"a request that computes from token {start} on", dtype=dtype)

    def test_pages_filled_in_the_same_step(self, dtype: torch.dtype) -> None:
        """attention.22: a request sees the pages that another request of the same step fills, wherever it stands."""
        bench, spec = self.bench(dtype), self.spec()
        for swapped in (False, True):
            (first, second), blocks = self._with_common_prefix(bench, spec)
            start = len(_common_blocks(first, second)) * bench.block_size
            parts = [whole(first), Part(second, start, len(second))]
            order = parts[::-1] if swapped else parts
            outs = bench.run(order, bench.backend.allocate(spec, blocks), spec)
            out = outs[order.index(parts[1])]
            where = "before" if swapped else "after"
            what = f"a request {where} the one that fills its first {start} tokens"
            self.close(out, dense(second, spec)[start:], what, dtype=dtype)

    # ---- tables

    def test_padding(self, dtype: torch.dtype) -> None:
        """attention.23: padding tokens and padding requests change nothing, and their rows are finite."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (30, 1, 17))
        for tokens, padding in ((0, 5), (13, 0), (40, 61)):
            store = bench.backend.allocate(spec, blocks)
            layout = Layout(padding_tokens=tokens, padding_requests=padding)
            outs = _ragged(bench, spec, requests, store, (1, 16), layout)
            self._agree(outs, requests, spec, dtype, f"with {tokens} tokens and {padding} requests of padding")

    def test_padding_alone(self, dtype: torch.dtype) -> None:
        """attention.24: a step of padding alone, as warm-up runs it, gives finite rows."""
        bench, spec = self.bench(dtype), self.spec()
        store = bench.backend.allocate(spec, 4)
        nobody = Part(bench.request(spec, 0, (), seed=0), 0, 0)
        for tokens, requests in ((1, 1), (64, 4)):
            layout = Layout(padding_tokens=tokens, padding_requests=requests - 1)
            bench.run([nobody], store, spec, layout)

    def test_requests_without_tokens(self, dtype: torch.dtype) -> None:
        """attention.25: requests without tokens may stand anywhere in the step."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (30, 17))
        nobody = Part(requests[0], 0, 0)
        parts = [nobody, whole(requests[0]), nobody, nobody, whole(requests[1]), nobody]
        outs = bench.run(parts, bench.backend.allocate(spec, blocks), spec)
        self._agree([outs[1], outs[4]], requests, spec, dtype, "between requests without tokens")

    @pytest.mark.parametrize(
        "layout",
        [
            Layout(row_stride=3),
            Layout(column_stride=2),
            Layout(spare_columns=5),
            Layout(merged=False),
            Layout(slack=1000),
        ],
        ids=["row stride", "column stride", "spare columns", "separate inputs", "loose maxima"],
    )
    def test_layout_of_the_tables(self, dtype: torch.dtype, layout: Layout) -> None:
        """attention.26: tables and inputs may be strided views, tables wider and maxima larger than the step needs."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (70, 17, 33))
        outs = _ragged(bench, spec, requests, bench.backend.allocate(spec, blocks), (1, 20, 40), layout)
        self._agree(outs, requests, spec, dtype, f"{layout}")

    def test_metadata_belongs_to_its_step(self, dtype: torch.dtype) -> None:
        """attention.27: metadata of several steps of the same shape may be alive at once, and serves several layers."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (20, 25, 40, 33))
        pairs = (requests[:2], requests[2:])
        stores = [bench.backend.allocate(spec, blocks) for _ in range(2)]
        for store in stores:
            bench.run([Part(r, 0, len(r) - 1) for r in requests], store, spec)
        steps = [[Part(r, len(r) - 1, len(r)) for r in pair] for pair in pairs]
        metadata = [bench.backend.build_metadata(bench.tables(step, layout=Layout()), 0) for step in steps]
        for store in stores:
            for step, built in zip(steps, metadata, strict=True):
                outs = bench.forward(step, store, built, spec, Layout())
                for part, out in zip(step, outs, strict=True):
                    expected = dense(part.request, spec)[-1:]
                    self.close(out, expected, "the first built of two steps' metadata", dtype=dtype)

    def test_groups(self, dtype: torch.dtype) -> None:
        """attention.28: each KV group has its own blocks, and groups share one storage without touching each other."""
        bench, spec = self.bench(dtype), self.spec()
        specs = [spec, replace(spec, window=9) if self.manifest.sliding_window else spec]
        requests, blocks = bench.requests(spec, (40, 21, 40, 21))
        store = bench.backend.allocate(spec, blocks)
        for start, end in ((0, 1), (1, 0)):  # all but the last token of each request, then the last
            halves = (requests[:2], requests[2:])
            groups = [[Part(r, start * (len(r) - 1), len(r) - end) for r in half] for half in halves]
            tables = bench.tables(*groups, layout=Layout())
            metadata = [bench.backend.build_metadata(tables, group) for group in range(2)]
            for parts, built, layer in zip(groups, metadata, specs, strict=True):
                for part, out in zip(parts, bench.forward(parts, store, built, layer, Layout()), strict=True):
                    expected = dense(part.request, layer)[part.start : part.end]
                    what = f"tokens {part.start} to {part.end} of the group with window {layer.window}"
                    self.close(out, expected, what, dtype=dtype)

    def test_caches_are_apart(self, dtype: torch.dtype) -> None:
        """attention.29: layers that do not share a cache do not share memory."""
        bench, spec = self.bench(dtype), self.spec()
        requests, blocks = bench.requests(spec, (30, 30))
        twin = replace(requests[1], blocks=requests[0].blocks)
        stores = [bench.backend.allocate(spec, blocks) for _ in range(2)]
        both = (requests[0], twin)
        for request, store in zip(both, stores, strict=True):
            bench.run([Part(request, 0, 25)], store, spec)
        for request, store in zip(both, stores, strict=True):
            out = bench.run([Part(request, 25, 30)], store, spec)[0]
            self.close(out, dense(request, spec)[25:], "two caches with the same block ids", dtype=dtype)

    # ---- dtypes and refusals

    def test_kv_dtypes(self, dtype: torch.dtype) -> None:
        """attention.30: every declared dtype of the KV cache works, with keys and values rounded to it, or scaled where
        it is one of integers, and takes the bytes that it says, of which heads padded for the chip's sake may be most.
        """
        for name in self.manifest.kv_dtypes:
            kv_dtype = dtype if name == "auto" else getattr(torch, name)
            bench, spec = self.bench(dtype, kv_dtype), self.spec()
            requests, blocks = bench.requests(spec, (33, 50))
            bare = 2 * bench.block_size * spec.num_kv_heads * spec.head_size * kv_dtype.itemsize
            page = bench.backend.page_bytes(spec)
            self.check(bare <= page <= 2 * bare, f"page_bytes with a {name} cache is {page}; the bare size is {bare}.")
            outs = _ragged(bench, spec, requests, bench.backend.allocate(spec, blocks), (1, 20))
            looser = max(1.0, NARROW.get(kv_dtype, 0.0) / TOLERANCE[dtype])
            rounded = [dense(request, spec, kv_dtype) for request in requests]
            for out, expected in zip(outs, rounded, strict=True):
                self.close(out, expected, f"a {name} cache", dtype=dtype, looser=looser)

    def test_refusals(self) -> None:
        """attention.31: a dtype or block size that the manifest does not declare works, or is refused with a
        ConfigError that names it.
        """
        declared = [getattr(torch, name) for name in self.manifest.dtypes]
        usual = self.block_sizes()[0]
        for dtype in {torch.bfloat16, torch.float16, torch.float32} - set(declared):
            self._works_or_refuses(dtype, dtype, usual, str(dtype).removeprefix("torch."))
        if "auto" in self.manifest.kv_dtypes and len(self.manifest.kv_dtypes) == 1:
            other = next(d for d in (torch.float32, torch.bfloat16, torch.float16) if d != declared[0])
            self._works_or_refuses(declared[0], other, usual, str(other).removeprefix("torch."))
        for size in (3, 24):
            if self.manifest.block_sizes and size not in self.manifest.block_sizes:
                self._works_or_refuses(declared[0], declared[0], size, str(size))

    def test_saturation(self, dtype: torch.dtype) -> None:
        """attention.32: keys and values beyond the range of the cache's dtype become its largest, not infinity or NaN,
        which would stay in the cache.
        """
        kv_dtypes = [getattr(torch, name) for name in self.manifest.kv_dtypes if name != "auto"]
        largest = {kv_dtype: torch.finfo(kv_dtype).max for kv_dtype in kv_dtypes if kv_dtype.is_floating_point}
        narrow = [kv_dtype for kv_dtype in largest if largest[kv_dtype] < min(FAR, torch.finfo(dtype).max)]
        if not narrow:
            self.lacks(f"kv_dtypes of a smaller range than {dtype}")
        for kv_dtype in narrow:
            bench, spec, beyond = self.bench(dtype, kv_dtype), self.spec(), 2 * largest[kv_dtype]
            (request,), blocks = bench.requests(spec, (20,))
            out = self.run_whole(bench, spec, with_values(request, beyond), blocks)
            expected = torch.full(out.shape, largest[kv_dtype], dtype=torch.float64)
            self.close(out, expected, f"values of {beyond:g} in a cache of {kv_dtype}", dtype=dtype)

    # ---- projections

    @pytest.mark.parametrize("name", STYLES)
    def test_projection(self, dtype: torch.dtype, name: str) -> None:
        """attention.33: a projection that is still to be prepared is normalised, rotated and stored as by the
        operations one by one: whatever is normalised, however much of a head is turned.
        """
        bench, spec, style = self.bench(dtype), self.spec(), STYLES[name]
        requests, blocks = bench.requests(spec, (1, 18, 66))
        given = preparation(style, spec, dtype, bench.device, bench.ops)
        outs = _ragged(bench, spec, requests, bench.backend.allocate(spec, blocks), (1, 5, 33), preparation=given)
        ready = [prepared(request, style, spec) for request in requests]
        self._agree(outs, ready, spec, dtype, f"a projection, {name}", looser=2)

    @pytest.mark.parametrize(
        "layout",
        [Layout(row_stride=2), Layout(padding_tokens=9, padding_requests=3, padding_value=0.0)],
        ids=["row stride", "padding"],
    )
    def test_layout_of_projections(self, dtype: torch.dtype, layout: Layout) -> None:
        """attention.34: a projection's rows may be strided and some of them padding, zeros too."""
        bench, spec, style = self.bench(dtype), self.spec(), STYLES["norms"]
        requests, blocks = bench.requests(spec, (20, 33))
        given = preparation(style, spec, dtype, bench.device, bench.ops)
        outs = _ragged(bench, spec, requests, bench.backend.allocate(spec, blocks), (1, 16), layout, given)
        ready = [prepared(request, style, spec) for request in requests]
        self._agree(outs, ready, spec, dtype, f"a projection, {layout}", looser=2)

    def test_projections_share_the_cache(self, dtype: torch.dtype) -> None:
        """attention.35: steps that hand over projections and steps that hand over queries, keys and values read the
        same cache, in every declared dtype.
        """
        for name in self.manifest.kv_dtypes:
            kv_dtype = dtype if name == "auto" else getattr(torch, name)
            bench, spec, style = self.bench(dtype, kv_dtype), self.spec(), STYLES["norms"]
            (request,), blocks = bench.requests(spec, (40,))
            ready, store = prepared(request, style, spec), bench.backend.allocate(spec, blocks)
            given = preparation(style, spec, dtype, bench.device, bench.ops)
            outs = bench.run([Part(ready, 0, 17)], store, spec)
            outs += bench.run([Part(request, 17, 30)], store, spec, preparation=given)
            outs += bench.run([Part(ready, 30, 39)], store, spec)
            outs += bench.run([Part(request, 39, 40)], store, spec, preparation=given)
            looser = max(2.0, NARROW.get(kv_dtype, 0.0) / TOLERANCE[dtype])
            expected = dense(ready, spec, kv_dtype)
            self.close(torch.cat(outs), expected, f"a {name} cache, written either way", dtype=dtype, looser=looser)

    # ---- shared steps

    def _works_or_refuses(self, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int, named: str) -> None:
        __tracebackhide__ = True
        what = f"dtype {dtype}, kv_dtype {kv_dtype}, block size {block_size}"
        try:
            bench = self.bench(dtype, kv_dtype, block_size)
        except ConfigError as error:
            self.check(named in str(error), f"{what} is refused without naming {named}: {error}")
            return
        except Exception as error:  # noqa: BLE001  any other exception is the finding
            self.fail(f"{what}: expected a ConfigError or a working backend, got {type(error).__name__}: {error}")
        spec = self.spec()
        (request,), blocks = bench.requests(spec, (33,))
        expected = dense(request, spec, kv_dtype)
        narrower = max(dtype, kv_dtype, key=lambda d: torch.finfo(d).eps)
        looser = torch.finfo(narrower).eps / torch.finfo(dtype).eps
        self.close(self.run_whole(bench, spec, request, blocks), expected, what, dtype=dtype, looser=looser)

    def _ragged_agrees(self, dtype: torch.dtype, spec: AttentionSpec, what: str, looser: float = 1) -> None:
        __tracebackhide__ = True
        bench = self.bench(dtype)
        requests, blocks = bench.requests(spec, (1, 18, 66))
        outs = _ragged(bench, spec, requests, bench.backend.allocate(spec, blocks), (1, 5, 33))
        self._agree(outs, requests, spec, dtype, what, looser)

    def _agree(
        self,
        outs: Sequence[Tensor],
        requests: Sequence[Request],
        spec: AttentionSpec,
        dtype: torch.dtype,
        what: str,
        looser: float = 1,
    ) -> None:
        __tracebackhide__ = True
        for out, request in zip(outs, requests, strict=True):
            expected = dense(request, spec)
            self.close(out, expected, f"{len(request)} tokens, {what}", dtype=dtype, looser=looser)

    def _poison_null_block(self, bench: Bench, store: Any, spec: AttentionSpec) -> None:
        nobody = Part(bench.request(spec, 0, (), seed=0), 0, 0)
        layout = Layout(padding_tokens=2 * bench.block_size, padding_value=1e4)
        bench.run([nobody], store, spec, layout)

    def _with_common_prefix(self, bench: Bench, spec: AttentionSpec) -> tuple[list[Request], int]:
        """Two requests that agree in their first whole blocks, and hold them in common."""
        size = bench.block_size
        length = 2 * max(size, 8)
        pages = length // size
        requests, blocks = bench.requests(spec, (length + 9, length + 14))
        first, second = requests
        for name in ("q_LHK", "k_LNK", "v_LNK"):
            getattr(second, name)[:length] = getattr(first, name)[:length]
        return [first, replace(second, blocks=first.blocks[:pages] + second.blocks[pages:])], blocks


def _common_blocks(first: Request, second: Request) -> list[int]:
    return [a for a, b in zip(first.blocks, second.blocks, strict=False) if a == b]


def _ragged(
    bench: Bench,
    spec: AttentionSpec,
    requests: Sequence[Request],
    store: Any,
    chunks: Sequence[int],
    layout: Layout | None = None,
    preparation: Preparation | None = None,
) -> list[Tensor]:
    """Compute all requests side by side, each in chunks of random sizes; returns all rows of each."""
    rng = random.Random(1)
    done = [0] * len(requests)
    rows: list[list[Tensor]] = [[] for _ in requests]
    while any(d < len(r) for d, r in zip(done, requests, strict=True)):
        chosen = [i for i, r in enumerate(requests) if done[i] < len(r)]
        rng.shuffle(chosen)
        ends = {i: min(len(requests[i]), done[i] + rng.choice(chunks)) for i in chosen}
        parts = [Part(requests[i], done[i], ends[i]) for i in chosen]
        for i, out in zip(chosen, bench.run(parts, store, spec, layout, preparation), strict=True):
            rows[i].append(out)
            done[i] = ends[i]
    return [torch.cat(outs) for outs in rows]


def _visible_bytes(store: Any) -> int:
    """Bytes of every array that a cache holds, as far as it shows them; 0 if it shows none."""
    return sum({id(array): int(array.nbytes) for array in _arrays(store)}.values())


def _arrays(value: Any, depth: int = 4) -> Iterator[Any]:
    if isinstance(getattr(value, "nbytes", None), int):
        yield value
    elif depth:
        for part in _parts(value):
            yield from _arrays(part, depth - 1)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(value, name)]
    return [getattr(value, name) for name in slots] + list(getattr(value, "__dict__", {}).values())


@cache
def _platform(name: str) -> Platform:
    made: Platform = registered(name).find("platforms").cls(PlatformConfig(num_threads=1))
    return made


@cache
def _platform_of(backend: str) -> str | None:
    """The first platform whose manifest lists the backend, preferably one that is available; None if none does."""
    listing = [entry for entry in installed().platforms.ranked() if backend in entry.manifest.attention]
    here = [entry for entry in listing if entry.load().probe().available]
    return next((entry.name for entry in (*here, *listing)), None)

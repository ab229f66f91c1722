"""Attention backends with one realistic mistake each: the suite catches every one, in the scenario that is about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from dovetail.contracts.attention import AttentionBackend, AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.ops import reference
from dovetail.plugins.manifest import AttentionManifest
from dovetail.testing.conformance import AttentionSuite, scenarios, unregistered

MANIFEST = AttentionManifest(
    name="loops",
    summary="For tests.",
    device_types=("cpu",),
    dtypes=("float32",),
    kv_dtypes=("auto", "bfloat16", "float16"),
    block_sizes=(8, 16, 32),
    sliding_window=True,
    soft_cap=True,
    verify=True,
)


@dataclass
class Tables:
    """One step's tables of one group, on the host."""

    table: Tensor
    starts: list[int]
    lengths: list[int]
    slots: Tensor


class Loops(AttentionBackend):
    """A right backend, in pieces small enough to break one at a time."""

    def __init__(
        self, *, ops: OpTable, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
    ) -> None:
        self.dtype, self.kv_dtype, self.block_size = dtype, kv_dtype, block_size

    def page_bytes(self, spec: AttentionSpec) -> int:
        return 2 * self.block_size * spec.num_kv_heads * spec.head_size * self.kv_dtype.itemsize

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> Tensor:
        return torch.zeros(2, num_blocks * self.block_size, spec.num_kv_heads, spec.head_size, dtype=self.kv_dtype)

    def build_metadata(self, step: StepTensors, group: int) -> Tables:
        starts, lengths = step.query_start_R1.tolist(), step.seq_lens_R.tolist()
        return Tables(step.block_tables[group], starts, lengths, step.slot_mapping[group])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, metadata: Tables, spec: AttentionSpec) -> Tensor:
        self.store(cache, k, v, metadata.slots)
        out = torch.zeros_like(q)
        for r in range(len(metadata.lengths)):
            start, end = metadata.starts[r : r + 2]
            if end > start:
                out[start:end] = self.request(q[start:end], cache, metadata, r, spec)
        return self.finish(out, metadata).flatten(1)

    def store(self, cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        cache[0, slots], cache[1, slots] = self.stored(k), self.stored(v)

    def stored(self, x: Tensor) -> Tensor:
        most = min(torch.finfo(self.kv_dtype).max, torch.finfo(x.dtype).max)
        return x.clamp(-most, most).to(self.kv_dtype)

    def request(self, q: Tensor, cache: Tensor, metadata: Tables, r: int, spec: AttentionSpec) -> Tensor:
        length = metadata.lengths[r]
        positions = self.positions(len(q), length)
        first = 0 if spec.window is None else max(0, int(positions[0]) - spec.window + 1)
        keys = self.keys(first, length)
        places = self.places(metadata, r, keys)
        k, v = (self.expand(part[places].float(), spec) for part in cache)
        scores = self.scores(q.float(), k, spec)
        scores = scores.masked_fill(~self.visible(positions, keys, spec), -torch.inf)
        return torch.einsum("hqk,khd->qhd", self.softmax(scores), v).to(q.dtype)

    def positions(self, count: int, length: int) -> Tensor:
        return torch.arange(length - count, length)

    def keys(self, first: int, length: int) -> Tensor:
        return torch.arange(first, length)

    def places(self, metadata: Tables, r: int, keys: Tensor) -> Tensor:
        return metadata.table[r, keys // self.block_size].long() * self.block_size + keys % self.block_size

    def expand(self, x: Tensor, spec: AttentionSpec) -> Tensor:
        return x.repeat_interleave(spec.num_heads // spec.num_kv_heads, dim=1)

    def scores(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.scale
        return scores if spec.soft_cap is None else spec.soft_cap * torch.tanh(scores / spec.soft_cap)

    def visible(self, positions: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
        distance = positions.unsqueeze(1) - keys
        return (distance >= 0) & (distance < (spec.window or 1 << 30))

    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def finish(self, out: Tensor, metadata: Tables) -> Tensor:
        return out


class CountsKeysAlone(Loops):
    def page_bytes(self, spec: AttentionSpec) -> int:
        return super().page_bytes(spec) // 2


class TakesMoreThanItSays(Loops):
    def allocate(self, spec: AttentionSpec, num_blocks: int) -> Tensor:
        return super().allocate(spec, 2 * num_blocks)


class PagesGrowWithQueryHeads(Loops):
    def page_bytes(self, spec: AttentionSpec) -> int:
        return super().page_bytes(spec) * spec.num_heads // spec.num_kv_heads


class NotCausal(Loops):
    def visible(self, positions: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
        return super().visible(positions.clamp(min=int(keys[-1])), keys, spec)


class AnswersInFloat64(Loops):
    def finish(self, out: Tensor, metadata: Tables) -> Tensor:
        return out.double()


class MissesItself(Loops):
    def visible(self, positions: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
        return super().visible(positions - (positions > 0).long(), keys, spec)


class DecodesComeFirst(Loops):
    def build_metadata(self, step: StepTensors, group: int) -> Tables:
        tables = super().build_metadata(step, group)
        counts = sorted(torch.tensor(tables.starts).diff().tolist())
        return replace(tables, starts=[0, *accumulate(counts)])


class ChunksStartAtZero(Loops):
    def positions(self, count: int, length: int) -> Tensor:
        return torch.arange(count)


class HeadsInterleaved(Loops):
    def expand(self, x: Tensor, spec: AttentionSpec) -> Tensor:
        return x.repeat(1, spec.num_heads // spec.num_kv_heads, 1)


class HeadsCutToSixteens(Loops):
    def scores(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        size = max(8, spec.head_size // 16 * 16)
        return super().scores(q[..., :size], k[..., :size], spec)


class ScaleOfTheHeadSize(Loops):
    def scores(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        return super().scores(q, k, replace(spec, scale=spec.head_size**-0.5))


class WindowOneTooWide(Loops):
    def request(self, q: Tensor, cache: Tensor, metadata: Tables, r: int, spec: AttentionSpec) -> Tensor:
        return super().request(q, cache, metadata, r, replace(spec, window=spec.window and spec.window + 1))


class WindowIgnored(Loops):
    def request(self, q: Tensor, cache: Tensor, metadata: Tables, r: int, spec: AttentionSpec) -> Tensor:
        return super().request(q, cache, metadata, r, replace(spec, window=None))


class WindowInWholePages(Loops):
    def request(self, q: Tensor, cache: Tensor, metadata: Tables, r: int, spec: AttentionSpec) -> Tensor:
        window = spec.window and -(-spec.window // self.block_size) * self.block_size
        return super().request(q, cache, metadata, r, replace(spec, window=window))


class SoftCapIgnored(Loops):
    def scores(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        return super().scores(q, k, replace(spec, soft_cap=None))


class SoftCapBeforeScale(Loops):
    def scores(self, q: Tensor, k: Tensor, spec: AttentionSpec) -> Tensor:
        return super().scores(q, k, replace(spec, scale=1.0)) * spec.scale


class SoftCapWithoutWindow(Loops):
    def visible(self, positions: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
        return super().visible(positions, keys, replace(spec, window=spec.window if spec.soft_cap is None else None))


class DraftsSeeEachOther(Loops):
    def visible(self, positions: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
        few = 1 < len(positions) < 8 and int(positions[0]) > 0
        return super().visible(positions.clamp(min=int(keys[-1])) if few else positions, keys, spec)


class KeepsTheFirstWrite(Loops):
    def store(self, cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        empty = (cache[0, slots] == 0).all(-1).all(-1)
        super().store(cache, k[empty], v[empty], slots[empty])


class ForgetsBeyond2048(Loops):
    def keys(self, first: int, length: int) -> Tensor:
        return torch.arange(max(first, length - 2048), length)


class SoftmaxWithoutMaximum(Loops):
    def softmax(self, scores: Tensor) -> Tensor:
        weights = scores.exp()
        return weights / weights.sum(-1, keepdim=True)


class FirstThirtyTwoRequests(Loops):
    def finish(self, out: Tensor, metadata: Tables) -> Tensor:
        out[metadata.starts[min(32, len(metadata.lengths))] :] = 0
        return out


class BlocksInARow(Loops):
    def places(self, metadata: Tables, r: int, keys: Tensor) -> Tensor:
        page = keys[0] // self.block_size
        first = metadata.table[r, page].long() * self.block_size
        return (first + keys - page * self.block_size) % (int(metadata.table.max() + 1) * self.block_size)


class MultipliesWhatIsMasked(Loops):
    def keys(self, first: int, length: int) -> Tensor:
        return torch.arange(first, -(-length // self.block_size) * self.block_size)


class SeesTheNullBlock(Loops):
    def keys(self, first: int, length: int) -> Tensor:
        return torch.arange(first, length + 1)

    def places(self, metadata: Tables, r: int, keys: Tensor) -> Tensor:
        return torch.cat([super().places(metadata, r, keys[:-1]), torch.zeros(1, dtype=torch.long)])

    def visible(self, positions: Tensor, keys: Tensor, spec: AttentionSpec) -> Tensor:
        always = torch.ones(len(positions), 1, dtype=torch.bool)
        return torch.cat([super().visible(positions, keys[:-1], spec), always], 1)


class PagesBeginRequests(Loops):
    def keys(self, first: int, length: int) -> Tensor:
        return torch.arange(max(first, (length - 1) // self.block_size * self.block_size), length)


class AttendsBeforeAllIsStored(Loops):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, metadata: Tables, spec: AttentionSpec) -> Tensor:
        out = torch.zeros_like(q)
        for r in range(len(metadata.lengths)):
            start, end = metadata.starts[r : r + 2]
            if end > start:
                self.store(cache, k[start:end], v[start:end], metadata.slots[start:end])
                out[start:end] = self.request(q[start:end], cache, metadata, r, spec)
        return out.flatten(1)


class DividesByTheTokens(Loops):
    def finish(self, out: Tensor, metadata: Tables) -> Tensor:
        return out * (metadata.starts[-1] / torch.tensor(float(metadata.starts[-1])))


class PaddingIsNaN(Loops):
    def finish(self, out: Tensor, metadata: Tables) -> Tensor:
        out[metadata.starts[-1] :] = torch.nan
        return out


class SkipsEmptyRequestsInTheTable(Loops):
    def build_metadata(self, step: StepTensors, group: int) -> Tables:
        tables = super().build_metadata(step, group)
        counts = torch.tensor(tables.starts).diff()
        keep = counts.nonzero().squeeze(1).tolist()
        return replace(
            tables,
            starts=[tables.starts[r] for r in keep] + [tables.starts[-1]],
            lengths=[tables.lengths[r] for r in keep],
        )


class TablesMustBeContiguous(Loops):
    def places(self, metadata: Tables, r: int, keys: Tensor) -> Tensor:
        table = metadata.table
        packed = torch.as_strided(table, table.shape, (table.shape[1], 1), table.storage_offset())
        return super().places(replace(metadata, table=packed), r, keys)


class TrustsTheMaxima(Loops):
    def build_metadata(self, step: StepTensors, group: int) -> Tables:
        tables = super().build_metadata(step, group)
        longest = max(range(len(tables.lengths)), key=tables.lengths.__getitem__)
        room = step.block_tables[group].shape[1] * self.block_size
        tables.lengths[longest] = min(step.max_seq_len, room)
        return tables


class InputsMustBeApart(Loops):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, metadata: Tables, spec: AttentionSpec) -> Tensor:
        shape = q.shape
        strides = (shape[1] * shape[2], shape[2], 1)
        q = torch.as_strided(q, shape, strides, q.storage_offset())
        return super().forward(q, k, v, cache, metadata, spec)


class MetadataByShape(Loops):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.known: dict[Any, Tables] = {}

    def build_metadata(self, step: StepTensors, group: int) -> Tables:
        built = super().build_metadata(step, group)
        known = self.known.setdefault((len(built.slots), len(built.lengths)), built)
        known.lengths[:], known.table, known.slots = built.lengths, built.table, built.slots
        return known


class AlwaysTheFirstGroup(Loops):
    def build_metadata(self, step: StepTensors, group: int) -> Tables:
        return super().build_metadata(step, 0)


class OneCacheForAll(Loops):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.cache: Tensor | None = None

    def allocate(self, spec: AttentionSpec, num_blocks: int) -> Tensor:
        if self.cache is None:
            self.cache = super().allocate(spec, num_blocks)
        return self.cache


class IgnoresTheDtypeOfTheCache(Loops):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "kv_dtype": arguments["dtype"]})


class OverflowsInTheCache(Loops):
    def stored(self, x: Tensor) -> Tensor:
        return x.to(self.kv_dtype)


class RefusesInItsOwnWay(Loops):
    def __init__(self, **arguments: Any) -> None:
        if arguments["block_size"] % 8:
            raise ValueError("unsupported")
        super().__init__(**arguments)


class RefusesWithoutAWord(Loops):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        if arguments["dtype"] is not torch.float32:
            self.block_size += 1  # runs, and is wrong


class NormalisesAfterTurning(Loops):
    def forward_projected(self, qkv, positions, preparation, cache, metadata, spec):
        q, k, v = replace(preparation, norm_weights_K=None).heads(qkv, positions, spec)
        if preparation.norm_weights_K is not None:
            weights = preparation.norm_weights_K
            q, k = (reference.rms_norm(x, w, preparation.eps) for x, w in zip((q, k), weights, strict=True))
        return self.forward(q, k, v, cache, metadata, spec)


class TurnsWholeHeads(Loops):
    def forward_projected(self, qkv, positions, preparation, *rest):
        angles = preparation.cos_sin_PK.unflatten(1, (2, -1))
        missing = rest[-1].head_size // 2 - angles.shape[2]
        table = torch.cat([angles, angles[..., :1].expand(-1, -1, missing)], dim=2).flatten(1)
        return super().forward_projected(qkv, positions, replace(preparation, cos_sin_PK=table), *rest)


class ProjectionsMustBeDense(Loops):
    def forward_projected(self, qkv, *rest):
        return super().forward_projected(torch.as_strided(qkv, qkv.shape, (qkv.shape[1], 1)), *rest)


class NormsWithoutEps(Loops):
    def forward_projected(self, qkv, positions, preparation, *rest):
        return super().forward_projected(qkv, positions, replace(preparation, eps=0.0), *rest)


class KeepsACacheOfItsOwn(Loops):
    def forward_projected(self, qkv, positions, preparation, cache, metadata, spec):
        q, k, v = preparation.heads(qkv, positions, spec)
        own = self.__dict__.setdefault("own", torch.zeros_like(cache))
        return self.forward(q, k, v, own, metadata, spec)


MUTANTS = {
    CountsKeysAlone: "attention.1",
    TakesMoreThanItSays: "attention.1",
    PagesGrowWithQueryHeads: "attention.2",
    NotCausal: "attention.3",
    AnswersInFloat64: "attention.3",
    MissesItself: "attention.4",
    DecodesComeFirst: "attention.5",
    ChunksStartAtZero: "attention.6",
    HeadsInterleaved: "attention.7",
    HeadsCutToSixteens: "attention.8",
    ScaleOfTheHeadSize: "attention.9",
    WindowOneTooWide: "attention.10",
    WindowIgnored: "attention.10",
    WindowInWholePages: "attention.11",
    SoftCapIgnored: "attention.12",
    SoftCapBeforeScale: "attention.12",
    SoftCapWithoutWindow: "attention.13",
    DraftsSeeEachOther: "attention.14",
    KeepsTheFirstWrite: "attention.14",
    ForgetsBeyond2048: "attention.15",
    SoftmaxWithoutMaximum: "attention.16",
    FirstThirtyTwoRequests: "attention.17",
    BlocksInARow: "attention.18",
    MultipliesWhatIsMasked: "attention.19",
    SeesTheNullBlock: "attention.20",
    PagesBeginRequests: "attention.21",
    AttendsBeforeAllIsStored: "attention.22",
    PaddingIsNaN: "attention.23",
    DividesByTheTokens: "attention.24",
    SkipsEmptyRequestsInTheTable: "attention.25",
    TablesMustBeContiguous: "attention.26",
    TrustsTheMaxima: "attention.26",
    InputsMustBeApart: "attention.26",
    MetadataByShape: "attention.27",
    AlwaysTheFirstGroup: "attention.28",
    OneCacheForAll: "attention.29",
    IgnoresTheDtypeOfTheCache: "attention.30",
    RefusesInItsOwnWay: "attention.31",
    RefusesWithoutAWord: "attention.31",
    OverflowsInTheCache: "attention.32",
    NormalisesAfterTurning: "attention.33",
    TurnsWholeHeads: "attention.33",
    ProjectionsMustBeDense: "attention.34",
    NormsWithoutEps: "attention.33",
    KeepsACacheOfItsOwn: "attention.35",
}


class TestTheUnbrokenOne(AttentionSuite):
    subject = unregistered(Loops, MANIFEST)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_caught(mutant, failing):
    scenario = MUTANTS[mutant]
    reason = failing(AttentionSuite, unregistered(mutant, MANIFEST), scenario).get(scenario, "")
    assert reason.startswith(f"{scenario}: "), reason or f"{scenario} does not notice"


def test_every_scenario_catches_something():
    assert set(MUTANTS.values()) == {scenario.id for scenario in scenarios(AttentionSuite)}

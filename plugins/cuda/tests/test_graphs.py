"""Memory of steps that are captured as graphs: no graph keeps tensors, and all of them take what is set aside."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

from dovetail.contracts.attention import StepTensors
from dovetail_cuda import graphs
from dovetail_cuda.graphs import GraphPool, GraphStep
from dovetail_cuda.platform import GRAPHS, CudaPlatform

needs_gpu = pytest.mark.skipif(not CudaPlatform.probe().available, reason="lacks a GPU")
WIDTH, VOCABULARY = 256, 50_000
SIZES = range(8, 264, 8)


def tables(size: int, device: torch.device, seed: int = 0) -> StepTensors:
    """A step of as many tokens as requests, each of which wants logits."""
    generator = torch.Generator().manual_seed(size + 1000 * seed)
    rows = torch.arange(size, dtype=torch.int32, device=device)
    return StepTensors(
        token_ids_T=torch.randint(VOCABULARY, (size,), generator=generator).to(device),
        positions_T=torch.randint(1000, (size,), generator=generator).to(device),
        query_start_R1=torch.arange(size + 1, dtype=torch.int32, device=device),
        seq_lens_R=rows,
        block_tables=(torch.zeros(size, 1024, dtype=torch.int32, device=device),),
        slot_mapping=(rows.to(torch.int64),),
        logits_rows_S=rows.to(torch.int64),
        max_query_len=1,
        max_seq_len=1000,
    )


class Model:
    """Two products, one of them with the vocabulary."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table_VD = torch.randn(VOCABULARY, WIDTH, generator=generator).to(device)
        self.weight_DD = torch.randn(WIDTH, WIDTH, generator=generator).to(device) / WIDTH**0.5

    def step(self, tensors, metadata):
        hidden_TD = (self.table_VD[tensors.token_ids_T] + tensors.positions_T.unsqueeze(1)) @ self.weight_DD
        return hidden_TD, hidden_TD[tensors.logits_rows_S] @ self.table_VD.t()


class NoDevice(GraphPool):
    """Runs what is recorded, and lets it go."""

    def __init__(self):
        self.made = []

    def capture(self, run):
        result = run()
        inputs, outputs = result
        self.made.append([weakref.ref(tensor) for tensor in (*inputs, *outputs)])
        return SimpleNamespace(replay=lambda: None), result


def test_a_graph_keeps_no_tensor(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)  # this stand-in computes while it records
    monkeypatch.setattr(graphs, "borrowed", torch.zeros_like)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    pool, device = NoDevice(), torch.device("cpu")
    run = GraphStep(Model(device).step, pool)
    for _ in range(3):
        outputs = run(tables(8, device), [{"seen": torch.ones(8)}])
    gc.collect()
    assert [len(tensors) for tensors in pool.made] == [10]
    assert [made() for tensors in pool.made for made in tensors] == [None] * 10
    assert [tuple(tensor.shape) for tensor in outputs] == [(8, WIDTH), (8, VOCABULARY)]


class Counts:
    """Figures of a device, as torch has them."""

    reserved, allocated, most_reserved, free = 20 << 30, 19 << 30, 23 << 30, 50 << 30

    def __init__(self, monkeypatch):
        for name, value in {
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (self.free, 80 << 30),
            "memory_reserved": lambda device: self.reserved,
            "memory_allocated": lambda device: self.allocated,
            "max_memory_reserved": lambda device: self.most_reserved,
            "reset_peak_memory_stats": lambda device: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


@pytest.mark.parametrize("eager", [False, True])
def test_the_largest_step_is_set_aside_once_for_steps_and_once_for_graphs(eager, monkeypatch):
    """What others hold of the device is no business of this process."""
    Counts(monkeypatch)
    tested = object.__new__(CudaPlatform)
    aside = []
    tested._device, tested._free_at_start = torch.device("cpu"), 70 << 30
    tested._pool = None if eager else SimpleNamespace(set_aside=aside.append)
    memory = tested.memory()
    step = 3 << 30
    assert memory.held == 19 << 30
    assert memory.peak - memory.held == (step if eager else 2 * step + GRAPHS)
    assert aside == ([] if eager else [step])


@needs_gpu
@torch.inference_mode()
def test_graphs_of_all_sizes_take_what_is_set_aside():
    """Sizes that grow by one eighth of the smallest: none of their logits would fit where the last one's were."""
    device = torch.device("cuda")
    model = Model(device)
    counted = object.__new__(CudaPlatform)
    counted._device, counted._free_at_start = device, torch.cuda.mem_get_info()[0]
    counted._pool = pool = GraphPool(device)
    counted.memory()
    model.step(tables(max(SIZES), device), [])
    model.step(tables(max(SIZES), device), [])
    memory = counted.memory()
    room = memory.peak - memory.held
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    steps = {size: GraphStep(model.step, pool) for size in SIZES}
    for size, step in steps.items():
        for seed in range(2):
            step(tables(size, device, seed), [])
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - reserved <= room
    assert free - torch.cuda.mem_get_info()[0] <= room
    assert sum(size * VOCABULARY * 4 for size in SIZES) > 3 * room
    for seed in (2, 3):
        for size in (*SIZES, *reversed(SIZES)):
            tensors = tables(size, device, seed)
            hidden, logits = (tensor.clone() for tensor in steps[size](tensors, []))
            for got, want in zip((hidden, logits), model.step(tensors, []), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


@needs_gpu
@torch.inference_mode()
def test_borrowed_memory_is_the_tensors_and_is_free_for_others():
    base = torch.arange(24, dtype=torch.bfloat16, device="cuda").reshape(4, 6)
    view = graphs.borrowed(base[1:, ::2])
    assert view.tolist() == base[1:, ::2].tolist()
    place, before = base.data_ptr(), torch.cuda.memory_allocated()
    del base
    assert torch.cuda.memory_allocated() < before
    assert torch.zeros(24, dtype=torch.bfloat16, device="cuda").data_ptr() == place
    assert view.tolist() == [[0] * 3] * 3

"""The backend ``cudnn`` as far as it goes without a GPU: how it describes a step to the library, which is not here."""

from dataclasses import replace
from importlib import import_module, metadata
from itertools import pairwise, zip_longest
from types import SimpleNamespace

import pytest
import torch

from dovetail.contracts.attention import AttentionSpec, StepTensors
from dovetail.contracts.ops import OpTable
from dovetail.errors import ConfigError, PluginLoadError
from dovetail.options import EngineOptions
from dovetail.plugins import requirements
from dovetail.plugins.host import PluginHost
from dovetail.resolution import attention
from dovetail.tensors import leaves

SPEC = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.3)
CHOICES = {
    "ops": OpTable(),
    "device": torch.device("cpu"),
    "dtype": torch.bfloat16,
    "kv_dtype": torch.bfloat16,
    "block_size": 16,
}
CAUSAL = {"diagonal_alignment": "bottom right", "diagonal_band_right_bound": 0}


class Described(SimpleNamespace):
    """A tensor of a graph."""

    def __getattr__(self, name):
        key = name.removeprefix("set_")
        assert name != key, name
        return lambda value: setattr(self, key, value) or self


class Graph:
    """Keeps what it is told, and what it is run on."""

    built = ()

    def __init__(self, **choices):
        self.tensors, self.attention, self.runs = {}, None, []
        Graph.built = (*Graph.built, self)

    def tensor(self, **description):
        self.tensors[description["name"]] = Described(**description)
        return self.tensors[description["name"]]

    def sdpa(self, **attention):
        self.attention = attention
        self.tensors["OUT"] = Described()
        return self.tensors["OUT"], None

    def execute(self, pointers, workspace, handle):
        self.runs.append(pointers)

    def get_workspace_size(self):
        return 32

    def validate(self, *_):
        """Nor do the other stages do anything."""

    build_operation_graph = create_execution_plans = check_support = build_plans = validate


@pytest.fixture
def library(monkeypatch):
    monkeypatch.setattr(Graph, "built", ())
    fake = SimpleNamespace(
        pygraph=Graph,
        create_handle=object,
        set_stream=lambda handle, stream: None,
        backend_version=lambda: 91900,
        backend_version_string=lambda: "9.1.0",
        data_type=SimpleNamespace(BFLOAT16="bf16", HALF="fp16", FLOAT="fp32", INT32="int32"),
        heur_mode=SimpleNamespace(A="A"),
        diagonal_alignment=SimpleNamespace(BOTTOM_RIGHT="bottom right"),
    )
    monkeypatch.setitem(import_module("sys").modules, "cudnn", fake)
    for module in ("cudnn_attention", "cudnn_plans"):  # what other tests imported holds another library
        monkeypatch.delitem(import_module("sys").modules, f"dovetail_cuda.{module}", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return fake


@pytest.fixture
def backend(library):
    return import_module("dovetail_cuda.cudnn_attention").CudnnAttention(**CHOICES)


def step(starts=(0, 7, 7, 9), lengths=(7, 0, 40), strided=False):
    """Three requests, of which the second has no tokens; padding may follow up to 9 tokens."""
    table = torch.arange(24, dtype=torch.int32).view(3, 8)
    return StepTensors(
        token_ids_T=torch.zeros(9, dtype=torch.int64),
        positions_T=torch.zeros(9, dtype=torch.int64),
        query_start_R1=torch.tensor(starts, dtype=torch.int32),
        seq_lens_R=torch.tensor(lengths, dtype=torch.int32),
        block_tables=[table[:, ::2] if strided else table],
        slot_mapping=[torch.zeros(9, dtype=torch.int64)],
        logits_rows_S=torch.zeros(0, dtype=torch.int64),
        max_query_len=max(b - a for a, b in pairwise(starts)),
        max_seq_len=40,
    )


def singles():
    """One token each, or none."""
    return step((0, 1, 1, 2), (20, 0, 40))


def run(backend, spec=SPEC, tables=None, projected=True):
    """A layer of a step; returns the graph that ran, and what was derived for it."""
    cache = backend.allocate(spec, 5)
    heads = spec.num_heads + 2 * spec.num_kv_heads if projected else spec.num_heads
    q_THK = torch.zeros((9, heads, spec.head_size), dtype=torch.bfloat16)[:, : spec.num_heads]
    built = backend.build_metadata(tables or step(), 0)
    before = [len(graph.runs) for graph in Graph.built]
    for _ in range(2):  # layers share what is derived
        assert backend.attend(q_THK, cache, built, spec).shape == (9, spec.num_heads * spec.head_size)
    (graph,) = [graph for graph, runs in zip_longest(Graph.built, before, fillvalue=0) if len(graph.runs) == runs + 2]
    assert set(graph.runs[0]) == {tensor.uid for tensor in graph.tensors.values()}
    return graph, built.derived


def test_queries_lie_one_request_after_the_other(backend):
    graph, derived = run(backend)
    described = graph.tensors
    assert (described["QUERIES"].dim, described["QUERIES"].stride) == ([3, 4, 9, 64], [9 * 512, 64, 512, 1])
    assert (described["OUT"].dim, described["OUT"].stride) == ([3, 4, 9, 64], [9 * 256, 64, 256, 1])
    assert (described["KEYS"].dim, described["KEYS"].stride) == ([5, 2, 16, 64], [2048, 1024, 64, 1])
    assert (described["KEY_TABLE"].dim, described["KEY_TABLE"].stride) == ([3, 1, 8, 1], [8, 8, 1, 1])
    assert described["QUERIES"].ragged_offset is described["QUERY_OFFSETS"]
    assert described["OUT"].ragged_offset is described["OUT_OFFSETS"]
    assert graph.attention["paged_attention_max_seq_len_kv"] == 128
    assert graph.attention["attn_scale"] == 0.3
    assert {name: x.tolist() for name, x in derived.items() if name != "table"} == {
        "counts": [7, 0, 2],
        ("offsets", 512): [0, 7 * 512, 7 * 512, 9 * 512],
        ("offsets", 256): [0, 7 * 256, 7 * 256, 9 * 256],
    }


def test_single_tokens_have_a_row_each(backend):
    graph, derived = run(backend, tables=singles())
    described = graph.tensors
    assert (described["QUERIES"].dim, described["QUERIES"].stride) == ([9, 4, 1, 64], [512, 64, 512, 1])
    assert (described["OUT"].dim, described["OUT"].stride) == ([9, 4, 1, 64], [256, 64, 256, 1])
    assert described["KEY_TABLE"].dim == [9, 1, 8, 1]
    assert derived["counts"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert derived["lengths"].tolist() == [20, 40, 0, 0, 0, 0, 0, 0, 0]
    assert derived["table"][:2].tolist() == [list(range(8)), list(range(16, 24))]


@pytest.mark.parametrize(
    ("tables", "window", "mask"),
    [
        (singles(), None, {}),
        (singles(), 20, {**CAUSAL, "diagonal_band_left_bound": 20}),
        (step(), None, CAUSAL),
        (step(), 20, {**CAUSAL, "diagonal_band_left_bound": 20}),
    ],
    ids=["single", "single, window", "mixed", "mixed, window"],
)
def test_tokens_see_what_is_before_them(backend, tables, window, mask):
    graph, _ = run(backend, replace(SPEC, window=window), tables)
    assert {key: value for key, value in graph.attention.items() if key.startswith("diagonal")} == mask


def test_plans_of_both_kinds_are_built_once_per_shape(backend):
    for tables in (step(), singles(), step(), singles(), step((0, 2, 5, 9))):
        run(backend, tables=tables)
    assert sorted(graph.tensors["QUERIES"].dim[2] for graph in Graph.built) == [1, 9]
    run(backend, tables=step(), projected=False)
    run(backend, tables=step(strided=True))
    assert len(Graph.built) == 6


def test_captured_steps_differ_by_their_kind_alone(backend):
    steps = (step(), step((0, 2, 5, 9)), singles())
    keys = [
        [x for x in leaves(backend.build_metadata(tables, 0)) if not isinstance(x, torch.Tensor)] for tables in steps
    ]
    assert keys == [[False], [False], [True]]


def test_the_cache_is_finite_from_the_start(backend):
    cache = backend.allocate(SPEC, 3)
    assert not cache.keys.any()
    assert not cache.values.any()


def test_steps_whose_offsets_exceed_32_bits_are_refused(backend):
    """With the heads of Llama-3.1-70B, on tensors without memory."""
    spec = AttentionSpec(num_heads=64, num_kv_heads=8, head_size=128, scale=1.0)
    most = (2**31 - 1) // (80 * 128)
    cache, built = backend.allocate(spec, 1), backend.build_metadata(step(), 0)
    for tokens in (most, most + 1):
        q_THK = torch.empty(tokens, 80, 128, dtype=torch.bfloat16, device="meta")[:, :64]
        if tokens == most:
            assert backend.attend(q_THK, cache, built, spec).shape == (most, 64 * 128)
        else:
            with pytest.raises(ConfigError, match=rf"{tokens} tokens .* --max-num-batched-tokens {most}, or use"):
                backend.attend(q_THK, cache, built, spec)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": torch.float32, "kv_dtype": torch.float32}, "torch.float32"),
        ({"kv_dtype": torch.float8_e4m3fn}, "--kv-cache-dtype auto"),
        ({"block_size": 24}, "not 24"),
    ],
)
def test_what_it_cannot_do_is_refused(library, change, named):
    with pytest.raises(ConfigError, match=named):
        import_module("dovetail_cuda.cudnn_attention").CudnnAttention(**{**CHOICES, **change})


def test_other_chips_and_old_libraries_are_refused(library, monkeypatch):
    backend = import_module("dovetail_cuda.cudnn_attention").CudnnAttention
    for capability in ((8, 9), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(ConfigError, match=r"capability 9\.0, and this has {}\.{}".format(*capability)):
            backend(**CHOICES)
    library.backend_version = lambda: 90100
    with pytest.raises(ConfigError, match=r"9\.1\.0 is installed.*pip install"):
        backend(**CHOICES)


def entry():
    return PluginHost().discover(warn=False).registries.attention.get("cudnn")


def test_without_the_library_the_reason_says_what_to_install(monkeypatch):
    def version(name):
        if name == "nvidia-cudnn-frontend":
            raise metadata.PackageNotFoundError
        return metadata.version(name)

    monkeypatch.setattr(requirements, "metadata", SimpleNamespace(**{**vars(metadata), "version": version}))
    with pytest.raises(PluginLoadError, match=r"requires nvidia-cudnn-frontend.*pip install 'dovetail-cuda\[cudnn\]'"):
        entry().load()


def test_it_is_taken_when_asked_for_and_where_it_fits():
    registries = PluginHost().discover(warn=False).registries
    chip = registries.platforms.get("cuda")
    assert chip.manifest.attention == ("triton", "cudnn")
    asked = EngineOptions(attention="cudnn", block_size=24)
    decision = attention.decide(asked, registries, chip, None, "float32", None, None)
    assert [reason.split("; ")[0] for reason in decision.obstacles] == [
        f"attention backend 'cudnn' of {entry().owner}: {reason}"
        for reason in ("does not accept float32", "has no 24-token blocks")
    ]

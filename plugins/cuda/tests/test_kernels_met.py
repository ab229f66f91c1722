"""Which kernels a start meets, and that serving launches no others: without a GPU, on tensors that have only shapes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

from dovetail import resolver
from dovetail.contracts.executor import Progress
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import MemoryInfo
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.runner import loaded_model, self_check
from dovetail.runner.executor import LocalExecutor
from dovetail.runner.loader import Plan, Target
from dovetail.testing import engine_request, run_until_idle
from dovetail_cuda.ops import table
from dovetail_cuda.sampling_ahead import sample_every_way
from dovetail_cuda.shapes import GraphShapes

SHAPES = Path(__file__).parents[3] / "benchmarks/gpu"
META = torch.device("meta")
WAYS = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"top_p": 0.9, "top_k": 20, "logprobs": 2},
    {"presence_penalty": 0.5, "logit_bias": {5: 1.0}},
    {"temperature": 0.0, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 0.0, "prompt_logprobs": 2},
)


class ShapesOnly:
    """The platform, on a device without memory; what comes back to the host is zero."""

    device = META

    def __init__(self, config):
        """Nothing to initialise."""

    def ops(self, dtype):
        return table()

    def memory(self):
        return MemoryInfo(total=80 << 30, available=60 << 30, dedicated=True, held=20 << 30, peak=21 << 30)

    def shape_policy(self, max_tokens, max_requests):
        return GraphShapes(max_tokens, max_requests)

    def upload(self, host):
        return torch.empty_like(host, device=META)

    def download(self, tensors):
        return lambda: [torch.zeros(x.shape, dtype=x.dtype) for x in tensors]

    def compile(self, step, bucket):
        return step


@pytest.fixture
def launched(monkeypatch):
    """Every kernel that was launched so far, with all that decides how it is compiled."""
    seen = {}

    def run(kernel, *args, grid, warmup, **options):
        _, keys, _, _, binder = kernel.device_caches[0]
        _, specialization, rest = binder(*args, debug=False, instrumentation_mode="", **options)
        seen[(f"{kernel.__module__}.{kernel.__name__}", jit.compute_cache_key(keys, specialization, rest))] = None

    hopper = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(triton.runtime.driver, "_active", hopper)
    monkeypatch.setattr(self_check, "checked_ops", lambda part, platform, dtype: OpTable.resolve(table(), owner=""))
    monkeypatch.setattr(self_check, "check_attention", lambda *_: None)
    monkeypatch.setattr(loaded_model, "fill_with_noise", fill)
    return seen


def fill(model, progress):
    """Tensors without content."""
    blocks = Plan(model).blocks
    empty = {
        Target(name, suffix): torch.empty(spec.shape, dtype=spec.dtype, device=META)
        for name, block in blocks.items()
        for suffix, spec in block.specs.items()
        if not spec.optional
    }
    for name, block in blocks.items():
        block.finalize({target.suffix: x for target, x in empty.items() if target.block == name})


def configuration(shape):
    """A shape of two layers, of which the last may be computed for some rows alone, on this platform."""
    registries = PluginHost().discover().registries
    options = EngineOptions(model=str(SHAPES / shape), load_format="dummy", dtype="bfloat16", platform="cpu")
    config = resolver.resolve(options, registries)
    part = msgspec.structs.replace(config.platform, target=f"{__name__}:ShapesOnly", claims={})
    attention = msgspec.structs.replace(config.attention, target="dovetail_cuda.attention:TritonAttention", claims={})
    return msgspec.structs.replace(
        config,
        hf_config={**config.hf_config, "num_hidden_layers": 2},
        platform=part,
        attention=attention,
        max_model_len=1024,
        max_num_seqs=48,
        max_num_batched_tokens=1024,
    )


@pytest.mark.parametrize("shape", ["qwen3_0p6b", "qwen3_30b_a3b"])
def test_serving_launches_what_the_start_met(shape, launched):
    sample_every_way(torch.empty(48, 151936, dtype=torch.bfloat16, device=META))
    executor = LocalExecutor(configuration(shape))
    ahead = set(launched)
    engine = Engine(executor._config, executor, executor.load(Progress()))
    met = set(launched)
    assert 30 < len(met) < 100
    assert not [name for name, _ in met - ahead if name.split(".")[2] in ("sampling", "scan", "penalties", "logprobs")]
    for count in (1, 2, 3, 17, 40):
        for way in WAYS:
            for i in range(count):
                engine.add(engine_request(range(5, 6 + 37 * i % 300 + count), max_tokens=3, **way))
            run_until_idle(engine)
    assert sorted(set(launched) - met) == []

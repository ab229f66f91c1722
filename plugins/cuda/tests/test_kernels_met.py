"""Which kernels a start meets, and that later starts and serving launch no others: without a GPU, on tensors that have
only shapes.
"""

from __future__ import annotations

import importlib
import pkgutil
from importlib.resources import files
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
from dovetail_cuda import kernels
from dovetail_cuda.kernels.names import name_helpers_first
from dovetail_cuda.ops import table
from dovetail_cuda.sampling_ahead import sample_every_way
from dovetail_cuda.shapes import GraphShapes

SHAPES = Path(__file__).parents[3] / "benchmarks/gpu"
DEMO = Path(str(files("dovetail_models"))) / "checkpoints/fable-4m"
SMALL, LARGE = (24, 256, 256), (48, 1024, 1024)
"""Requests, tokens of a step, tokens of a request."""
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
        return GraphShapes(max_tokens, max_requests, every_size=False)

    def adopt(self, value):
        return value

    def upload(self, host):
        return torch.empty_like(host, device=META)

    def download(self, tensors):
        return lambda: [torch.zeros(x.shape, dtype=x.dtype) for x in tensors]

    def compile(self, step, bucket):
        return step

    def prepare(self, run):
        """Nothing is compiled."""

    def await_compiled(self, told):
        """Nothing is under way."""

    def warmed_up(self):
        """Nothing is kept."""


class FirstStart(ShapesOnly):
    """The same, when nothing has been compiled: every size is met, and what can follow is met with the first."""

    follows = True

    def shape_policy(self, max_tokens, max_requests):
        return GraphShapes(max_tokens, max_requests)

    def compile(self, step, bucket):
        def run(tensors, metadata):
            hidden, logits = step(tensors, metadata)
            if self.follows:
                self.follows = False
                sample_every_way(logits)
            return hidden, logits

        return run


@pytest.fixture
def launched(monkeypatch):
    """Every kernel that was launched so far, with all that names what is compiled."""
    seen = {}

    def run(kernel, *args, grid, warmup, **options):
        _, keys, _, _, binder = kernel.device_caches[0]
        _, specialization, rest = binder(*args, debug=False, instrumentation_mode="", **options)
        form = f"{kernel.cache_key}-{jit.compute_cache_key(keys, specialization, rest)}"
        seen[(f"{kernel.__module__}.{kernel.__name__}", form)] = None

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


def functions():
    """All that is compiled."""
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    modules = [importlib.import_module(name) for name in names]
    return [fn for module in modules for fn in vars(module).values() if isinstance(fn, jit.JITFunction)]


def forget_keys():
    """As in a process that has compiled nothing."""
    for function in functions():
        function.hash, function.used_global_vals = None, {}


def configuration(platform, model, sizes):
    """A shape of two layers, of which the last may be computed for some rows alone."""
    registries = PluginHost().discover().registries
    options = EngineOptions(model=str(model), load_format="dummy", dtype="bfloat16", platform="cpu")
    config = resolver.resolve(options, registries)
    part = msgspec.structs.replace(config.platform, target=f"{__name__}:{platform.__name__}", claims={})
    attention = msgspec.structs.replace(config.attention, target="dovetail_cuda.attention:TritonAttention", claims={})
    return msgspec.structs.replace(
        config,
        hf_config={**config.hf_config, "num_hidden_layers": 2},
        platform=part,
        attention=attention,
        max_num_seqs=sizes[0],
        max_num_batched_tokens=sizes[1],
        max_model_len=sizes[2],
    )


def started(platform, model, sizes):
    """An engine that serves, in a process that has compiled nothing."""
    forget_keys()
    config = configuration(platform, model, sizes)
    executor = LocalExecutor(config)
    return Engine(config, executor, executor.load(Progress()))


@pytest.mark.parametrize(
    ("model", "sizes"),
    [(SHAPES / "qwen3_0p6b", LARGE), (SHAPES / "qwen3_30b_a3b", LARGE), (DEMO, SMALL)],
    ids=["qwen3_0p6b", "qwen3_30b_a3b", "demo"],
)
def test_serving_and_later_starts_launch_what_the_first_start_met(model, sizes, launched):
    engine = started(FirstStart, model, sizes)
    met = set(launched)
    assert 30 < len(met) < 100
    for count in (1, 2, 3, 17, 40):
        for way in WAYS:
            for i in range(count):
                engine.add(engine_request(range(5, 6 + 37 * i % 200 + count), max_tokens=3, **way))
            run_until_idle(engine)
    assert sorted(set(launched) - met) == []
    launched.clear()
    started(ShapesOnly, model, sizes)
    assert len(launched) > 20
    assert sorted(set(launched) - met) == []


def if_known(finder, helper):
    """As Triton 3.6 counts a helper's constants."""
    finder.used_global_vals.update(helper.used_global_vals)
    finder.hasher.update(helper.cache_key.encode())


@pytest.fixture
def by_old_rules(monkeypatch):
    """Keys are made as that release does, with what this plugin changes."""
    monkeypatch.setattr(jit.DependenciesFinder, "_update_hash", if_known)
    name_helpers_first()
    forget_keys()
    yield
    forget_keys()


def test_a_kernel_has_one_name_whatever_was_compiled_before(by_old_rules):
    every = functions()
    assert len(every) > 50
    forwards = [function.cache_key for function in every]
    forget_keys()
    assert [function.cache_key for function in reversed(every)] == forwards[::-1]


def test_a_name_of_a_constant_has_one_value_wherever_it_is_used(by_old_rules):
    """Triton orders constants of the same name by where their modules lie in memory."""
    for function in functions():
        assert function.cache_key
        used = {(name, str(value)) for (name, _), (value, _) in function.used_global_vals.items()}
        assert len(used) == len({name for name, _ in used}), function

"""Whole engines, with programs that execute on the host, beside the CPU platform."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from importlib.resources import files
from typing import Any
from weakref import WeakSet

import jax
import pytest
from msgspec.structs import replace

from dovetail import LLM, SamplingParams
from dovetail.runner.executor import LocalExecutor
from dovetail_tpu import bridges
from dovetail_tpu.bridges.jax_bridge import JaxBridge
from dovetail_tpu.bridges.protocol import State

DEMO = str(files("dovetail_models") / "checkpoints/fable-4m")
LIMITS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 16,
}
PROMPTS = ["Once upon a time there was a fox", "The king said to the queen: come with me. " * 3, "A", "Then the miller"]
WISHES = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
    "filtered": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=3, max_tokens=24, ignore_eos=True
    ),
    "ruled": SamplingParams(
        temperature=0.9, seed=5, repetition_penalty=1.2, logit_bias={5: 1.0}, min_tokens=4, logprobs=2, max_tokens=24
    ),
}
COMPILED = "/jax/core/compile/backend_compile_duration"
SECOND_START = """
import sys
from collections import Counter
import jax
from dovetail import LLM, SamplingParams

seen = Counter()
jax.monitoring.register_event_listener(lambda event, **more: seen.update([event.rpartition("/")[2]]))
limits = dict(dtype="float32", max_model_len=64, max_num_seqs=2, max_num_batched_tokens=32)
with LLM(sys.argv[1], platform="tpu", attention="tpu-gather", compile_cache=sys.argv[2], **limits) as llm:
    (output,) = llm.generate(["Once upon"], SamplingParams(temperature=0.0, max_tokens=4), use_tqdm=False)
print(seen["cache_misses"], seen["cache_hits"], output.outputs[0].token_ids)
"""


def engine(platform: str, **options: Any) -> LLM:
    return LLM(DEMO, platform=platform, **{**LIMITS, **options})


def tokens(llm: LLM, wish: SamplingParams) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, wish, use_tqdm=False)]


@pytest.fixture(scope="module")
def cpu():
    with engine("cpu") as llm:
        return {name: tokens(llm, wish) for name, wish in WISHES.items()}


@pytest.fixture(scope="module")
def seen():
    """What was compiled, and which states are there."""
    executables: list[Any] = []
    states: WeakSet[State] = WeakSet()
    with pytest.MonkeyPatch.context() as patch:
        compile_it, allocate = JaxBridge.compile, JaxBridge.allocate
        patch.setattr(JaxBridge, "compile", lambda *given: executables.append(compile_it(*given)) or executables[-1])
        patch.setattr(JaxBridge, "allocate", lambda *given: states.add(state := allocate(*given)) or state)
        yield executables, states


@pytest.fixture(scope="module")
def gather(seen):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        with engine("tpu", attention="tpu-gather") as llm:
            yield llm


@pytest.mark.parametrize("name", WISHES)
def test_tokens_are_those_of_the_cpu(gather, cpu, name):
    assert tokens(gather, WISHES[name]) == cpu[name]


@pytest.mark.slow
def test_tokens_by_the_kernel_are_those_of_the_cpu(cpu):
    with engine("tpu", max_num_batched_tokens=16) as llm:
        assert {name: tokens(llm, wish) for name, wish in WISHES.items()} == cpu


def test_all_of_the_cache_is_changed_in_place(gather, seen):
    gc.collect()
    executables, states = seen
    caches = {id(state.tensor) for state in states}
    steps = [program for program in executables if caches & {id(tensor) for tensor in program.lifted.changes}]
    assert len(caches) == 4  # one per layer
    assert len(steps) >= 2
    for program in steps:
        assert caches <= {id(tensor) for tensor in program.lifted.changes}
        assert program.alias_bytes == sum(tensor.jax().nbytes for tensor in program.lifted.changes)


@pytest.mark.parametrize("name", WISHES)
def test_a_step_takes_one_round_trip(gather, monkeypatch, name):
    bridge, plans, trips, strays = bridges.current(), [], [], []
    submit, to_host = LocalExecutor.submit, bridge.to_host
    monkeypatch.setattr(LocalExecutor, "submit", lambda *given: plans.append(1) or submit(*given))
    monkeypatch.setattr(bridge, "to_host", lambda results: trips.extend([1] * bool(results)) or to_host(results))
    monkeypatch.setattr(bridge, "apply", lambda *given, **more: strays.append(given[0]))
    tokens(gather, WISHES[name])
    assert len(trips) == len(plans) > 20
    assert not strays


def test_nothing_is_compiled_in_200_random_steps(gather, monkeypatch):
    compiled, steps = [], []
    listener = lambda event, duration, **more: compiled.append(event) if event == COMPILED else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    call = bridges.current().call
    monkeypatch.setattr(bridges.current(), "call", lambda *given: steps.append(1) or call(*given))
    draw = random.Random(0)
    wishes = list(WISHES.values())
    while len(steps) < 200:
        chosen = [replace(draw.choice(wishes), max_tokens=draw.randint(5, 40)) for _ in range(6)]
        prompts = [{"prompt_token_ids": [draw.randrange(300) for _ in range(draw.randint(1, 70))]} for _ in chosen]
        gather.generate(prompts, chosen, use_tqdm=False)
    assert compiled == []
    jax.jit(lambda x: x + len(steps))(1)
    assert compiled == [COMPILED]  # it would have been seen


@pytest.mark.slow
def test_a_second_start_compiles_nothing_wherever_the_folder_lies(tmp_path):
    starts = []
    for name in ("exported", "image/programs"):
        cache = tmp_path / name
        if starts:
            cache.parent.mkdir()
            (tmp_path / "exported").rename(cache)
        command = [sys.executable, "-c", SECOND_START, DEMO, str(cache)]
        run = subprocess.run(
            command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True
        )
        misses, hits, text = run.stdout.split(maxsplit=2)
        starts.append((int(misses), int(hits), text))
    (first_misses, _, first), (misses, hits, second) = starts
    assert first_misses > 0
    assert (misses, hits) == (0, first_misses)
    assert first == second
    (folder,) = cache.glob("tpu-jax-cpu-x1-*")
    assert any(folder.iterdir())

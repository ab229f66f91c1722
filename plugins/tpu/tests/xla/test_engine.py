"""Whole engines over torch_xla, beside the CPU platform."""

import random
from importlib.resources import files

import pytest
from msgspec.structs import replace

from dovetail import LLM, SamplingParams
from dovetail_tpu import bridges

DEMO = str(files("dovetail_models") / "checkpoints/fable-4m")
LIMITS = {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "block_size": 16,
}
TPU = {"platform": "tpu", "platform_config": {"bridge": "torch_xla"}}
GATHER = {**TPU, "attention": "tpu-gather"}
PROMPTS = ["Once upon a time there was a fox", "The king said to the queen: come with me. " * 3, "A", "Then the miller"]
COUNT = {"max_tokens": 24, "ignore_eos": True}
WISHES = {
    "greedy": SamplingParams(temperature=0.0, **COUNT),
    "filtered": SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=3, **COUNT),
    "ruled": SamplingParams(temperature=0.9, seed=5, repetition_penalty=1.2, logit_bias={5: 1.0}, logprobs=2, **COUNT),
}


def tokens(llm, wish):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, wish, use_tqdm=False)]


def all_tokens(**options):
    with LLM(DEMO, **LIMITS, **options) as llm:
        return {name: tokens(llm, wish) for name, wish in WISHES.items()}


@pytest.fixture(scope="module")
def cpu():
    return all_tokens(platform="cpu")


@pytest.fixture(scope="module")
def engine():
    """With all programs that it captures, and all states that it allocates."""
    from dovetail_tpu.bridges.xla_bridge import XlaBridge

    programs, states = [], []
    with pytest.MonkeyPatch.context() as patch:
        trace, allocate = XlaBridge.trace, XlaBridge.allocate
        patch.setattr(XlaBridge, "trace", lambda *given: programs.append(trace(*given)) or programs[-1])
        patch.setattr(XlaBridge, "allocate", lambda *given: states.append(allocate(*given)) or states[-1])
        with LLM(DEMO, **LIMITS, **GATHER) as llm:
            yield llm, programs, states


@pytest.mark.parametrize("name", WISHES)
def test_tokens_are_those_of_the_cpu(engine, cpu, name):
    assert tokens(engine[0], WISHES[name]) == cpu[name]


def test_all_of_the_cache_is_changed_in_place(engine):
    """By every program of a step; ``capture`` itself refuses those that XLA would copy a buffer for."""
    _, programs, states = engine
    caches = states[-4:]  # one per layer; those before were for the rehearsal
    steps = [program for program in programs if any(state in caches for state in program.changed)]
    assert len(steps) >= 2
    for program in steps:
        changed = [buffer for buffer in program.changed if buffer in caches]
        assert changed == caches
        assert program.alias_bytes >= sum(state.tensor.nbytes for state in caches)


def test_nothing_is_compiled_in_200_random_steps(engine, monkeypatch):
    import torch_xla.debug.metrics as met

    llm, programs, _ = engine
    steps, bridge = [], bridges.current()
    call = bridge.call
    monkeypatch.setattr(bridge, "call", lambda *given: steps.append(1) or call(*given))
    draw = random.Random(0)
    before = met.metric_data("CompileTime")[0], len(programs)
    while len(steps) < 200:
        chosen = [replace(draw.choice([*WISHES.values()]), max_tokens=draw.randint(5, 40)) for _ in range(6)]
        prompts = [{"prompt_token_ids": [draw.randrange(300) for _ in range(draw.randint(1, 70))]} for _ in chosen]
        llm.generate(prompts, chosen, use_tqdm=False)
    assert (met.metric_data("CompileTime")[0], len(programs)) == before
    bridge.trace(lambda packed_W: [packed_W + len(steps)], 3)
    assert met.metric_data("CompileTime")[0] == before[0] + 1  # it would have been seen


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tokens_by_the_kernel_are_those_of_the_cpu(cpu):
    assert all_tokens(**TPU) == cpu

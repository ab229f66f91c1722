"""Sampling as a part of the steps that a platform compiles: what comes out is what comes out without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dovetail.contracts.executor import Progress
from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import Bucket, PlatformConfig
from dovetail.engine.engine import Engine
from dovetail.runner import dense_rules
from dovetail.runner.executor import LocalExecutor
from dovetail.runner.whole_sampler import WholeSampler
from dovetail.sampling_params import MAX_LOGPROBS, SamplingParams
from dovetail.testing.conformance import tiny
from dovetail.testing.conformance.small_engine import core_part, model_config
from dovetail.testing.engines import engine_request, run_until_idle
from dovetail.testing.platforms import ReferencePlatform, WholePlatform

MODEL = core_part("dovetail.testing.conformance.tiny:TinyModel")
ORACLE = core_part("dovetail.testing.conformance.oracle_decoder:OracleDecoder")
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 20},
    {"temperature": 1.0, "logprobs": 3},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "temperature": 0.7},
    {"presence_penalty": 1.5, "logprobs": 0},
    {"logit_bias": {5: 4.0, 6: -100.0}, "temperature": 1.2},
    {"allowed_token_ids": [3, 9, 27, 81], "logit_bias": {9: 2.0}, "temperature": 1.0},
    {"min_tokens": 5, "stop_token_ids": list(range(0, 128, 2)), "temperature": 1.0},
    {"prompt_logprobs": 2, "temperature": 0.8, "min_p": 0.05},
    {"prompt_logprobs": 0, "repetition_penalty": 1.2},
]
"""Requests by what they want of sampling; more than there are slots, so slots see one after the other."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("tiny"), tiny.WINDOWED)


def config_of(checkpoint, platform, **changes):
    facts = tiny.TinyModel.facts(tiny.WINDOWED)
    return model_config(MODEL, tiny.WINDOWED, checkpoint, facts, platform=platform, **changes)


def completions(config):
    executor = LocalExecutor(config)
    engine = Engine(config, executor, executor.load(Progress()))
    try:
        for i, asked in enumerate(ASKED):
            prompt = [(7 * i + 5 * j) % tiny.VOCAB_SIZE for j in range(3 + 4 * i)]
            engine.add(engine_request(prompt, request_id=str(i), **{"max_tokens": 12, "seed": i, **asked}))
        return run_until_idle(engine), engine.stats()
    finally:
        engine.close()


def assert_same(left, right):
    assert left.token_ids == right.token_ids
    assert (left.finish_reason, left.stop_reason) == (right.finish_reason, right.stop_reason)
    lists = ([*each.logprobs, *(each.prompt_logprobs or [None])[1:]] for each in (left, right))
    for one, other in zip(*lists, strict=True):
        assert (one.token_id, one.rank, one.top_ids) == (other.token_id, other.rank, other.top_ids)
        numbers = [one.logprob, *one.top_logprobs], [other.logprob, *other.top_logprobs]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)


@pytest.mark.parametrize("drafts", [0, 3])
def test_everything_that_requests_may_ask_for_comes_out_as_without(checkpoint, drafts):
    changes = {"spec_decoder": ORACLE, "num_speculative_tokens": drafts} if drafts else {}
    whole, stats = completions(config_of(checkpoint, "WholePlatform", **changes))
    apart, _ = completions(config_of(checkpoint, "ReferencePlatform"))
    assert whole.keys() == apart.keys()
    for name in apart:
        assert_same(whole[name], apart[name])
    assert bool(stats.drafts_accepted) == bool(drafts)


def test_a_draft_model_drafts(checkpoint):
    draft = config_of(checkpoint, "WholePlatform")
    changes = {"draft": draft, "spec_decoder": ORACLE, "num_speculative_tokens": 3}
    whole, _ = completions(config_of(checkpoint, "WholePlatform", **changes))
    apart, _ = completions(config_of(checkpoint, "ReferencePlatform"))
    assert [whole[name].token_ids for name in apart] == [apart[name].token_ids for name in apart]


def test_preempted_requests_enter_again_with_what_they_said(checkpoint):
    limits = {"kv_cache_memory": 60_000, "max_model_len": 64}
    whole, stats = completions(config_of(checkpoint, "WholePlatform", **limits))
    apart, _ = completions(config_of(checkpoint, "ReferencePlatform"))
    assert stats.num_preemptions > 0
    assert [whole[name].token_ids for name in apart] == [apart[name].token_ids for name in apart]


def test_a_step_reaches_the_device_once(checkpoint, monkeypatch):
    made: list[WholePlatform] = []
    adopt = WholePlatform.adopt
    monkeypatch.setattr(WholePlatform, "adopt", lambda self, value: (made.append(self), adopt(self, value))[1])
    config = config_of(checkpoint, "WholePlatform")
    executor = LocalExecutor(config)
    engine = Engine(config, executor, executor.load(Progress()))
    platform = made[-1]
    for i, asked in enumerate(ASKED[:3]):
        engine.add(engine_request([1, 2, 3 + i], max_tokens=12, **asked))
    runs, downloads = platform.num_runs, platform.num_downloads
    steps = engine.stats().steps
    run_until_idle(engine)
    steps = engine.stats().steps - steps
    assert steps > 10
    assert (platform.num_runs - runs, platform.num_downloads - downloads) == (steps, steps)


def test_what_enters_requests_is_warmed_up_once(checkpoint, monkeypatch):
    entered = []
    monkeypatch.setattr(dense_rules.DenseRules, "_enter", lambda self, entry: entered.append(entry.slot_1.tolist()))
    config = config_of(checkpoint, "WholePlatform")
    executor = LocalExecutor(config)
    executor.load(Progress())
    assert entered == [[config.max_num_seqs]]  # nobody's slot
    assert len(executor._runner._stepper.forward.ladder) > 1


class NothingThatWaits(TorchDispatchMode):
    """Refuses operations whose shapes depend on values, and those that hand values to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("nonzero", "_local_scalar_dense", "masked_select", "unique", "_unique2"), name
        if name.startswith("index"):
            indices = [a for group in args if isinstance(group, list | tuple) for a in group if a is not None]
            assert all(index.dtype != torch.bool for index in indices), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def sampler():
    platform = ReferencePlatform(PlatformConfig())
    ops = OpTable(
        sample=lambda logits_SV, params: logits_SV.argmax(-1),
        top_logprobs=lambda logits_SV, tokens_S, k: (
            *(logits_SV.gather(1, tokens_S[:, None])[:, 0],) * 2,
            *logits_SV.topk(k)[::-1],
        ),
    )
    return WholeSampler(4, 64, 2, platform, ops, Bucket(1, 1))


def test_no_operation_of_a_program_waits(sampler, make):
    rules = SamplingParams(repetition_penalty=1.5, logit_bias={3: 1.0}, min_tokens=4, stop_token_ids=(5,), logprobs=2)
    sampler.enter([make.row(0, rules), make.row(1, SamplingParams(temperature=0.5))])
    plan = make.plan([0, 1], [3, 3], [[7, 8], []])
    prepared = sampler.prepare(plan, 12, 4)
    logits_SV = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    with NothingThatWaits():
        outputs = sampler.choose(logits_SV, prepared.inputs)
        plain = sampler.choose(logits_SV, replace(prepared.inputs, rules=None))
    assert outputs.tokens_RK.shape == plain.tokens_RK.shape == (4, 3)
    assert outputs.scores.top_ids_SK.shape == (12, MAX_LOGPROBS)


def test_rules_are_applied_as_by_the_sampler_of_separate_steps(make):
    """Also with prompts longer than what is written to the tables at a time, and drafts that penalties count."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (3 * dense_rules.CHUNK + 5,), generator=generator).tolist()
    rules = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.3, presence_penalty=0.4, temperature=0.0)
    row = make.row(2, rules, tokens, prompt_len=dense_rules.CHUNK + 9)
    other = make.row(0, SamplingParams(temperature=0.0, allowed_token_ids=(1, 2, 60), logit_bias={2: 0.5}))
    whole = WholeSampler(3, 64, 2, ReferencePlatform(PlatformConfig()), OpTable(), Bucket(1, 1))
    whole.enter([row, other])
    apart = make.sampler(64, row, other)
    for step in range(4):
        length = len(tokens) + step
        plan = make.plan([2, 0], [length, 3 + step], [[9, 9], []])
        logits_SV = torch.randn(4, 64, generator=generator) * 3
        prepared = whole.prepare(plan, 6, 3)
        padded_SV = torch.cat([logits_SV, torch.zeros(2, 64)])
        sampling, _ = whole.read(prepared, whole.choose(padded_SV, prepared.inputs), [])
        assert sampling.read().token_ids == apart.step(plan, logits_SV).token_ids


def test_a_slot_carries_nothing_over_to_its_next_request(make):
    whole = WholeSampler(1, 8, 0, ReferencePlatform(PlatformConfig()), OpTable(), Bucket(1, 1))
    rules = {"logit_bias": {4: 50.0}, "allowed_token_ids": (3, 4), "min_tokens": 9, "stop_token_ids": (4,)}
    logits_SV = torch.arange(8.0).unsqueeze(0)
    for given, expected in (({**rules, "presence_penalty": 2.0}, 3), ({}, 7)):
        whole.enter([make.row(0, SamplingParams(temperature=0, **given))])
        plan = make.plan([0], [3])
        prepared = whole.prepare(plan, 1, 1, ruled=True)
        sampling, _ = whole.read(prepared, whole.choose(logits_SV, prepared.inputs), [])
        assert sampling.read().token_ids == [[expected]]


def test_what_is_adopted_is_out_of_reach(checkpoint):
    config = config_of(checkpoint, "WholePlatform", max_num_seqs=1)
    executor = LocalExecutor(config)
    executor.load(Progress())
    stepper = executor._runner._stepper
    with pytest.raises(AssertionError, match="outside of compiled steps"):
        stepper.forward.model.logits(torch.zeros(1, tiny.HIDDEN_SIZE))
    with pytest.raises(AssertionError, match="outside of compiled steps"):
        stepper._sampler._rules._tables.counts_BV.sum()


def test_a_size_that_was_not_warmed_up_is_refused():
    platform = WholePlatform(PlatformConfig())
    platform.warmed_up()
    with pytest.raises(AssertionError, match="not warmed up"):
        platform.compile(lambda *args: args, Bucket(3, 3))

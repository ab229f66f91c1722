"""Requests of every kind on the platform, with and without speculation, and on the platform 'cpu': the same tokens."""

from __future__ import annotations

from functools import cache

import pytest

from dovetail.checkpoint import demo
from dovetail.contracts.executor import Progress
from dovetail.engine.engine import Engine
from dovetail.options import EngineOptions
from dovetail.plugins.host import PluginHost
from dovetail.resolver import resolve
from dovetail.runner.executor import LocalExecutor
from dovetail.testing.engines import engine_request, run_until_idle
from dovetail_tpu import bridges

COUNT = 14
SMALL = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "dtype": "float32"}
TPU = {"platform": "tpu", "attention": "tpu-gather"}
NGRAM = {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 3}
PROMPT = [27, 285, 295, 359, 274, 27, 285, 295, 359, 274, 27, 285]  # so that n-grams are found
KINDS = ["with drafts", pytest.param("without drafts", marks=pytest.mark.slow)]
REQUESTS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "top-p": {"temperature": 0.8, "top_p": 0.9, "seed": 6},
    "top-k": {"temperature": 1.1, "top_k": 20, "seed": 7},
    "min-p": {"temperature": 1.3, "min_p": 0.02, "seed": 8},
    "all filters": {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": -9},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.4},
    "sampled with penalties": {"repetition_penalty": 1.2, "presence_penalty": -0.3, "temperature": 0.7, "seed": 10},
    "bias": {"logit_bias": {285: 4.0, 27: -3.0, 274: 2.5}, "temperature": 0.5, "seed": 11},
    "allowed tokens": {"allowed_token_ids": [3, 27, 274, 285, 6000], "temperature": 1.0, "seed": 12},
    "allowed and forbidden": {"allowed_token_ids": [27, 285], "min_tokens": 4, "stop_token_ids": [285]},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": [27, 29, 274, 285]},
    "logprobs": {"logprobs": 5, "temperature": 0.9, "seed": 13},
    "logprobs of penalties": {"logprobs": 20, "frequency_penalty": 1.0},
    "prompt_logprobs": {"prompt_logprobs": 3},
}


def engine_of(**options):
    registries = PluginHost().discover().registries
    path = demo(next(entry.manifest.demo for entry in registries.models if entry.manifest.demo))
    config = resolve(EngineOptions(model=str(path), **SMALL, **options), registries)
    executor = LocalExecutor(config)
    return Engine(config, executor, executor.load(Progress()))


def completions_of(engine):
    """Of all requests, few of which run at a time."""
    for i, (name, params) in enumerate(REQUESTS.items()):
        prompt = [*PROMPT[i % 5 :], i + 10]
        engine.add(engine_request(prompt, request_id=name, **{"max_tokens": COUNT, "ignore_eos": True, **params}))
    return run_until_idle(engine)


@pytest.fixture(scope="module")
def engine_that():
    """An engine of each kind, made when it is needed first."""
    options = {"cpu": {"platform": "cpu"}, "without drafts": TPU, "with drafts": TPU | {"speculative_config": NGRAM}}
    made = {}

    def engine_that(kind):
        if kind not in made:
            made[kind] = engine_of(**options[kind])
        return made[kind]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield engine_that
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="module")
def completions(engine_that):
    """Of each engine."""
    return cache(lambda kind: completions_of(engine_that(kind)))


@pytest.mark.parametrize("request_id", REQUESTS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_cpu(completions, kind, request_id):
    found, expected = (completions(which)[request_id] for which in (kind, "cpu"))
    assert found.token_ids == expected.token_ids
    assert (found.finish_reason, found.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert_same_scores(found.logprobs, expected.logprobs)
    assert_same_scores((found.prompt_logprobs or [None])[1:], (expected.prompt_logprobs or [None])[1:])


def assert_same_scores(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.token_id, ours.rank, ours.top_ids) == (theirs.token_id, theirs.rank, theirs.top_ids)
        assert [ours.logprob, *ours.top_logprobs] == pytest.approx([theirs.logprob, *theirs.top_logprobs], abs=1e-4)


def test_drafts_are_kept(engine_that, completions):
    completions("with drafts")
    stats = engine_that("with drafts").stats()
    assert 0 < stats.drafts_accepted < stats.drafts_proposed


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_calls_the_chip_once(engine_that, kind, monkeypatch):
    """Whatever its requests ask for, once they have entered."""
    engine, calls = engine_that(kind), []
    for name in ("call", "to_host", "apply", "adopt", "allocate", "trace"):
        monkeypatch.setattr(bridges.current(), name, counted(name, calls))
    names = ("top-p", "sampled with penalties", "allowed tokens", "logprobs")
    for name in names:
        engine.add(engine_request(PROMPT[:3], request_id=name, ignore_eos=True, max_tokens=COUNT, **REQUESTS[name]))
    engine.step()
    calls.clear()
    engine.step()
    assert calls == ["call", "to_host"]
    run_until_idle(engine)
    assert set(calls) == {"call", "to_host"}
    assert calls.count("call") == calls.count("to_host") <= COUNT + 1


def counted(name, calls):
    """A method of the bridge, whose calls are noted."""
    method = getattr(bridges.current(), name)

    def call(*given, **named):
        calls.append(name)
        return method(*given, **named)

    return call

"""Speculation changes no token, greedy or sampled, whatever else the engine does meanwhile."""

from __future__ import annotations

import pytest

from dovetail.testing.engines import engine_request, run_until_idle

COUNT = 20
PAGE = 4 * 2 * 16 * 2 * 64 * 4  # layers × (K, V) × tokens × heads × size × bytes
CHANCES = ({}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.8, "top_p": 0.9, "seed": 6})
SETTINGS = {
    "plain": {"enable_prefix_caching": False},
    "chunked": {"max_num_batched_tokens": 16},
    "prefix_cache": {"max_num_batched_tokens": 32},
    "one_at_a_time": {"max_num_seqs": 1},
    "preemption": {"kv_cache_memory": 20 * PAGE / 2**30, "max_num_batched_tokens": 64},
    "priority": {"scheduling_policy": "priority", "max_num_seqs": 3},
    "ladder": {"ladder": True, "max_num_batched_tokens": 32},
}
NGRAM = {"method": "ngram", "prompt_lookup_min": 1}


def add(engine, prompts, prefix="", **params):
    for i, prompt in enumerate(prompts):
        chance = CHANCES[i % len(CHANCES)]
        request = engine_request(
            prompt, request_id=f"{prefix}{i}", max_tokens=COUNT, ignore_eos=True, priority=-i, **chance, **params
        )
        engine.add(request)


def tokens(engine, prompts):
    add(engine, prompts)
    completions = run_until_idle(engine)
    return [completions[str(i)].token_ids for i in range(len(prompts))]


@pytest.fixture(scope="module")
def sections(target, perturbed):
    return {
        "ngram": NGRAM,
        "itself": {"method": "draft_model", "model": str(target)},
        "perturbed": {"method": "draft_model", "model": str(perturbed)},
    }


@pytest.fixture
def expected(make_engine, prompts, request):
    """Without speculation; computed once."""
    cache = request.config.stash.setdefault(EXPECTED, [])
    if not cache:
        cache += tokens(make_engine(), prompts)
    return cache


EXPECTED = pytest.StashKey[list]()
CASES = [("perturbed", setting) for setting in SETTINGS]
CASES += [("ngram", "plain"), ("ngram", "preemption"), ("ngram", "ladder")]


@pytest.mark.parametrize(("method", "setting"), CASES)
def test_tokens_are_those_without_speculation(make_engine, prompts, expected, sections, method, setting):
    options = dict(SETTINGS[setting])
    if setting == "preemption" and method != "ngram":
        options["kv_cache_memory"] *= 2  # the draft model's cache is part of it
    engine = make_engine(sections[method], **options)
    assert tokens(engine, prompts) == expected
    stats = engine.stats()
    assert (stats.num_preemptions > 0) == (setting == "preemption")
    assert 0 < stats.drafts_accepted < stats.drafts_proposed
    if setting == "prefix_cache":
        assert tokens(engine, prompts) == expected, "a second time, from the cache"
        assert engine.stats().prefix_hits > stats.prefix_hits


@pytest.mark.parametrize("ladder", [False, True])
def test_the_same_model_with_the_same_noise_drafts_what_is_sampled(make_engine, prompts, expected, sections, ladder):
    unfiltered = [i for i in range(len(prompts)) if "top_p" not in CHANCES[i % len(CHANCES)]]
    engine = make_engine(sections["itself"], ladder=ladder)
    for i in unfiltered:
        chance = CHANCES[i % len(CHANCES)]
        engine.add(engine_request(prompts[i], request_id=str(i), max_tokens=COUNT, ignore_eos=True, **chance))
    completions = run_until_idle(engine)
    assert [completions[str(i)].token_ids for i in unfiltered] == [expected[i] for i in unfiltered]
    stats = engine.stats()
    assert stats.drafts_accepted == stats.drafts_proposed
    assert stats.steps <= 3 + -(-(COUNT - 1) // 5)


@pytest.mark.parametrize("method", ["ngram", "perturbed"])
def test_aborts_and_reused_slots_leave_no_trace(make_engine, prompts, expected, sections, method):
    engine = make_engine(sections[method], max_num_seqs=4)
    add(engine, prompts)
    seen = {}
    for step in range(200):
        if not engine.has_work():
            break
        for delta in engine.step():
            seen.setdefault(delta.request_id, []).extend(delta.new_token_ids)
        if step in (2, 5):
            engine.abort([str(step - 1)])
            add(engine, prompts[step : step + 1], prefix=f"again-{step}-")
    survivors = [i for i in range(len(prompts)) if i not in (1, 4)]
    assert [seen[str(i)] for i in survivors] == [expected[i] for i in survivors]
    greedy_again = [i for i in (2, 5) if i % len(CHANCES) == 0]
    assert [seen[f"again-{i}-0"] for i in greedy_again] == [expected[i] for i in greedy_again]


def test_rejection_sampling_keeps_greedy_tokens_and_accepts_drafts(make_engine, prompts, expected, sections):
    engine = make_engine(sections["perturbed"] | {"sampling": "rejection"})
    found = tokens(engine, prompts)
    assert found[:: len(CHANCES)] == expected[:: len(CHANCES)]
    assert found != expected, "sampled tokens are others"
    stats = engine.stats()
    assert 0 < stats.drafts_accepted < stats.drafts_proposed


def test_logprobs_are_those_without_speculation(make_engine, prompts, sections):
    def logprobs(section):
        engine = make_engine(section)
        add(engine, prompts[:4], logprobs=2)
        completions = run_until_idle(engine)
        return [[entry.logprob for entry in completions[str(i)].logprobs] for i in range(4)]

    for found, expected in zip(logprobs(sections["perturbed"]), logprobs(None), strict=True):
        assert found == pytest.approx(expected, abs=1e-5)

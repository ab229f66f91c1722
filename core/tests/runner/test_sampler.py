"""The sampler against a brute-force oracle, against transformers' processors, and alone against in a batch."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.ops.random import Stream, gumbel, row_keys
from dovetail.ops.sampling import SamplingTensors, filter_logits, sample_tokens
from dovetail.runner.logit_rules import LogitRules
from dovetail.runner.sample_rows import SampleRows
from dovetail.runner.sampler import ALL_FORBIDDEN, NOT_FINITE
from dovetail.sampling_params import SamplingParams
from dovetail.testing.platforms import ReferencePlatform

V = 50


def random_params(rng, **fixed):
    """A request with each feature present or absent by chance."""

    def maybe(value, default):
        return value if rng.random() < 0.5 else default

    values = {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": maybe(rng.randint(1, V), 0),
        "top_p": maybe(rng.uniform(0.05, 1.0), 1.0),
        "min_p": maybe(rng.uniform(0.0, 0.3), 0.0),
        "presence_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "frequency_penalty": maybe(rng.uniform(-2, 2), 0.0),
        "repetition_penalty": maybe(rng.uniform(0.5, 2), 1.0),
        "logit_bias": maybe({rng.randrange(V): rng.uniform(-5, 5) for _ in range(rng.randint(1, 5))}, None),
        "allowed_token_ids": maybe(tuple(rng.sample(range(V), rng.randint(5, V))), None),
        "min_tokens": maybe(rng.randint(1, 6), 0),
        "stop_token_ids": maybe((7,), ()),
        "ignore_eos": rng.random() < 0.3,
    }
    return SamplingParams(**{**values, **fixed})


def random_request(rng, slot, make, **fixed):
    prompt = [rng.randrange(V) for _ in range(rng.randint(1, 8))]
    output = [rng.randrange(V) for _ in range(rng.randint(0, 8))]
    params = random_params(rng, **fixed)
    seed = rng.randint(-(2**63), 2**64 - 1)
    return make.row(slot, params, prompt + output, len(prompt), seed, eos=(3, 4))


def expected_token(oracle, logits, row, output):
    """Brute force: the oracle's filtered logits plus the noise of (seed, position), over the whole vocabulary."""
    ruled = oracle.ruled_logits(logits, row.params, row.token_ids[: row.prompt_len], output, row.eos_token_ids)
    if row.params.temperature == 0:
        return ruled.index(max(ruled))
    scores = torch.tensor(oracle.filtered_logits(ruled, row.params))
    seed = (row.seed + 2**63) % 2**64 - 2**63
    keys = row_keys(torch.tensor([seed]), torch.tensor([row.prompt_len + len(output)]), Stream.SAMPLE)
    return int((scores + gumbel(keys, torch.arange(len(logits)))[0]).argmax())


@pytest.mark.parametrize("seed", range(20))
def test_tokens_equal_brute_force(seed, oracle, make):
    rng = random.Random(seed)
    rows = [random_request(rng, slot, make) for slot in range(8)]
    sampler = make.sampler(V, *rows)
    outputs = {row.slot: row.token_ids[row.prompt_len :] for row in rows}
    for step in range(4):
        chosen = [row for row in rows if rng.random() < 0.8] or rows[:1]
        rng.shuffle(chosen)
        logits = torch.randn(len(chosen), V, generator=torch.Generator().manual_seed(100 * seed + step)) * 3
        plan = make.plan([r.slot for r in chosen], [r.prompt_len + len(outputs[r.slot]) for r in chosen])
        sampled = sampler.step(plan, logits)
        for row, row_V, tokens in zip(chosen, logits.tolist(), sampled.token_ids, strict=True):
            assert tokens == [expected_token(oracle, row_V, row, outputs[row.slot])]
            outputs[row.slot] += tokens


@pytest.mark.parametrize("seed", range(10))
def test_alone_equals_in_a_batch(seed, make):
    """Same tokens and the very same log-probabilities, whatever the neighbours ask for."""
    rng = random.Random(seed)
    rows = [random_request(rng, slot, make, logprobs=rng.choice([None, 0, 5])) for slot in range(8)]
    lengths = [len(row.token_ids) for row in rows]
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(seed)) * 2
    together = make.sampler(V, *rows).step(make.plan(range(8), lengths), logits)
    for i, row in enumerate(rows):
        alone = make.sampler(V, row, max_num_seqs=8).step(make.plan([i], [lengths[i]]), logits[i : i + 1])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]


def test_alone_equals_in_a_batch_over_a_large_vocabulary(make):
    """Sizes at which kernels change their strategy with the batch."""
    size, rng = 32000, random.Random(0)
    choices = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"top_p": 0.99, "temperature": 2.0}]
    choices.append({"temperature": 0})
    rows = [make.row(i, SamplingParams(logprobs=5, **rng.choice(choices))) for i in range(16)]
    logits = torch.randn(16, size, generator=torch.Generator().manual_seed(1)).bfloat16()
    together = make.sampler(size, *rows).step(make.plan(range(16), [3] * 16), logits)
    for i, row in enumerate(rows):
        alone = make.sampler(size, row, max_num_seqs=16).step(make.plan([i], [3]), logits[i : i + 1])
        assert (alone.token_ids[0], alone.logprobs[0]) == (together.token_ids[i], together.logprobs[i])


def test_resumed_request_continues_as_if_never_preempted(make):
    params = SamplingParams(frequency_penalty=1.5, repetition_penalty=1.3, min_tokens=4, stop_token_ids=(0, 1))
    logits = torch.randn(8, V, generator=torch.Generator().manual_seed(0))
    sampler, known = make.sampler(V, make.row(0, params, (5, 6), seed=9)), [5, 6]
    for row_V in logits:
        known += sampler.step(make.plan([0], [len(known)]), row_V.unsqueeze(0)).token_ids[0]
    resumed, again = make.sampler(V, make.row(1, params, known[:6], 2, seed=9)), known[:6]
    for row_V in logits[4:]:
        again += resumed.step(make.plan([1], [len(again)]), row_V.unsqueeze(0)).token_ids[0]
    assert again == known


def test_sampling_follows_the_distribution(make, oracle):
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=7)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    n = 20000
    tensors = tensors_of(params, n)
    tokens = sample_tokens(logits.expand(n, 12), tensors)
    expected = np.array(oracle.distribution(logits[0].tolist(), params, [], []))
    counts = np.bincount(tokens, minlength=12)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    statistic = ((counts[kept] - n * expected[kept]) ** 2 / (n * expected[kept])).sum()
    degrees = torch.tensor((kept.sum() - 1) / 2)
    assert torch.special.gammaincc(degrees, torch.tensor(statistic / 2)) > 0.01


def tensors_of(params, rows=1):
    return SamplingTensors(
        temperature_S=torch.full((rows,), params.temperature),
        top_k_S=torch.full((rows,), params.top_k),
        top_p_S=torch.full((rows,), params.top_p),
        min_p_S=torch.full((rows,), params.min_p),
        seeds_S=torch.arange(rows),
        positions_S=torch.zeros(rows, dtype=torch.int64),
        all_greedy=params.temperature == 0,
        any_filter=True,
    )


# --- filters ---

WARPERS = {
    "top_k": (SamplingParams(top_k=9), [TopKLogitsWarper(9)]),
    "top_k of one": (SamplingParams(top_k=1), [TopKLogitsWarper(1)]),
    "top_p": (SamplingParams(top_p=0.73), [TopPLogitsWarper(0.73)]),
    "tiny top_p": (SamplingParams(top_p=1e-6), [TopPLogitsWarper(1e-6)]),
    "min_p": (SamplingParams(min_p=0.07), [MinPLogitsWarper(0.07)]),
    "all": (
        SamplingParams(temperature=1.4, min_p=0.01, top_k=20, top_p=0.8),
        [TemperatureLogitsWarper(1.4), MinPLogitsWarper(0.01), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
    ),
}


@pytest.mark.parametrize(("params", "warpers"), WARPERS.values(), ids=WARPERS.keys())
@pytest.mark.parametrize(("size", "spread"), [(30, 1.0), (2000, 3.0), (2000, 0.1)])
def test_filters_equal_transformers_warpers(params, warpers, size, spread):
    logits = torch.randn(6, size, generator=torch.Generator().manual_seed(0)) * spread
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    torch.testing.assert_close(filter_logits(logits, tensors_of(params, 6)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.999999, 0.99, 0.5])
@pytest.mark.parametrize("top_k", [0, 1, 64, 700])
@pytest.mark.parametrize("min_p", [0.0, 0.6])
def test_candidate_sets_lose_nothing(dtype, top_p, top_k, min_p, oracle):
    """Flat, peaked and tied rows, which need anything between the first candidates and a full sort."""
    size = 1500
    spread = torch.tensor([[0.01], [0.5], [4.0], [9.0]])
    logits = (torch.randn(4, size, generator=torch.Generator().manual_seed(1)) * spread).to(dtype)
    params = SamplingParams(top_p=top_p, top_k=top_k, min_p=min_p, temperature=0.9)
    filtered = filter_logits(logits, tensors_of(params, 4))
    for row_V, filtered_V in zip(logits, filtered, strict=True):
        expected = oracle.filtered_logits(row_V.tolist(), params)
        kept = [v > -math.inf for v in expected]
        # A float32 sum may cross p one token earlier or later than a float64 sum.
        assert abs(sum(kept) - int(filtered_V.isfinite().sum())) <= (top_p < 1) * max(1, expected.count(min(expected)))
        if top_p in (1.0, 0.5):
            assert filtered_V.isfinite().tolist() == kept


@pytest.mark.parametrize("params", [SamplingParams(top_p=0.9), SamplingParams(top_k=3), SamplingParams(min_p=0.5)])
def test_equal_logits_are_all_kept(params):
    assert filter_logits(torch.zeros(1, 300), tensors_of(params)).isfinite().all()


def test_equal_logits_beyond_the_candidates_are_kept_too():
    """Top-p is reached among the first candidates, at a logit that hundreds of others share."""
    logits = torch.zeros(1, 300)
    logits[0, 17] = 5.0  # a third of the probability
    for params in (SamplingParams(top_p=0.35), SamplingParams(top_p=0.35, min_p=0.001)):
        assert filter_logits(logits, tensors_of(params)).isfinite().all()
        assert sample_tokens(logits.expand(3000, 300), tensors_of(params, 3000)).unique().numel() > 280


def test_at_least_one_token_is_kept():
    logits = torch.tensor([[5.0, 1.0, -3.0]])
    for params in (SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0), SamplingParams(top_k=1)):
        assert filter_logits(logits, tensors_of(params)).isfinite().tolist() == [[True, False, False]]


def test_temperature_too_small_to_divide_by_is_greedy(make):
    sampler = make.sampler(3, make.row(0, SamplingParams(temperature=1e-42)))
    assert sampler.step(make.plan([0], [3]), torch.tensor([[1.0, 3.0, 2.9]])).token_ids == [[1]]


def test_top_k_beyond_the_vocabulary_keeps_all(make):
    """Also where the number exceeds the device's integers."""
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(0))
    rows = [make.row(0, SamplingParams(top_k=k), seed=3) for k in (0, -1, 5, 10**30)]
    tokens = [make.sampler(5, row).step(make.plan([0], [3]), logits).token_ids for row in rows]
    assert tokens == [tokens[0]] * 4


def test_greedy_takes_the_lowest_of_equal_tokens(make):
    sampler = make.sampler(100, *(make.row(i, SamplingParams(temperature=t)) for i, t in enumerate((0, 0, 1.0))))
    logits = torch.zeros(3, 100)
    logits[:, 40] = logits[:, 70] = 1.0
    assert sampler.step(make.plan([0, 1, 2], [3] * 3), logits).token_ids[:2] == [[40], [40]]


# --- rules ---


def test_penalty_equals_transformers_repetition_processor(make):
    params = SamplingParams(repetition_penalty=1.7)
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    tokens = [3, 3, 9, 20]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([tokens]), logits.clone())
    torch.testing.assert_close(ruled(logits, make.row(0, params, tokens, 2)), expected)


def ruled(logits, row):
    rules = LogitRules(1, logits.shape[1], ReferencePlatform(PlatformConfig()), OpTable())
    rules.enter(row)
    return rules.apply(logits, SampleRows.build([0], [0], np.array([len(row.token_ids)]), [[]]))


def test_rows_without_rules_are_not_copied(make):
    logits = torch.randn(1, V)
    assert ruled(logits, make.row(0, SamplingParams(top_p=0.5, stop_token_ids=(3,)))) is logits


def test_rules_leave_the_raw_logits_alone(make):
    logits = torch.randn(1, V)
    before = logits.clone()
    params = SamplingParams(logit_bias={1: 2.0}, allowed_token_ids=(1, 2), presence_penalty=1.0)
    assert not torch.equal(ruled(logits, make.row(0, params)), before)
    assert torch.equal(logits, before)


def test_min_tokens_masks_stops_until_enough_tokens_exist(make):
    params = SamplingParams(min_tokens=2, stop_token_ids=(5,))
    for output, masked in (((), True), ((8,), True), ((8, 8), False)):
        logits = ruled(torch.zeros(1, V), make.row(0, params, (1, 2, *output), 2, eos=(0,)))[0]
        assert {t for t in range(V) if logits[t] == -math.inf} == ({0, 5} if masked else set())


def test_min_tokens_leaves_ignored_eos_alone(make):
    params = SamplingParams(min_tokens=2, ignore_eos=True)
    assert ruled(torch.zeros(1, V), make.row(0, params, eos=(0,))).isfinite().all()


def test_min_tokens_passes_over_an_end_of_sequence_that_the_model_lacks(make):
    row = make.row(0, SamplingParams(temperature=0, min_tokens=5), eos=(-1, 3, V, V + 100))
    logits = torch.zeros(1, V)
    logits[0, 3] = logits[0, V - 1] = 1.0
    assert make.sampler(V, row).step(make.plan([0], [3]), logits).token_ids == [[V - 1]]


def test_a_slot_carries_nothing_over_to_its_next_request(make):
    rules = {"logit_bias": {9: 50.0}, "allowed_token_ids": (8, 9), "min_tokens": 9, "stop_token_ids": (4,)}
    heavy = SamplingParams(temperature=0, presence_penalty=2.0, **rules)
    sampler = make.sampler(V, make.row(0, heavy))
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    assert sampler.step(make.plan([0], [3]), logits).token_ids == [[9]]
    sampler.enter([make.row(0, SamplingParams(temperature=0))])
    assert sampler.step(make.plan([0], [3]), logits).token_ids == [[int(logits.argmax())]]


def test_a_shorter_bias_replaces_a_longer_one(make):
    sampler = make.sampler(4, make.row(0, SamplingParams(temperature=0, logit_bias={0: 1.0, 1: 50.0, 2: 60.0})))
    sampler.enter([make.row(0, SamplingParams(temperature=0, logit_bias={0: 1.0}))])
    assert sampler.step(make.plan([0], [3]), torch.tensor([[0.0, 0.0, 0.0, 2.0]])).token_ids == [[3]]


def test_penalties_start_anew_in_a_reused_slot(make):
    params = SamplingParams(temperature=0, frequency_penalty=2.0, repetition_penalty=4.0)
    logits = torch.tensor([[1.0, 0.9, 0.8, 0.1]])
    sampler = make.sampler(4, make.row(0, params, (0,)))
    assert [sampler.step(make.plan([0], [1 + i]), logits).token_ids[0][0] for i in range(2)] == [1, 2]
    sampler.enter([make.row(0, params, (3,))])
    # Neither the earlier prompt (0) nor the earlier output (1, 2) counts.
    assert [sampler.step(make.plan([0], [1 + i]), logits).token_ids[0][0] for i in range(3)] == [0, 1, 2]


def test_tables_grow_for_longer_lists_without_harming_earlier_ones(make):
    """Lists of growing length; earlier, shorter ones keep their meaning."""
    rows = [make.row(i, SamplingParams(temperature=0, allowed_token_ids=tuple(range(i, 2 * i + 1)))) for i in range(8)]
    logits = torch.arange(V, dtype=torch.float32).repeat(8, 1)
    sampled = make.sampler(V, *rows).step(make.plan(range(8), [3] * 8), logits)
    assert sampled.token_ids == [[2 * i] for i in range(8)]
    biases = [dict.fromkeys(range(i + 1), 90.0 + i) for i in range(8)]
    rows = [make.row(i, SamplingParams(temperature=0, logit_bias=bias)) for i, bias in enumerate(biases)]
    sampled = make.sampler(V, *rows).step(make.plan(range(8), [3] * 8), logits)
    assert sampled.token_ids == [[i] for i in range(8)]


def test_repeated_tokens_take_no_memory(make):
    sampler = make.sampler(V, make.row(0, SamplingParams(temperature=0, allowed_token_ids=(3, 2) * 100_000)))
    assert sampler._rules._allowed._ids.shape[1] <= V
    assert sampler.step(make.plan([0], [3]), torch.arange(V, dtype=torch.float32)[None]).token_ids == [[3]]


# --- requests that do not sample, and requests that cannot ---


def test_only_requests_that_sample_get_tokens(make):
    sampler = make.sampler(V, *(make.row(i, SamplingParams(temperature=0, logprobs=1)) for i in range(3)))
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(0))
    sampled = sampler.step(make.plan([2, 0, 1], [3] * 3, samples=[True, False, True]), logits)
    assert sampled.token_ids == [[int(logits[0].argmax())], [], [int(logits[1].argmax())]]
    assert [entry is not None for entry in sampled.logprobs] == [True, False, True]
    assert sampler.step(make.plan([0], [3], samples=[False]), logits[:0]).token_ids == [[]]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 5, "min_p": 0.1}, {"presence_penalty": 1.0}]
)
@pytest.mark.parametrize("drafts", [None, [[1], [7], [3]]])
def test_a_poisoned_row_harms_only_its_request(poison, params, drafts, make):
    params = SamplingParams(logprobs=2, **params)
    per_request = 2 if drafts else 1
    logits = torch.randn(3 * per_request, V, generator=torch.Generator().manual_seed(0))
    rows, plan = [make.row(i, params) for i in range(3)], make.plan(range(3), [3] * 3, drafts)
    healthy = make.sampler(V, *rows).step(plan, logits)
    if poison == -math.inf:
        logits[per_request] = poison
    else:
        logits[per_request, 7] = poison
    sampled = make.sampler(V, *rows).step(plan, logits)
    assert sampled.errors == {1: NOT_FINITE}
    assert (sampled.token_ids[1], sampled.logprobs[1]) == ([], [])
    for i in (0, 2):
        assert (sampled.token_ids[i], sampled.logprobs[i]) == (healthy.token_ids[i], healthy.logprobs[i])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_request_that_forbids_every_token_says_so(temperature, make):
    params = SamplingParams(temperature=temperature, top_k=2, allowed_token_ids=(3,), min_tokens=2)
    sampler = make.sampler(V, make.row(0, params, eos=(3,)))
    assert sampler.step(make.plan([0], [3]), torch.randn(1, V)).errors == {0: ALL_FORBIDDEN}


# --- log-probabilities ---


def test_logprobs_come_from_raw_logits(make):
    params = SamplingParams(temperature=0.5, logit_bias={4: 100.0}, presence_penalty=1.0, top_k=2, logprobs=3)
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    sampled = make.sampler(V, make.row(0, params)).step(make.plan([0], [3]), logits)
    expected = logits[0].double().log_softmax(-1)
    order = expected.argsort(descending=True)
    (entry,) = sampled.logprobs[0]
    assert entry.token_id == 4 == sampled.token_ids[0][0]
    assert entry.logprob == pytest.approx(expected[4].item(), abs=1e-5)
    assert entry.rank == 1 + order.tolist().index(4)
    assert entry.top_ids == order[:3].tolist()
    assert entry.top_logprobs == pytest.approx(expected[order[:3]].tolist(), abs=1e-5)


def test_chosen_logprob_is_the_same_number_as_in_the_top_list(make):
    rows = [make.row(i, SamplingParams(temperature=1.0, top_k=5, logprobs=20)) for i in range(32)]
    logits = torch.randn(32, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for entries in make.sampler(1000, *rows).step(make.plan(range(32), [3] * 32), logits).logprobs:
        entry = entries[0]
        assert entry.logprob == entry.top_logprobs[entry.top_ids.index(entry.token_id)]


def test_equal_logprobs_are_ordered_by_id_and_share_a_rank(make):
    logits = torch.zeros(1, 1000)
    logits[0, [900, 30, 31]] = 1.0
    rows = [make.row(0, SamplingParams(temperature=0, logprobs=5))]
    (entry,) = make.sampler(1000, *rows).step(make.plan([0], [3]), logits).logprobs[0]
    assert entry.top_ids == [30, 31, 900, 0, 1]
    assert (entry.token_id, entry.rank) == (30, 1)


def test_each_request_gets_as_many_logprobs_as_it_asked_for(make):
    counts = [None, 0, 1, 20]
    rows = [make.row(i, SamplingParams(logprobs=n)) for i, n in enumerate(counts)]
    logprobs = make.sampler(V, *rows).step(make.plan(range(4), [3] * 4), torch.randn(4, V)).logprobs
    assert logprobs[0] is None
    assert [len(entries[0].top_ids) for entries in logprobs[1:]] == [0, 1, 20]


def test_more_logprobs_than_tokens_gives_every_token(make):
    sampler = make.sampler(4, make.row(0, SamplingParams(logprobs=20)))
    (entry,) = sampler.step(make.plan([0], [3]), torch.randn(1, 4)).logprobs[0]
    assert sorted(entry.top_ids) == [0, 1, 2, 3]


def test_prompt_logprobs(make):
    sampler = make.sampler(V, make.row(0, SamplingParams(prompt_logprobs=2)))
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    expected = logits.double().log_softmax(-1)
    entries = sampler.prompt_logprobs(0, logits, torch.tensor([5, 6, 7]))
    assert [entry.token_id for entry in entries] == [5, 6, 7]
    chosen = [expected[i, 5 + i].item() for i in range(3)]
    assert [entry.logprob for entry in entries] == pytest.approx(chosen, abs=1e-5)
    assert [entry.top_ids for entry in entries] == expected.topk(2).indices.tolist()


def test_forbidden_tokens_have_a_logprob_of_minus_infinity_only_if_the_model_says_so(make):
    logits = torch.full((1, 4), -math.inf)
    logits[0, 2] = 3.0
    sampler = make.sampler(4, make.row(0, SamplingParams(temperature=0, logprobs=2)))
    (entry,) = sampler.step(make.plan([0], [3]), logits).logprobs[0]
    assert (entry.logprob, entry.top_logprobs) == (0.0, [0.0, -math.inf])

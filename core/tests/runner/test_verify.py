"""Verification of drafts: output is that of plain decoding, token by token, or else has the target's distribution."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from dovetail.contracts.specdec import Drafts
from dovetail.ops import sampling
from dovetail.runner import verify as verify_module
from dovetail.runner.sample_rows import NO_TOKEN, SampleRows
from dovetail.runner.verify import DraftProbs
from dovetail.sampling_params import SamplingParams

REQUESTS = 20000
VOCAB = 4
PROMPT = [1, 2]

# A model: the logits after each token. Distinct enough that a wrong distribution shows.
MODEL = torch.tensor(
    [[0.3, -0.8, 1.1, 0.0], [1.5, 0.2, -0.4, -1.0], [-0.6, 0.9, 0.1, 0.7], [0.0, 0.5, -0.2, 0.4]]
)


# --- greedy ---


def greedy_decode(model, prompt, length):
    tokens = list(prompt)
    while len(tokens) < len(prompt) + length:
        tokens.append(int(model[tokens[-1]].argmax()))
    return tokens


@pytest.mark.parametrize("seed", range(8))
def test_greedy_tokens_equal_plain_decoding_whatever_the_drafts(seed, make):
    rng = random.Random(seed)
    vocab, length = 12, 25
    model = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(1, 4))] for _ in range(5)]
    known = [list(prompt) for prompt in prompts]
    expected = [greedy_decode(model, prompt, length) for prompt in prompts]
    sampler = make.sampler(vocab, *(make.row(i, SamplingParams(temperature=0), p) for i, p in enumerate(prompts)))
    accepted = 0
    while any(len(k) < len(e) for k, e in zip(known, expected, strict=True)):
        drafts = [scripted_drafts(rng, k, e, vocab) for k, e in zip(known, expected, strict=True)]
        logits = torch.cat([model[[k[-1], *d]] for k, d in zip(known, drafts, strict=True)])
        sampled = sampler.step(make.plan(range(5), [len(k) for k in known], drafts), logits)
        for k, d, tokens in zip(known, drafts, sampled.token_ids, strict=True):
            assert 1 <= len(tokens) <= len(d) + 1
            assert tokens[:-1] == d[: len(tokens) - 1]
            accepted += len(tokens) - 1
            k += tokens
    for k, e in zip(known, expected, strict=True):
        assert k[: len(e)] == e
    assert accepted > 10


def scripted_drafts(rng, known, expected, vocab):
    """Right, wrong or absent, by chance."""
    right = expected[len(known) : len(known) + rng.randint(0, 4)]
    return [token if rng.random() < 0.7 else rng.randrange(vocab) for token in right]


def test_greedy_verification_applies_rules_at_each_position(make):
    """A penalty at a later row counts the drafts before it, and min_tokens ends between two rows."""
    params = SamplingParams(temperature=0, frequency_penalty=2.0, min_tokens=2, stop_token_ids=(0,))
    logits = torch.tensor([[9.0, 4.0, 3.0, 1.0]]).repeat(3, 1)
    sampled = make.sampler(4, make.row(0, params, (3,))).step(make.plan([0], [1], [[1, 2]]), logits)
    # Token 0 is a stop, masked for two tokens; token 1 falls behind 2 once it was drafted.
    assert sampled.token_ids == [[1, 2, 0]]


def test_penalties_count_accepted_tokens_but_not_rejected_drafts(make):
    params = SamplingParams(temperature=0, frequency_penalty=2.0)
    sampler = make.sampler(4, make.row(0, params, (3,)))
    assert sampler.step(make.plan([0], [1], [[1, 2]]), torch.tensor([[3.0, 2.5, 1.0, 0.0]] * 3)).token_ids == [[0]]
    assert sampler.step(make.plan([0], [2]), torch.tensor([[3.0, 2.5, 1.0, 0.0]])).token_ids == [[1]]
    assert sampler.step(make.plan([0], [3]), torch.tensor([[3.0, 2.5, 1.4, 0.0]])).token_ids == [[2]]


def test_logprobs_of_accepted_drafts_come_from_their_own_rows(make):
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(-1).tolist()
    rows = [make.row(0, SamplingParams(temperature=0, logprobs=1)), make.row(1, SamplingParams(temperature=0))]
    plan = make.plan([0, 1], [3, 3], [[best[0], (best[1] + 1) % 9], []])
    sampled = make.sampler(9, *rows).step(plan, logits)
    assert sampled.token_ids == [best[:2], [best[3]]]
    assert [entry.token_id for entry in sampled.logprobs[0]] == best[:2]
    expected = logits.double().log_softmax(-1).amax(-1)[:2].tolist()
    assert [entry.logprob for entry in sampled.logprobs[0]] == pytest.approx(expected, abs=1e-5)
    assert sampled.logprobs[1] is None


# --- coupled ---


def sampled_alone(make, model, rows, length):
    """The tokens of each request without drafts."""
    known = [list(row.token_ids) for row in rows]
    sampler = make.sampler(len(model), *rows)
    for _ in range(length):
        logits = model[[k[-1] for k in known]]
        plan = make.plan(range(len(rows)), [len(k) for k in known])
        for k, tokens in zip(known, sampler.step(plan, logits).token_ids, strict=True):
            k += tokens
    return known


def sampled_with_drafts(make, model, rows, expected, accuracy, rng):
    """The tokens of each request, and the share of accepted drafts, if each draft is right with chance ``accuracy``."""
    known = [list(row.token_ids) for row in rows]
    sampler = make.sampler(len(model), *rows)
    drafted = accepted = 0
    while short := [i for i in range(len(rows)) if len(known[i]) < len(expected[i])]:
        rng.shuffle(short)
        drafts = []
        for i in short:
            right = expected[i][len(known[i]) :][: rng.randint(0, 4)]
            drafts.append([token if rng.random() < accuracy else rng.randrange(len(model)) for token in right])
        logits = torch.cat([model[[known[i][-1], *d]] for i, d in zip(short, drafts, strict=True)])
        sampled = sampler.step(make.plan(short, [len(known[i]) for i in short], drafts), logits)
        for i, d, tokens in zip(short, drafts, sampled.token_ids, strict=True):
            known[i] += tokens
            drafted += len(d)
            accepted += len(tokens) - 1
    return [k[: len(e)] for k, e in zip(known, expected, strict=True)], accepted / drafted


@pytest.mark.parametrize("accuracy", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_sampled_tokens_are_the_same_with_and_without_drafts(seed, accuracy, make):
    rng = random.Random(seed)
    vocab = 15
    model = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
    settings = [{}, {"temperature": 0.6}, {"temperature": 0}, {"top_p": 0.8, "top_k": 5}, {"min_p": 0.1}]
    settings.append({"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {3: 2.0}})
    rows = [make.row(i, SamplingParams(**given), seed=100 * seed + i) for i, given in enumerate(settings)]
    expected = sampled_alone(make, model, rows, 20)
    found, share = sampled_with_drafts(make, model, rows, expected, accuracy, rng)
    assert found == expected
    assert share == 1 if accuracy == 1 else share < accuracy + 0.2


def test_a_draft_without_probabilities_is_accepted_as_often_as_the_model_would_choose_it(make, crowd):
    sampler = crowd("plain")
    for draft in range(VOCAB):
        plan = make.plan(range(REQUESTS), [len(PROMPT)] * REQUESTS, [[draft]] * REQUESTS)
        sampled = sampler.step(plan, MODEL[[PROMPT[-1], draft]].repeat(REQUESTS, 1)).token_ids
        share = sum(len(tokens) == 2 for tokens in sampled) / REQUESTS
        assert share == pytest.approx(float(MODEL[PROMPT[-1]].softmax(-1)[draft]), abs=0.01)


# --- stochastic ---

FILTERS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top-k": {"top_k": 3, "temperature": 1.3},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.3},
    "penalties": {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    "everything": {
        "temperature": 1.2,
        "top_k": 3,
        "top_p": 0.95,
        "repetition_penalty": 0.8,
        "presence_penalty": -0.5,
        "logit_bias": {3: 1.0},
    },
}

PEAKED = torch.tensor([[0.91, 0.03, 0.03, 0.03]]).repeat(VOCAB, 1)
DRAFTERS = {
    "equal": MODEL.softmax(-1),
    "uniform": torch.full((VOCAB, VOCAB), 0.25),
    "peaked": PEAKED,
    "half of the tokens": torch.tensor([[0.0, 0.6, 0.0, 0.4]]).repeat(VOCAB, 1),
    "point mass": None,
}


def draw_drafts(drafter, k, rng):
    """``[REQUESTS, k]`` drafts, and the distributions ``[REQUESTS, k, VOCAB]`` they were drawn from."""
    previous = np.full(REQUESTS, PROMPT[-1])
    drafts, probs = [], []
    for _ in range(k):
        if drafter is None:
            previous = (previous * 3 + 2) % VOCAB
        else:
            probs.append(drafter[previous])
            cumulative = drafter.double().cumsum(-1).numpy()[previous]
            previous = (rng.random(REQUESTS)[:, None] > cumulative / cumulative[:, -1:]).sum(-1)
        drafts.append(previous)
    return np.stack(drafts, 1), torch.stack(probs, 1) if probs else None


@pytest.fixture(scope="module")
def crowd(make):
    """A sampler with ``REQUESTS`` requests; kept between tests where requests leave no trace in it."""
    kept = {}

    def enter(filters):
        if filters not in kept:
            rows = (make.row(slot, SamplingParams(**FILTERS[filters]), PROMPT) for slot in range(REQUESTS))
            sampler = make.sampler(VOCAB, *rows, max_num_seqs=REQUESTS)
            if "repetition_penalty" in FILTERS[filters]:
                return sampler
            kept[filters] = sampler
        return kept[filters]

    return enter


def run_requests(make, sampler, drafter, k, ragged):
    """Verify drafts of many requests in one step, then sample plainly until each has ``k + 1`` tokens."""
    rng = np.random.default_rng(k)
    slots = range(REQUESTS)
    drafts, probs = draw_drafts(drafter, k, rng)
    counts = rng.integers(0, k + 1, REQUESTS) if ragged else np.full(REQUESTS, k)
    drafts = [row[:count].tolist() for row, count in zip(drafts, counts, strict=True)]
    rows = [token for row in drafts for token in (PROMPT[-1], *row)]
    draft_probs = DraftProbs.of(list(slots), Drafts(token_ids=drafts, probs=probs))
    outputs = sampler.step(make.plan(slots, [len(PROMPT)] * REQUESTS, drafts), MODEL[rows], draft_probs).token_ids
    while short := [slot for slot in slots if len(outputs[slot]) <= k]:
        lengths = [len(PROMPT) + len(outputs[slot]) for slot in short]
        logits = MODEL[[outputs[slot][-1] for slot in short]]
        for slot, tokens in zip(short, sampler.step(make.plan(short, lengths), logits).token_ids, strict=True):
            outputs[slot] += tokens
    return np.array(outputs)


def joint_distribution(oracle, params, length):
    """Probability of every sequence of the given length, from the oracle alone."""
    joint = np.zeros((VOCAB,) * length)
    for sequence in itertools.product(range(VOCAB), repeat=length):
        probability = 1.0
        for i, token in enumerate(sequence):
            logits = MODEL[(PROMPT + list(sequence))[len(PROMPT) + i - 1]].tolist()
            probability *= oracle.distribution(logits, params, PROMPT, list(sequence[:i]))[token]
        joint[sequence] = probability
    return joint


def p_value(outputs, joint):
    """Chi-square test of whole sequences; cells that expect fewer than five are pooled."""
    counts = np.zeros(joint.shape)
    np.add.at(counts, tuple(outputs.T), 1)
    expected = joint * len(outputs)
    if counts[joint == 0].any():
        return 0.0
    rare = expected < 5
    observed = [*counts[~rare], counts[rare].sum()]
    predicted = [*expected[~rare], expected[rare].sum()]
    if predicted[-1] < 5:
        observed[-2:], predicted[-2:] = [sum(observed[-2:])], [sum(predicted[-2:])]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, predicted, strict=True))
    degrees = torch.tensor((len(predicted) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)))


CASES = [
    *((drafter, "plain", k) for drafter in DRAFTERS for k in (1, 4)),
    *((drafter, filters, 2) for drafter in ("uniform", "point mass") for filters in FILTERS if filters != "plain"),
    ("peaked", "everything", 3),
    ("half of the tokens", "top-k", 3),
    ("equal", "temperature", 3),
]


@pytest.mark.parametrize(("drafter", "filters", "k"), CASES)
def test_the_target_distribution_is_preserved(drafter, filters, k, make, crowd, oracle):
    params = SamplingParams(**FILTERS[filters])
    outputs = run_requests(make, crowd(filters), DRAFTERS[drafter], k, ragged=k > 1)
    assert p_value(outputs[:, :3], joint_distribution(oracle, params, min(3, k + 1))) > 0.01


def accept_always(probs, params, drafts, draft_probs):
    return torch.ones_like(drafts, dtype=torch.bool)


def accept_half_as_often(probs, params, drafts, draft_probs):
    return survives(probs, params, drafts, draft_probs) & (torch.rand(len(drafts), generator=GENERATOR) < 0.5)


def accept_as_if_deterministic(probs, params, drafts, draft_probs):
    return survives(probs, params, drafts, torch.ones_like(draft_probs))


def recover_from_target(probs, draft_probs, params):
    return recover(probs, torch.zeros_like(draft_probs), params)


GENERATOR = torch.Generator()
survives, recover = verify_module._survives, sampling.sample_residual
BROKEN = {
    "accepts always": (verify_module, "_survives", accept_always),
    "recovers from the target": (sampling, "sample_residual", recover_from_target),
    "accepts too rarely": (verify_module, "_survives", accept_half_as_often),
    "accepts as if drafts were deterministic": (verify_module, "_survives", accept_as_if_deterministic),
}


@pytest.mark.parametrize(("module", "name", "replacement"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_verifier_is_caught(module, name, replacement, make, crowd, oracle, monkeypatch):
    GENERATOR.manual_seed(0)
    monkeypatch.setattr(module, name, replacement)
    outputs = run_requests(make, crowd("plain"), DRAFTERS["uniform"], 2, ragged=False)
    assert p_value(outputs, joint_distribution(oracle, SamplingParams(), 3)) < 1e-6


def test_drafts_equal_to_the_target_are_all_accepted(make):
    """``p == q`` accepts with probability 1, however the two were rounded."""
    params = SamplingParams()
    sampler = make.sampler(VOCAB, *(make.row(slot, params, PROMPT) for slot in range(1000)))
    drafts, _ = draw_drafts(DRAFTERS["equal"], 3, np.random.default_rng(0))
    drafts = drafts[:1000].tolist()
    rows = [token for row in drafts for token in (PROMPT[-1], *row)]
    probs = MODEL[rows].softmax(-1).view(1000, 4, VOCAB)[:, :3]
    plan = make.plan(range(1000), [2] * 1000, drafts)
    sampled = sampler.step(plan, MODEL[rows], DraftProbs.of(range(1000), Drafts(token_ids=drafts, probs=probs)))
    assert all(tokens[:-1] == row for tokens, row in zip(sampled.token_ids, drafts, strict=True))


def test_filtered_tokens_are_never_accepted(make):
    """A draft that top-k drops is rejected even if the drafter was sure of it."""
    rows = [make.row(slot, SamplingParams(top_k=2)) for slot in range(200)]
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0]]).repeat(400, 1)
    sampled = make.sampler(VOCAB, *rows).step(make.plan(range(200), [3] * 200, [[3]] * 200), logits)
    assert {tokens[0] for tokens in sampled.token_ids} == {0, 1}


def test_verification_is_reproducible_alone_and_in_a_batch(make):
    params = [SamplingParams(temperature=t, top_p=p) for t, p in ((0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.0, 1.0))]
    drafts = [[1, 2], [2], [0, 3, 1], []]
    rows = [make.row(i, p, seed=40 + i) for i, p in enumerate(params)]
    logits = torch.randn(10, VOCAB, generator=torch.Generator().manual_seed(1))
    together = make.sampler(VOCAB, *rows).step(make.plan(range(4), [3] * 4, drafts), logits).token_ids
    assert make.sampler(VOCAB, *rows).step(make.plan(range(4), [3] * 4, drafts), logits).token_ids == together
    start = 0
    for i, row in enumerate(rows):
        own = logits[start : start + 1 + len(drafts[i])]
        start += len(own)
        alone = make.sampler(VOCAB, row, max_num_seqs=4).step(make.plan([i], [3], [drafts[i]]), own)
        assert alone.token_ids == [together[i]]


def test_a_batch_of_drafts_may_mix_requests_with_and_without(make):
    """Requests without drafts get their ordinary seeded tokens beside one that verifies."""
    rows = [make.row(i, SamplingParams(top_k=3), seed=i) for i in range(20)]
    logits = torch.randn(22, VOCAB, generator=torch.Generator().manual_seed(5))
    plan = make.plan(range(20), [3] * 20, [[1, 1], *([] for _ in range(19))])
    mixed = make.sampler(VOCAB, *rows).step(plan, logits)
    plain = make.sampler(VOCAB, *rows).step(make.plan(range(1, 20), [3] * 19), logits[3:])
    assert mixed.token_ids[1:] == plain.token_ids


def test_draft_probs_follow_their_slots_into_a_later_plan():
    """The plan that verifies may order requests differently, leave some out, and cut their drafts."""
    probs = torch.rand(3, 2, VOCAB)
    kept = DraftProbs.of([7, 4, 9], Drafts(token_ids=[[1, 2], [3, 0], [2, 2]], probs=probs))
    rows = SampleRows.build([0, 1], [9, 4], np.array([12, 20]), [[2, 2], [3]])
    gathered = kept.gather(rows)
    for row, (entry, offset) in {0: (2, 0), 1: (2, 1), 3: (1, 0)}.items():
        assert torch.equal(gathered[row], probs[entry, offset])
    assert DraftProbs.of([1], Drafts(token_ids=[[5]])) is None


def test_sample_rows_expand_requests():
    rows = SampleRows.build([0, 2], [5, 3], np.array([12, 20]), [[8, 9], []])
    assert rows.slots_S.tolist() == [5, 5, 5, 3]
    assert rows.positions_S.tolist() == [10, 11, 12, 20]
    assert rows.drafts_S.tolist() == [8, 9, NO_TOKEN, NO_TOKEN]
    assert rows.starts_R.tolist() == [0, 3]
    index, tokens = rows.earlier_drafts(np.array([1, 2, 3]))
    assert list(zip(index.tolist(), tokens.tolist(), strict=True)) == [(0, 8), (1, 8), (1, 9)]

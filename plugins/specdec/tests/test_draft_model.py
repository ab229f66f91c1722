"""Drafts of the draft model: what a fresh dense run of it gives, and the target's distribution once verified."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.contracts.specdec import SpecConfig, SpecState
from dovetail.errors import ConfigError
from dovetail.messages import NewRow, StepPlan
from dovetail.runner.sampler import Sampler
from dovetail.runner.verify import DraftProbs
from dovetail.sampling_params import SamplingParams
from dovetail.testing.engines import engine_request, run_until_idle
from dovetail.testing.platforms import ReferencePlatform
from dovetail_specdec.draft_model import DraftModelDecoder

CPU = torch.device("cpu")
PAGE = 2 * 4 * 2 * 16 * 2 * 64 * 4  # of the model and of the draft

# --- against a dense run ---


@pytest.mark.parametrize(
    "options",
    [{"kv_cache_memory": 14 * PAGE / 2**30, "max_num_batched_tokens": 48}, {"ladder": True}],
    ids=["preemption", "ladder"],
)
def test_drafts_are_those_of_a_fresh_run(make_engine, prompts, perturbed, monkeypatch, options):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import recording_decoder

    monkeypatch.setattr(recording_decoder, "ROUNDS", [])
    section = {"method": "draft_model", "model": str(perturbed)}
    engine = make_engine(section, decoder="recording_decoder:RecordingDecoder", **options)
    for i, prompt in enumerate(prompts):
        engine.add(engine_request(prompt, request_id=str(i), max_tokens=16, ignore_eos=True))
    run_until_idle(engine)
    rounds = recording_decoder.ROUNDS
    sys.modules.pop("recording_decoder")
    assert (engine.stats().num_preemptions > 0) == ("kv_cache_memory" in options)
    assert len(rounds) > 30
    assert {len(drafts) for _, drafts in rounds} >= {1, 2, 3, 4}
    dense = AutoModelForCausalLM.from_pretrained(perturbed, dtype=torch.float32).eval()
    for known, drafts in rounds[:: max(1, len(rounds) // 40)]:
        with torch.inference_mode():
            logits = dense(torch.tensor([known + drafts])).logits[0]
        assert logits[len(known) - 1 : -1].argmax(-1).tolist() == drafts


# --- the distribution of what is kept ---

REQUESTS, VOCAB, DRAFTS = 20_000, 4, 3
MODEL = torch.tensor(
    [[0.3, -0.8, 1.1, 0.0], [1.5, 0.2, -0.4, -1.0], [-0.6, 0.9, 0.1, 0.7], [0.0, 0.5, -0.2, 0.4]]
)
DRAFT = MODEL + torch.tensor(
    [[0.9, 0.0, -0.7, 0.1], [0.0, -0.5, 0.6, 0.3], [0.4, 0.1, -0.8, 0.0], [1.0, 0.0, 0.2, 0.5]]
)
TEMPERATURE = 0.8


class TableModel:
    """A draft model whose next token depends on the last one alone."""

    def catch_up(self, state):
        slots = list(state.slots)
        return list(range(len(slots))), DRAFT[state.tokens_SL[slots, state.num_tokens_S[slots] - 1]]

    def extend(self, token_ids):
        return DRAFT[token_ids]


def decoder(model=None, **options):
    config = SpecConfig(
        num_speculative_tokens=DRAFTS,
        max_num_seqs=REQUESTS,
        max_model_len=16,
        vocab_size=VOCAB,
        options={"sampling": "coupled", **options},
        draft=model or TableModel(),
    )
    return DraftModelDecoder(config, CPU)


def plan(slots, lengths, drafts):
    return StepPlan(
        step=0,
        new_rows=[],
        freed_slots=[],
        slots=list(slots),
        num_computed=[length - 1 for length in lengths],
        num_scheduled=[1 + len(d) for d in drafts],
        drafts=drafts,
        samples=[True] * len(drafts),
        block_updates=[],
    )


@pytest.fixture(scope="module")
def sampler():
    made = Sampler(REQUESTS, VOCAB, ReferencePlatform(PlatformConfig()), OpTable())
    params = SamplingParams(temperature=TEMPERATURE)
    for slot in range(REQUESTS):
        row = NewRow(
            slot=slot,
            request_id="",
            token_ids=[1],
            prompt_len=1,
            params=params,
            eos_token_ids=(),
            seed=slot,
            block_ids=[],
        )
        made.enter([row])
    return made


def one_round(sampler, sampling):
    """The tokens of each request after one round of drafts, topped up by plain sampling; and the drafts' fate."""
    state = SpecState(
        slots=range(REQUESTS),
        tokens_SL=torch.ones(REQUESTS, 17, dtype=torch.int64),
        num_tokens_S=torch.ones(REQUESTS, dtype=torch.int64),
        temperature_S=torch.full((REQUESTS,), TEMPERATURE),
        seeds_S=torch.arange(REQUESTS),
        limit=[DRAFTS] * REQUESTS,
    )
    proposal = decoder(sampling=sampling).propose(state)
    assert (proposal.probs is None) == (sampling == "coupled")
    rows = [token for drafts in proposal.token_ids for token in (1, *drafts)]
    probs = DraftProbs.of(range(REQUESTS), proposal)
    step = plan(range(REQUESTS), [1] * REQUESTS, proposal.token_ids)
    outputs = sampler.step(step, MODEL[rows], probs).read().token_ids
    accepted = sum(len(tokens) - 1 for tokens in outputs) / (DRAFTS * REQUESTS)
    return top_up(sampler, outputs), accepted


def top_up(sampler, outputs):
    while short := [slot for slot in range(REQUESTS) if len(outputs[slot]) < DRAFTS]:
        logits = MODEL[[outputs[slot][-1] if outputs[slot] else 1 for slot in short]]
        step = plan(short, [1 + len(outputs[slot]) for slot in short], [[] for _ in short])
        for slot, tokens in zip(short, sampler.step(step, logits).read().token_ids, strict=True):
            outputs[slot] += tokens
    return np.array([tokens[:DRAFTS] for tokens in outputs])


def p_value(outputs):
    """Chi-square test of whole sequences against the model's distribution."""
    probs = (MODEL.double() / TEMPERATURE).softmax(-1).numpy()
    expected, counts = np.zeros((VOCAB,) * DRAFTS), np.zeros((VOCAB,) * DRAFTS)
    for a, b, c in itertools.product(range(VOCAB), repeat=DRAFTS):
        expected[a, b, c] = probs[1, a] * probs[a, b] * probs[b, c] * len(outputs)
    np.add.at(counts, tuple(outputs.T), 1)
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((counts.size - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, torch.tensor(statistic / 2)))


def test_coupled_drafts_leave_the_tokens_as_they_are(sampler):
    outputs, accepted = one_round(sampler, "coupled")
    assert p_value(outputs) > 0.01
    assert np.array_equal(outputs, top_up(sampler, [[] for _ in range(REQUESTS)]))
    assert accepted > 0.4, "far more than independent draws would agree"


def test_rejection_sampling_leaves_the_distribution_as_it_is(sampler):
    outputs, accepted = one_round(sampler, "rejection")
    assert p_value(outputs) > 0.01
    assert accepted > one_round(sampler, "coupled")[1]


def test_a_wrong_distribution_is_noticed(sampler, monkeypatch):
    """Drafts drawn from something else than the probabilities they come with."""
    monkeypatch.setattr("dovetail_specdec.draft_model._Rows.choose", lambda rows, logits, index: logits.argmax(-1))
    outputs, _ = one_round(sampler, "rejection")
    assert p_value(outputs) < 1e-6


# --- the rest ---


def test_sampling_is_one_of_two():
    with pytest.raises(ConfigError, match=r"has sampling 'beam'; choose 'coupled' .* or 'rejection'"):
        decoder(sampling="beam")


class BehindModel(TableModel):
    """Has caught up with the last request alone."""

    def catch_up(self, state):
        _, logits = super().catch_up(state)
        return [len(state.slots) - 1], logits[-1:]


@pytest.mark.parametrize("sampling", ["coupled", "rejection"])
def test_requests_that_it_has_not_caught_up_with_get_no_drafts(sampling):
    state = SpecState(
        slots=[2, 0],
        tokens_SL=torch.ones(3, 17, dtype=torch.int64),
        num_tokens_S=torch.ones(3, dtype=torch.int64),
        temperature_S=torch.ones(3),
        seeds_S=torch.arange(3),
        limit=[3, 2],
    )
    drafts = decoder(BehindModel(), sampling=sampling).propose(state)
    assert [len(ids) for ids in drafts.token_ids] == [0, 2]
    if drafts.probs is not None:
        assert torch.allclose(drafts.probs[1, :2].sum(-1), torch.ones(2))

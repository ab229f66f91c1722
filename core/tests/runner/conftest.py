"""An oracle of sampling in plain Python, and shorthands to build requests and plans."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from dovetail.contracts.ops import OpTable
from dovetail.contracts.platform import PlatformConfig
from dovetail.messages import NewRow, StepPlan
from dovetail.runner.sampler import Sampler
from dovetail.testing.platforms import ReferencePlatform


class ReadingSampler(Sampler):
    """Waits for what it sampled."""

    def step(self, plan, logits_SV, draft_probs=None):
        return super().step(plan, logits_SV, draft_probs).read()

    def prompt_logprobs(self, slot, logits_SV, targets_S):
        return super().prompt_logprobs(slot, logits_SV, targets_S)()


def ruled_logits(logits, params, prompt, output, eos=()):
    """Bias, allowed tokens, min_tokens and penalties, one token at a time."""
    ruled = []
    for token, value in enumerate(logits):
        value += (params.logit_bias or {}).get(token, 0.0)
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            value = -math.inf
        stops = set(params.stop_token_ids) | set(() if params.ignore_eos else eos)
        if len(output) < params.min_tokens and token in stops:
            value = -math.inf
        if token in prompt or token in output:
            value = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty * (token in output)
        ruled.append(value)
    return ruled


def softmax(values):
    largest = max(values)
    weights = [math.exp(v - largest) for v in values]
    return [w / sum(weights) for w in weights]


def keep(values, kept):
    return [v if k else -math.inf for v, k in zip(values, kept, strict=True)]


def filtered_logits(ruled, params):
    """Temperature, min-p, top-k, top-p; tokens tied with the last one kept are kept."""
    scaled = [v / params.temperature for v in ruled]
    probs = softmax(scaled)
    scaled = keep(scaled, [p >= params.min_p * max(probs) for p in probs])
    if 0 < params.top_k < len(scaled):
        floor = sorted(scaled, reverse=True)[params.top_k - 1]
        scaled = keep(scaled, [v >= floor for v in scaled])
    if params.top_p < 1:
        probs, total, floor = softmax(scaled), 0.0, -math.inf
        for p in sorted(probs, reverse=True):
            total, floor = total + p, p
            if total >= params.top_p:
                break
        scaled = keep(scaled, [p >= floor for p in probs])
    return scaled


def distribution(logits, params, prompt, output, eos=()):
    """The probabilities that a request's next token is drawn from."""
    ruled = ruled_logits(logits, params, prompt, output, eos)
    if params.temperature == 0:
        best = ruled.index(max(ruled))
        return [float(token == best) for token in range(len(ruled))]
    return softmax(filtered_logits(ruled, params))


def new_row(slot, params, tokens=(1, 2, 3), prompt_len=None, seed=None, eos=()):
    return NewRow(
        slot=slot,
        request_id=f"r{slot}",
        token_ids=list(tokens),
        prompt_len=len(tokens) if prompt_len is None else prompt_len,
        params=params,
        eos_token_ids=eos,
        seed=slot if seed is None else seed,
        block_ids=[],
    )


def plan(slots, lengths, drafts=None, samples=None):
    """A plan in which each request's last known token, and its drafts, are computed."""
    drafts = drafts or [[] for _ in slots]
    return StepPlan(
        step=0,
        new_rows=[],
        freed_slots=[],
        slots=list(slots),
        num_computed=[length - 1 for length in lengths],
        num_scheduled=[1 + len(d) for d in drafts],
        drafts=drafts,
        samples=samples or [True] * len(slots),
        block_updates=[],
    )


def sampler(vocab_size, *rows, max_num_seqs=None):
    slots = max_num_seqs or max(row.slot for row in rows) + 1
    made = ReadingSampler(slots, vocab_size, ReferencePlatform(PlatformConfig()), OpTable())
    made.enter(rows)
    return made


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors here are small: threads that wait for each other would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(ruled_logits=ruled_logits, filtered_logits=filtered_logits, distribution=distribution)


@pytest.fixture(scope="session")
def make():
    return SimpleNamespace(row=new_row, plan=plan, sampler=sampler)

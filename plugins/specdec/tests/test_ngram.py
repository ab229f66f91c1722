"""Prompt lookup against a brute-force search, and its memory of slots."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dovetail.contracts.specdec import SpecConfig, SpecState
from dovetail.errors import ConfigError
from dovetail_specdec.ngram import NgramDecoder, continuation
from dovetail_specdec.plugin import NGRAM

CPU = torch.device("cpu")


def brute_force(known, shortest, longest, count):
    """Try every length and every place, and copy token by token."""
    for length in range(longest, shortest - 1, -1):
        for start in range(len(known) - 1, length - 1, -1):
            if known[start - length : start] == known[len(known) - length :]:
                text = list(known)
                for i in range(count):
                    text.append(text[start + i])
                return text[len(known) :]
    return []


@pytest.mark.parametrize("seed", range(300))
def test_continuation_equals_brute_force(seed):
    rng = random.Random(seed)
    known = [rng.randrange(rng.choice([2, 3, 5])) for _ in range(rng.randint(1, 40))]
    shortest = rng.randint(1, 4)
    longest = shortest + rng.randint(0, 3)
    count = rng.randint(0, 6)
    assert continuation(np.array(known), shortest, longest, count) == brute_force(known, shortest, longest, count)


def decoder(**options):
    config = SpecConfig(
        num_speculative_tokens=4,
        max_num_seqs=3,
        max_model_len=32,
        vocab_size=100,
        options={"prompt_lookup_min": 2, "prompt_lookup_max": 3, **options},
    )
    return NgramDecoder(config, CPU)


def state_of(known, limit=4):
    """The state after a step in which these slots (slot -> tokens) got tokens."""
    tokens = torch.zeros(3, 33, dtype=torch.int64)
    lengths = torch.zeros(3, dtype=torch.int64)
    for slot, ids in known.items():
        tokens[slot, : len(ids)] = torch.tensor(ids)
        lengths[slot] = len(ids)
    return SpecState(
        slots=list(known),
        tokens_SL=tokens,
        num_tokens_S=lengths,
        temperature_S=torch.zeros(3),
        seeds_S=torch.zeros(3, dtype=torch.int64),
        limit=[limit] * len(known),
    )


def test_each_request_is_drafted_for_from_its_own_tokens():
    made = decoder()
    first = {2: [1, 2, 3, 1, 2], 0: [7, 8, 9, 7, 8]}
    assert made.propose(state_of(first)).token_ids == [[3, 1, 2, 3], [9, 7, 8, 9]]
    later = {0: [*first[0], 9, 5, 6], 2: [*first[2], 3], 1: [4, 4, 4]}
    assert made.propose(state_of(later, limit=2)).token_ids == [[], [1, 2], [4, 4]]
    assert made.propose(state_of({0: [*later[0], 8, 9]}, limit=1)).token_ids == [[5]]


def test_released_slots_are_forgotten():
    made = decoder()
    made.propose(state_of({1: [1, 2, 3, 4, 5, 6, 7, 8]}))
    made.release([1])
    # Without forgetting, the copy would still begin with the former request's tokens.
    assert made.propose(state_of({1: [9, 8, 5, 9, 8]})).token_ids == [[5, 9, 8, 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_min": 0}, "prompt_lookup_min 0; give a whole number of at least 1"),
        ({"prompt_lookup_max": "3"}, "prompt_lookup_max '3'; give a whole number of at least 1"),
        ({"prompt_lookup_min": True}, "prompt_lookup_min True; give a whole"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min 5 above prompt_lookup_max 3; lower the first"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        decoder(**options)


def test_every_default_is_an_option():
    assert set(NGRAM.defaults) == {"num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"}

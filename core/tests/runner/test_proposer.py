"""What a speculator is told about each request."""

import numpy as np
import pytest

from dovetail.contracts.platform import PlatformConfig
from dovetail.contracts.specdec import Drafts, SpecDecoder
from dovetail.messages import NewRow, StepPlan
from dovetail.runner.proposer import Proposer
from dovetail.runner.slots import SlotTables
from dovetail.sampling_params import SamplingParams
from dovetail.testing.platforms import ReferencePlatform

MAX_MODEL_LEN = 32


class Greedy(SpecDecoder):
    """Takes all the room there is."""

    def __init__(self):
        self.states = []

    def propose(self, state):
        self.states.append(state)
        return Drafts(token_ids=[[1] * limit for limit in state.limit])

    def release(self, slots):
        pass


def proposals(num_tokens, **params):
    """The state and the drafts after a step in which a request with a prompt of 20 tokens came to ``num_tokens``."""
    tables = SlotTables(4, MAX_MODEL_LEN, 4, 1, ReferencePlatform(PlatformConfig()))
    decoder = Greedy()
    proposer = Proposer(decoder, None, tables, 3)
    row = NewRow(
        slot=2, request_id="", token_ids=[5] * 20, prompt_len=20, params=SamplingParams(**params), eos_token_ids=(),
        seed=7, block_ids=[[]],
    )  # fmt: skip
    plan = StepPlan(
        step=0, new_rows=[row], freed_slots=[], slots=[0, 2], num_computed=[0, 0], num_scheduled=[8, num_tokens],
        drafts=[[], []], samples=[False, True], block_updates=[],
    )  # fmt: skip
    proposer.apply(plan)
    tables.num_tokens_S[:] = np.array([9, 0, num_tokens, 0])
    drafts = proposer.propose(plan, [[], [1]])
    return decoder.states[-1], drafts


@pytest.mark.parametrize(
    ("num_tokens", "max_tokens", "room"),
    [(21, 10, 3), (26, 10, 3), (27, 10, 2), (28, 10, 1), (29, 10, 0), (28, None, 3), (30, 99, 1), (31, None, 0)],
)
def test_drafts_leave_room_for_the_token_that_is_sampled_after_them(num_tokens, max_tokens, room):
    state, drafts = proposals(num_tokens, max_tokens=max_tokens)
    assert (list(state.slots), list(state.limit)) == ([2], [room])
    assert drafts == [[], [1] * room]


@pytest.mark.parametrize(("asked", "effective"), [(0.0, 0.0), (1e-6, 0.0), (0.75, 0.75)])
def test_noise_is_that_of_the_request(asked, effective):
    state, _ = proposals(21, temperature=asked)
    assert (float(state.temperature_S[2]), int(state.seeds_S[2])) == (effective, 7)

"""What the draft model's runner computes, stores and forgets, over a forward pass that only takes notes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dovetail.contracts.executor import KVGroup
from dovetail.contracts.platform import ExactShapes, MemoryInfo, PlatformConfig
from dovetail.contracts.specdec import SpecState
from dovetail.errors import ConfigError
from dovetail.messages import NULL_BLOCK
from dovetail.runner import kv_memory
from dovetail.runner.draft_memory import bytes_beside_block, draft_blocks
from dovetail.runner.draft_model import DraftRunner
from dovetail.runner.slots import SlotTables, StepRows
from dovetail.testing import engine_config
from dovetail.testing.platforms import ReferencePlatform

PLATFORM = ReferencePlatform(PlatformConfig())
CONFIG = engine_config(
    max_model_len=32, max_num_seqs=4, max_num_batched_tokens=16, block_size=4, num_speculative_tokens=3
)


class NotingPass:
    """Logits are zeros; kept are, per step, slot -> (first position, tokens); and the pages in use."""

    def __init__(self, tables):
        self.tables = tables
        self.steps = []
        self.pages = {}

    def run(self, plan):
        tokens = self.tables.tokens_SL
        step = zip(plan.slots, plan.num_computed, plan.num_scheduled, strict=True)
        self.steps.append({slot: (start, tokens[slot, start : start + count].tolist()) for slot, start, count in step})
        self.pages = {slot: int((self.tables.block_tables[0][slot] != NULL_BLOCK).sum()) for slot in plan.slots}
        rows = StepRows.of(plan)
        return rows, torch.empty(0), torch.zeros(len(rows.logits_rows_S), 5)


@pytest.fixture
def tables():
    return SlotTables(4, 32, 4, 1, PLATFORM)


def runner(tables, num_blocks=33):
    made = []

    def forward_pass(groups, blocks, own_tables, shapes, logits_per_request):
        made.append(NotingPass(own_tables))
        return made[-1]

    facts = SimpleNamespace(attention=[None, None])
    loaded = SimpleNamespace(
        config=CONFIG, platform=PLATFORM, facts=facts, forward_pass=forward_pass
    )
    return DraftRunner(loaded, ExactShapes([]), tables, num_blocks), made[0].steps


def state_of(tables, known, limit=3):
    for slot, ids in known.items():
        tables.tokens_SL[slot, : len(ids)] = torch.tensor(ids)
        tables.num_tokens_S[slot] = len(ids)
    return SpecState(
        slots=list(known),
        tokens_SL=tables.tokens_SL,
        num_tokens_S=torch.from_numpy(tables.num_tokens_S),
        temperature_S=torch.zeros(4),
        seeds_S=torch.zeros(4, dtype=torch.int64),
        limit=[limit] * len(known),
    )


def test_only_what_is_not_stored_is_computed(tables):
    draft, steps = runner(tables)
    entries, logits = draft.catch_up(state_of(tables, {1: [5, 6, 7]}))
    assert (entries, len(logits)) == ([0], 1)
    draft.extend(torch.tensor([8]))
    draft.extend(torch.tensor([9]))
    assert steps == [{1: (0, [5, 6, 7])}, {1: (3, [8])}, {1: (4, [9])}]
    steps.clear()
    draft.accept([1], [1])  # of the drafts 8, 9 and one more
    draft.catch_up(state_of(tables, {1: [5, 6, 7, 8, 2]}))
    assert steps.pop() == {1: (4, [2])}
    draft.extend(torch.tensor([3]))
    draft.extend(torch.tensor([4]))
    draft.accept([1], [3])  # the third draft was never fed
    draft.catch_up(state_of(tables, {1: [5, 6, 7, 8, 2, 3, 4, 1, 0]}))
    assert steps.pop() == {1: (7, [1, 0])}


def test_a_step_without_drafting_invalidates_what_was_drafted_before(tables):
    draft, steps = runner(tables)
    draft.catch_up(state_of(tables, {0: [1, 2]}))
    draft.extend(torch.tensor([3]))
    draft.accept([0], [0])
    draft.accept([0], [0])
    draft.catch_up(state_of(tables, {0: [1, 2, 4, 3]}))
    assert steps.pop() == {0: (2, [4, 3])}


def test_long_prompts_take_several_calls_and_hold_up_nobody(tables):
    draft, steps = runner(tables)
    known = {0: list(range(20)), 1: [1, 2], 2: [3, 4, 5]}
    assert draft.catch_up(state_of(tables, known))[0] == [1, 2]
    assert steps.pop() == {1: (0, [1, 2]), 2: (0, [3, 4, 5]), 0: (0, list(range(11)))}
    assert draft.catch_up(state_of(tables, {0: list(range(20))}))[0] == [0]
    assert steps.pop() == {0: (11, list(range(11, 20)))}


def test_requests_without_room_are_passed_over_until_others_leave(tables):
    draft, steps = runner(tables, num_blocks=4)
    known = {0: list(range(9)), 1: [1, 2]}  # three blocks of four, and one
    assert draft.catch_up(state_of(tables, known))[0] == [1]
    assert draft.catch_up(state_of(tables, {0: known[0]}))[0] == []
    draft.release([1])
    assert draft.catch_up(state_of(tables, {0: known[0]}))[0] == [0]
    draft.release([0])
    assert draft.catch_up(state_of(tables, {0: [7, 7]}))[0] == [0]
    assert steps.pop() == {0: (0, [7, 7])}, "nothing is left of the request before"
    assert draft.forward.pages == {0: 1}


def test_requests_that_may_not_be_drafted_for_are_left_alone(tables):
    draft, steps = runner(tables)
    entries, logits = draft.catch_up(state_of(tables, {0: [1, 2]}, limit=0))
    assert (entries, len(logits), steps) == ([], 0, [])


def test_positions_end_with_the_context(tables):
    draft, steps = runner(tables)
    draft.catch_up(state_of(tables, {0: [1] * 30}, limit=1))
    draft.catch_up(state_of(tables, {0: [1] * 30}, limit=1))
    for token in (2, 3):
        draft.extend(torch.tensor([token]))
    assert steps[-2:] == [{0: (30, [2])}, {0: (31, [3])}]
    draft.extend(torch.tensor([4]))
    assert steps[-1] == {0: (31, [4])}


def test_memory_beside_the_engines():
    """It holds as many full contexts, of 8 pages each, as the engine's cache."""
    facts = SimpleNamespace(attention=[None] * 3)
    draft = SimpleNamespace(config=CONFIG, facts=facts, block_bytes=lambda groups: 100 * len(groups[0].layers))
    full, sliding = KVGroup(layers=(0, 1)), KVGroup(layers=(2, 3), window=4)
    assert kv_memory.blocks_per_request(CONFIG, [full]) == 8
    assert kv_memory.blocks_per_request(CONFIG, [sliding, sliding]) == 12
    assert [bytes_beside_block(draft, groups) for groups in ([full], [full, full], [sliding] * 2)] == [300, 150, 200]
    assert [draft_blocks(draft, [full], blocks) for blocks in (9, 25)] == [9, 25]
    assert [draft_blocks(draft, [full, full], blocks) for blocks in (17, 33)] == [9, 17]
    assert [draft_blocks(draft, [sliding] * 2, blocks) for blocks in (13, 25)] == [9, 17]


def test_memory_that_does_not_hold_one_request_is_refused():
    config = engine_config(max_model_len=32, block_size=4, kv_cache_memory=9 * 400 - 1, draft=CONFIG)
    with pytest.raises(ConfigError, match=r"iB of KV cache, the draft model's included, and the cache has"):
        kv_memory.num_blocks(config, 400, [KVGroup(layers=(0, 1))], MemoryInfo(total=10**6, available=10**6))

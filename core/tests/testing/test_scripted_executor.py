"""The fake must find what is wrong with a plan: each test breaks one promise."""

import msgspec
import pytest

from dovetail.contracts.executor import KVGroup, Progress
from dovetail.messages import NewRow, StepPlan
from dovetail.sampling_params import SamplingParams
from dovetail.testing import (
    PlanError,
    ScriptedExecutor,
    ScriptedFailureError,
    ScriptedModel,
    engine_config,
    engine_request,
    run_until_idle,
    scripted_engine,
)


def row(token_ids, blocks, slot=0, **changes):
    new = NewRow(
        slot=slot,
        request_id=f"r{slot}",
        token_ids=list(token_ids),
        prompt_len=len(token_ids),
        params=SamplingParams(temperature=0.0),
        eos_token_ids=(),
        seed=0,
        block_ids=[list(blocks)],
    )
    return msgspec.structs.replace(new, **changes)


def plan(step=0, rows=(), slots=(0,), computed=(0,), scheduled=(6,), samples=(True,), drafts=None, **changes):
    return StepPlan(
        step=step,
        new_rows=list(rows),
        freed_slots=changes.get("freed", []),
        slots=list(slots),
        num_computed=list(computed),
        num_scheduled=list(scheduled),
        drafts=drafts if drafts is not None else [[] for _ in slots],
        samples=list(samples),
        block_updates=changes.get("updates", []),
    )


PROMPT = [1, 2, 3, 4, 5, 6]
GOOD = plan(rows=[row(PROMPT, [1, 2])])


def executor(**options):
    return ScriptedExecutor(engine_config(), **options)


def test_a_good_plan_passes():
    scripted = executor()
    result = scripted.run(GOOD)
    assert result.token_ids == [[scripted.model.next_token(PROMPT, 6, SamplingParams(temperature=0.0), (), 0)]]
    assert scripted.plans == [GOOD]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (plan(step=1, rows=[row(PROMPT, [1, 2])]), "step 1"),
        (plan(rows=[row(PROMPT, [1])]), "page 1 has no block"),
        (plan(rows=[row(PROMPT, [1, 0])]), "its block was freed"),
        (plan(rows=[row(PROMPT, [1, 5000])]), "does not exist"),
        (plan(rows=[row(PROMPT, [1, 2])], samples=[False]), "`samples` is False"),
        (plan(rows=[row(PROMPT, [1, 2])], computed=[3], scheduled=[3]), "no whole block"),
        (plan(rows=[row(PROMPT, [1, 2])], computed=[4], scheduled=[2]), "another prefix's KV at position 0"),
        (plan(rows=[row(PROMPT, [1, 2])], scheduled=[7]), "0 drafts for 7 of 6"),
        (plan(rows=[row(PROMPT, [1, 2])], scheduled=[7], drafts=[[9]]), "drafts were not proposed"),
        (plan(rows=[row(PROMPT, [1, 2])], computed=[8], scheduled=[1]), "covers the last known token"),
        (plan(rows=[row(PROMPT, [1, 2])], scheduled=[0], samples=[False]), "computes no token"),
        (plan(rows=[row(PROMPT, [1, 2], slot=99)], slots=[99]), "slot 99 does not exist"),
        (plan(rows=[row(PROMPT, [1, 2])] * 2), "given out twice"),
        (plan(rows=[row(PROMPT, [1, 2]), row(PROMPT, [3, 4], slot=1)]), "computes nothing"),
        (plan(), "the free slot 0 computes"),
        (plan(freed=[3]), "freed while free"),
        (plan(rows=[row(PROMPT, [1, 2])], updates=[(4, 0, 0, [3])]), "blocks for the free slot 4"),
        (plan(rows=[row(PROMPT, [1, 2])], updates=[(0, 0, 5, [3])]), "leave a gap"),
        (plan(slots=[0, 0], computed=[0, 0], scheduled=[6, 6], samples=[True, True]), "computes twice"),
        (plan(slots=[0, 1]), "columns differ"),
        (plan(slots=[], computed=[], scheduled=[], samples=[]), "computes nothing"),
        (plan(rows=[row([1] * 60, range(1, 16))], scheduled=[65]), "budget"),
    ],
)
def test_a_bad_plan_is_refused(bad, message):
    with pytest.raises(PlanError, match=message):
        executor().run(bad)


def test_a_block_shared_by_different_prefixes_is_found():
    rows = [row([1, 2, 3, 4], [1]), row([1, 2, 3, 5], [1], slot=1)]
    shared = plan(rows=rows, slots=[0, 1], computed=[0, 0], scheduled=[4, 4], samples=[True, True])
    with pytest.raises(PlanError, match="another prefix"):
        executor().run(shared)


def test_a_block_shared_by_equal_prefixes_is_fine():
    rows = [row([1, 2, 3, 4, 5], [1, 2]), row([1, 2, 3, 4, 6], [1, 3], slot=1)]
    scripted = executor()
    scripted.run(plan(rows=rows[:1], scheduled=[5]))
    scripted.run(plan(step=1, rows=rows[1:], slots=[1], computed=[4], scheduled=[1]))


def test_a_block_taken_away_is_found():
    scripted = executor()
    scripted.run(GOOD)
    thief = plan(step=1, rows=[row([9, 9, 9, 9], [1], slot=1)], slots=[1], scheduled=[4])
    scripted.run(thief)
    with pytest.raises(PlanError, match="another prefix"):
        scripted.run(plan(step=2, computed=[6], scheduled=[1]))


def test_a_request_must_continue_where_it_stopped():
    scripted = executor()
    scripted.run(GOOD)
    with pytest.raises(PlanError, match="continues at 5, not at 6"):
        scripted.run(plan(step=1, computed=[5], scheduled=[2]))


def test_a_page_freed_too_early_is_found_and_one_outside_the_window_is_not_missed():
    groups = (KVGroup(layers=(0,), window=3),)
    scripted = executor(groups=groups)
    scripted.run(GOOD)
    scripted.run(plan(step=1, computed=[6], scheduled=[1], updates=[(0, 0, 0, [0])]))
    with pytest.raises(PlanError, match="page 1 is needed"):
        scripted.run(plan(step=2, computed=[7], scheduled=[1], updates=[(0, 0, 1, [0])]))


def test_it_fails_when_told_to():
    engine, _ = scripted_engine(engine_config(), fail_at=2)
    engine.add(engine_request([1], max_tokens=5))
    engine.step()
    engine.step()
    with pytest.raises(ScriptedFailureError, match="step 2"):
        engine.step()


def test_it_reports_progress_and_closes():
    seen = []

    class Recorder(Progress):
        def update(self, stage, done, total):
            seen.append((stage, done, total))

    scripted = executor(num_blocks=7)
    assert scripted.load(Recorder()).num_blocks == 7
    assert seen == [("load", 1, 1)]
    scripted.close()
    assert scripted.closed


def test_a_delay_slows_every_step():
    engine, _ = scripted_engine(engine_config(), delay=0.02)
    engine.add(engine_request([1], max_tokens=3))
    times = run_until_idle(engine).popitem()[1].times
    assert times.last_token - times.first_token >= 0.04


def test_sampled_requests_depend_on_their_seed_and_greedy_ones_do_not():
    model = ScriptedModel(1000)

    def output(seed, temperature):
        return model.complete(engine_request([1], temperature=temperature, max_tokens=5), 64, seed).token_ids

    assert output(1, 0.0) == output(2, 0.0)
    assert output(1, 1.0) != output(2, 1.0)


def test_a_script_replaces_the_checksum():
    model = ScriptedModel(50, lambda tokens, seed: tokens[-1] + 1)
    engine, _ = scripted_engine(engine_config(), model=model)
    engine.add(engine_request([3], request_id="a", max_tokens=4))
    assert run_until_idle(engine)["a"].token_ids == [4, 5, 6, 7]


def test_work_without_end_is_reported():
    engine, _ = scripted_engine(engine_config())
    engine.add(engine_request([1], max_tokens=30))
    with pytest.raises(AssertionError, match="work is left after 3 steps"):
        run_until_idle(engine, max_steps=3)

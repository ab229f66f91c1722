"""One behaviour per test, on plans that can be checked by hand. Blocks hold 4 tokens."""

import msgspec
import pytest

from dovetail.contracts.executor import ExecutorInfo, KVGroup, Progress
from dovetail.errors import ConfigError
from dovetail.messages import StepResult
from dovetail.scheduler.request import request_seed
from dovetail.scheduler.scheduler import Scheduler
from dovetail.testing import ScriptedExecutor, engine_config, engine_request

FULL = (KVGroup(layers=(0,)),)


class Bench:
    """A scheduler over a scripted executor, one step at a time."""

    def __init__(self, *, num_blocks=100, groups=FULL, num_drafts=0, accuracy=1.0, **config):
        self.config = engine_config(**config)
        self.executor = ScriptedExecutor(
            self.config, num_blocks=num_blocks, groups=groups, num_drafts=num_drafts, draft_accuracy=accuracy
        )
        self.scheduler = Scheduler(self.config, self.executor.load(Progress()))
        self.finished = {}

    def add(self, request_id, prompt, **options):
        self.scheduler.add(engine_request(prompt, request_id=request_id, **options))

    def step(self):
        """One step; the plan, or None."""
        plan = self.scheduler.plan()
        deltas = self.scheduler.commit(plan, self.executor.run(plan)) if plan else self.scheduler.take_aborted()
        self.finished |= {delta.request_id: delta for delta in deltas if delta.finish_reason}
        return plan

    def run(self):
        for _ in range(1000):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError("no progress")


def entered(plan):
    return [row.request_id for row in plan.new_rows]


def test_running_requests_come_before_waiting_ones_within_one_budget():
    bench = Bench(max_num_batched_tokens=10)
    bench.add("a", range(6), max_tokens=5)
    bench.add("b", range(20, 32), max_tokens=5)
    bench.add("c", range(40, 43), max_tokens=5)
    plans = [bench.step() for _ in range(3)]
    assert [plan.num_scheduled for plan in plans] == [[6, 4], [1, 8, 1], [1, 1, 2]]
    assert [plan.num_computed for plan in plans] == [[0, 0], [6, 4, 0], [7, 12, 1]]
    assert [plan.samples for plan in plans] == [[True, False], [True, True, False], [True, True, True]]
    assert [entered(plan) for plan in plans] == [["a", "b"], ["c"], []]


def test_prompts_that_arrive_together_compute_their_prefix_once():
    bench = Bench()
    for i, name in enumerate("abc"):
        bench.add(name, [*range(9), 90 + i], max_tokens=3)
    plan = bench.step()
    assert plan.num_scheduled == [10, 2, 2]
    assert [row.block_ids[0][:2] for row in plan.new_rows] == [plan.new_rows[0].block_ids[0][:2]] * 3
    bench.run()
    assert [bench.finished[name].num_cached_tokens for name in "abc"] == [0, 8, 8]


def test_a_new_row_carries_everything_the_runner_must_know():
    bench = Bench(num_blocks=9)
    bench.add("a", [1, 2, 3, 4, 5], seed=7, eos_token_ids=(9,))
    row = bench.step().new_rows[0]
    assert (row.slot, row.token_ids, row.prompt_len) == (0, [1, 2, 3, 4, 5], 5)
    assert (row.block_ids, row.seed, row.eos_token_ids) == ([[1, 2]], 7, (9,))


def test_later_plans_send_only_appended_blocks():
    bench = Bench()
    bench.add("a", range(6), max_tokens=8)
    plans = [bench.step() for _ in range(4)]
    assert [plan.block_updates for plan in plans] == [[], [], [], [(0, 0, 2, [3])]]
    assert all(not plan.new_rows for plan in plans[1:])


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole():
    bench = Bench(max_model_len=16, max_num_batched_tokens=16, enable_chunked_prefill=False)
    for name in "ab":
        bench.add(name, range(ord(name) % 10, ord(name) % 10 + 9), max_tokens=3)
    first, second = bench.step(), bench.step()
    assert first.num_scheduled == [9]
    assert second.num_scheduled == [1, 9]


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"max-num-batched-tokens is 8.*max-model-len 64.*chunked"):
        Bench(max_num_batched_tokens=8, enable_chunked_prefill=False)
    with pytest.raises(ConfigError, match=r"'lifo'.*fcfs, priority"):
        Bench(scheduling_policy="lifo")


def test_a_freed_slot_is_announced_and_reused_in_the_same_plan():
    bench = Bench(max_num_seqs=1)
    bench.add("a", [1], max_tokens=1)
    bench.add("b", [2], max_tokens=1)
    first, second = bench.step(), bench.step()
    assert (first.freed_slots, entered(first)) == ([], ["a"])
    assert (second.freed_slots, entered(second), second.slots) == ([0], ["b"], [0])


def test_the_tail_is_preempted_when_blocks_run_out_and_resumes_with_its_tokens():
    bench = Bench(num_blocks=5, enable_prefix_caching=False)
    bench.add("a", range(8), max_tokens=6)
    bench.add("b", range(20, 27), max_tokens=6)
    plans = []
    while bench.scheduler.has_work():
        plans.append(bench.step())
    preempted = next(plan for plan in plans if plan.freed_slots)
    assert preempted.slots == [0]
    assert preempted.freed_slots == [1]
    assert entered(preempted) == []
    resumed = plans[plans.index(preempted) + 1 :]
    row = next(row for plan in resumed for row in plan.new_rows)
    assert (row.request_id, row.prompt_len) == ("b", 7)
    assert len(row.token_ids) > 7
    assert bench.finished["b"].num_preemptions == 1
    assert bench.finished["a"].num_preemptions == 0
    assert bench.scheduler.stats().num_preemptions == 1


def test_a_preempted_request_finds_its_own_blocks_again():
    bench = Bench(num_blocks=5)
    bench.add("a", range(8), max_tokens=2)
    bench.add("b", range(20, 27), max_tokens=6)
    plans = []
    while bench.scheduler.has_work():
        plans.append(bench.step())
    again = [plan for plan in plans if "b" in entered(plan)][-1]
    assert bench.finished["b"].num_preemptions == 1
    assert again.num_computed == [4]
    assert bench.finished["b"].num_cached_tokens == 0
    assert bench.scheduler.stats().prefix_hits == 0


def test_a_request_is_admitted_only_if_all_its_known_tokens_fit():
    bench = Bench(num_blocks=6, max_num_batched_tokens=8, max_model_len=20)
    bench.add("a", range(16), max_tokens=1)
    bench.add("b", range(20, 28), max_tokens=1)
    first, second, third = bench.step(), bench.step(), bench.step()
    assert entered(first) == ["a"]
    assert (second.num_scheduled, entered(second)) == ([8], [])
    assert entered(third) == ["b"]
    assert bench.scheduler.stats().num_preemptions == 0


def test_nobody_is_admitted_into_blocks_that_a_preemption_freed():
    bench = Bench(num_blocks=6, scheduling_policy="priority", max_model_len=20)
    bench.add("a", range(8), max_tokens=4)
    bench.add("b", range(20, 29), max_tokens=4, priority=2)
    bench.step()
    bench.add("c", [50], max_tokens=1, priority=1)
    preempting, following = bench.step(), bench.step()
    assert (preempting.freed_slots, entered(preempting)) == ([1], [])
    assert entered(following) == ["c"]


def test_fcfs_ignores_priority_and_the_priority_policy_obeys_it():
    orders = {}
    for policy in ("fcfs", "priority"):
        bench = Bench(max_num_seqs=1, scheduling_policy=policy)
        for name, priority in (("a", 5), ("b", 1), ("c", 1), ("d", 0)):
            bench.add(name, [1], max_tokens=1, priority=priority)
        orders[policy] = [entered(bench.step())[0] for _ in range(4)]
    assert orders == {"fcfs": ["a", "b", "c", "d"], "priority": ["d", "b", "c", "a"]}


def test_the_priority_policy_preempts_the_least_important():
    bench = Bench(num_blocks=7, scheduling_policy="priority", max_model_len=20)
    bench.add("low", range(8), max_tokens=8, priority=9)
    bench.step()
    bench.add("high", range(20, 28), max_tokens=8, priority=1)
    assert [bench.step().slots for _ in range(2)] == [[0, 1], [1, 0]]
    bench.run()
    assert bench.finished["low"].num_preemptions == 1
    assert bench.finished["high"].num_preemptions == 0


def test_prefix_hits_are_reported_and_counted_once():
    bench = Bench()
    bench.add("a", range(10), max_tokens=1)
    bench.run()
    bench.add("b", range(10), max_tokens=1)
    plan = bench.step()
    assert (plan.num_computed, plan.num_scheduled) == ([8], [2])
    assert bench.finished["b"].num_cached_tokens == 8
    stats = bench.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits, stats.prompt_tokens) == (20, 8, 20)


def test_a_hit_leaves_the_last_prompt_token_to_compute():
    bench = Bench()
    bench.add("a", range(8), max_tokens=1)
    bench.run()
    bench.add("b", range(8), max_tokens=1)
    assert bench.step().num_computed == [4]


def test_output_is_cached_too_but_not_its_last_token():
    bench = Bench()
    bench.add("a", range(5), max_tokens=8)
    tokens = list(range(5))
    while bench.scheduler.has_work():
        plan = bench.scheduler.plan()
        result = bench.executor.run(plan)
        tokens += result.token_ids[0]
        bench.scheduler.commit(plan, result)
    assert len(tokens) == 13
    bench.add("b", [*tokens, 1], max_tokens=1)
    assert bench.step().num_computed == [12]


def test_a_page_can_be_hit_as_soon_as_it_is_full():
    bench = Bench()
    bench.add("a", range(5), max_tokens=12)
    tokens = list(range(5))
    while bench.scheduler.has_work():
        plan = bench.scheduler.plan()
        result = bench.executor.run(plan)
        tokens += result.token_ids[0]
        bench.scheduler.commit(plan, result)
        kv = bench.scheduler.kv
        assert kv.find_prefix(kv.new_table(None, tokens), len(tokens)) == (len(tokens) - 1) // 4
    assert len(tokens) == 17


def test_rejected_drafts_roll_back_and_are_never_cached():
    bench = Bench(num_drafts=3, accuracy=0.0, max_num_batched_tokens=20)
    bench.add("a", range(6), max_tokens=4)
    plans = [bench.step() for _ in range(3)]
    assert [plan.num_scheduled for plan in plans] == [[6], [3], [2]]
    assert [plan.num_computed for plan in plans] == [[0], [6], [7]]
    assert [len(plan.drafts[0]) for plan in plans] == [0, 2, 1]
    bench.run()
    stats = bench.scheduler.stats()
    assert (stats.drafts_proposed, stats.drafts_accepted) == (3, 0)
    drafts = plans[1].drafts[0]
    assert bench.scheduler.kv.find_prefix(
        bench.scheduler.kv.new_table(None, [*range(6), *drafts, 1]), 9
    ) == 1


def test_accepted_drafts_save_steps():
    bench = Bench(num_drafts=3, accuracy=1.0)
    bench.add("a", range(6), max_tokens=9)
    plans = [bench.step() for _ in range(3)]
    assert [plan.num_scheduled[0] for plan in plans] == [6, 4, 4]
    assert bench.finished["a"].finish_reason == "length"
    assert bench.scheduler.stats().drafts_accepted == 6


def test_drafts_are_trimmed_to_the_budget():
    bench = Bench(num_drafts=4, max_num_batched_tokens=3)
    bench.add("a", [1], max_tokens=20)
    bench.step()
    plan = bench.step()
    assert (plan.num_scheduled, [len(drafts) for drafts in plan.drafts]) == ([3], [2])


def test_drafts_starve_nobody_and_live_for_one_step():
    """The runner keeps what drafts were drawn from for one step alone; later they would be verified wrongly."""
    bench = Bench(num_drafts=3, max_num_batched_tokens=4)
    bench.add("a", [1], max_tokens=20)
    bench.add("b", [2], max_tokens=20)
    assert bench.step().slots == [0, 1]
    plan = bench.step()
    assert (plan.slots, plan.num_scheduled, [len(drafts) for drafts in plan.drafts]) == ([0, 1], [3, 1], [2, 0])
    bench.scheduler.abort(["a"])
    plan = bench.step()
    assert (plan.slots, plan.num_scheduled) == ([1], [4]), "b verifies what was drafted after that step"


def test_drafts_are_dropped_before_anyone_is_preempted():
    bench = Bench(num_blocks=3, num_drafts=4, max_model_len=9)
    bench.add("a", range(4), max_tokens=4)
    bench.add("b", range(20, 23), max_tokens=2)
    first, second = bench.step(), bench.step()
    assert first.slots == [0, 1]
    assert len(second.drafts[0]) == 0
    bench.run()
    assert bench.finished["a"].finish_reason == bench.finished["b"].finish_reason == "length"


def result_for(plan, token_ids, drafts=()):
    return StepResult(
        step=plan.step, token_ids=[token_ids], drafts=[list(drafts)], logprobs=[None], prompt_logprobs=[None]
    )


def test_tokens_after_a_stop_in_an_accepted_run_are_dropped():
    scheduler = Bench().scheduler
    scheduler.add(engine_request([1, 2], stop_token_ids=(7,), max_tokens=10, logprobs=0))
    plan = scheduler.plan()
    scheduler.commit(plan, result_for(plan, [5], drafts=[6, 7, 8]))
    plan = scheduler.plan()
    assert plan.drafts == [[6, 7, 8]]
    (delta,) = scheduler.commit(plan, result_for(plan, [6, 7, 8, 9]))
    assert (delta.new_token_ids, delta.finish_reason, delta.stop_reason) == ([6, 7], "stop", 7)
    assert scheduler.stats().generation_tokens == 3
    assert scheduler.kv.pool.usage == 0


@pytest.mark.parametrize(
    ("options", "tokens", "finish_reason", "stop_reason"),
    [
        ({"eos_token_ids": (7,)}, [5, 7], "stop", None),
        ({"eos_token_ids": (7,), "ignore_eos": True, "max_tokens": 3}, [5, 7, 6], "length", None),
        ({"stop_token_ids": (7,)}, [5, 7], "stop", 7),
        ({"eos_token_ids": (7,), "stop_token_ids": (7,)}, [5, 7], "stop", None),
        ({"eos_token_ids": (7,), "stop_token_ids": (7,), "ignore_eos": True}, [5, 7], "stop", 7),
        ({"eos_token_ids": (7,), "min_tokens": 2, "max_tokens": 9}, [5, 7, 6, 5, 7], "stop", None),
        ({"eos_token_ids": (7,), "max_tokens": 2}, [5, 7], "stop", None),
        ({"max_tokens": 1}, [5], "length", None),
        ({"max_tokens": None}, [5, 7, 6, 5, 7, 6], "length", None),
        ({"max_tokens": 50}, [5, 7, 6, 5, 7, 6], "length", None),
    ],
)
def test_what_ends_a_request(options, tokens, finish_reason, stop_reason):
    scheduler = Bench(max_model_len=8).scheduler
    scheduler.add(engine_request([1, 2], **options))
    got = []
    for step in range(20):
        plan = scheduler.plan()
        (delta,) = scheduler.commit(plan, result_for(plan, [(5, 7, 6)[step % 3]]))
        got += delta.new_token_ids
        if delta.finish_reason:
            break
    assert (got, delta.finish_reason, delta.stop_reason) == (tokens, finish_reason, stop_reason)
    assert delta.times.arrival == 0.0
    assert not scheduler.has_work()


def test_aborting_a_waiting_request():
    bench = Bench(max_num_seqs=1)
    bench.add("a", [1], max_tokens=2)
    bench.add("b", [2], max_tokens=2)
    bench.add("c", [3], max_tokens=2)
    bench.step()
    bench.scheduler.abort(["b", "nobody"])
    assert bench.scheduler.stats().num_waiting == 1
    bench.step()
    assert bench.finished["b"].finish_reason == "abort"
    assert bench.finished["b"].times.first_scheduled == 0.0
    assert entered(bench.step()) == ["c"]


def test_aborting_a_running_request_frees_it_at_once():
    bench = Bench()
    bench.add("a", range(10), max_tokens=20)
    bench.step()
    assert bench.scheduler.kv.pool.usage > 0
    bench.scheduler.abort(["a"])
    bench.scheduler.abort(["a"])
    assert bench.scheduler.kv.pool.usage == 0
    assert bench.scheduler.has_work()
    assert bench.step() is None
    assert bench.finished["a"].new_token_ids == []
    assert not bench.scheduler.has_work()
    bench.add("b", [1], max_tokens=1)
    assert bench.step().freed_slots == [0]


def test_aborting_a_preempted_request():
    bench = Bench(num_blocks=5)
    bench.add("a", range(8), max_tokens=6)
    bench.add("b", range(20, 27), max_tokens=6)
    while bench.scheduler.stats().num_preemptions == 0:
        bench.step()
    bench.scheduler.abort(["b"])
    bench.run()
    assert (bench.finished["b"].finish_reason, bench.finished["b"].num_preemptions) == ("abort", 1)
    assert bench.scheduler.kv.pool.usage == 0


def test_aborting_between_plan_and_commit_drops_the_result():
    bench = Bench()
    bench.add("a", [1], max_tokens=5)
    bench.add("b", [2], max_tokens=5)
    plan = bench.scheduler.plan()
    bench.scheduler.abort(["a"])
    deltas = bench.scheduler.commit(plan, bench.executor.run(plan))
    assert [(delta.request_id, delta.finish_reason) for delta in deltas] == [("a", "abort"), ("b", None)]


def test_a_result_from_before_a_preemption_is_stale_even_if_the_request_runs_again():
    bench = Bench(num_blocks=4, max_num_batched_tokens=1)
    bench.add("first", range(7), max_tokens=8)
    bench.add("second", range(20, 22), max_tokens=8)
    scheduler, in_flight, tokens = bench.scheduler, [], []

    def plan():
        planned = scheduler.plan()
        in_flight.append((planned, bench.executor.run(planned)))
        return planned

    def commit():
        for delta in scheduler.commit(*in_flight.pop(0)):
            if delta.request_id == "second":
                tokens.extend(delta.new_token_ids)

    while not plan().freed_slots:
        if len(in_flight) == 2:
            commit()
    assert [planned.slots for planned, _ in in_flight] == [[1], [0]]
    scheduler.abort(["first"])
    assert entered(plan()) == ["second"]
    while scheduler.has_work():
        commit()
        while scheduler.has_work() and not in_flight:
            plan()
    expected = bench.executor.model.complete(engine_request(range(20, 22), max_tokens=8), 64)
    assert tokens == expected.token_ids


def test_a_request_that_the_executor_gives_up_ends_alone():
    bench = Bench(num_blocks=11)
    bench.add("a", [1, 2], max_tokens=5)
    bench.add("b", [3, 4], max_tokens=5)
    plan = bench.scheduler.plan()
    result = msgspec.structs.replace(bench.executor.run(plan), errors={0: "its logits are NaN"})
    failed, alive = bench.scheduler.commit(plan, result)
    assert (failed.request_id, failed.finish_reason, failed.error) == ("a", "error", "its logits are NaN")
    assert (failed.new_token_ids, failed.times.first_token) == ([], 0.0)
    assert (alive.request_id, alive.finish_reason) == ("b", None)
    following = bench.step()
    assert (following.freed_slots, following.slots) == ([0], [1])
    bench.run()
    assert bench.scheduler.kv.pool.usage == 0


def test_pages_of_a_request_that_failed_are_not_found_again():
    bench = Bench()
    bench.add("a", range(9), max_tokens=3)
    plan = bench.scheduler.plan()
    result = msgspec.structs.replace(bench.executor.run(plan), token_ids=[[]], errors={0: "its logits are NaN"})
    bench.scheduler.commit(plan, result)
    bench.add("b", range(9), max_tokens=3)
    assert bench.step().num_scheduled == [9]


def test_prompt_logprobs_are_collected_over_chunks_and_skip_the_cache():
    bench = Bench(max_num_batched_tokens=4)
    bench.add("a", range(10), max_tokens=1)
    bench.run()
    bench.add("b", range(10), max_tokens=1, prompt_logprobs=0)
    bench.run()
    entries = bench.finished["b"].prompt_logprobs
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:]] == list(range(1, 10))
    assert bench.finished["b"].num_cached_tokens == 0
    assert bench.scheduler.stats().prefix_queries == 10


def test_logprobs_come_with_their_tokens():
    bench = Bench(num_drafts=2)
    bench.add("a", [1], max_tokens=3, logprobs=0)
    plan = bench.scheduler.plan()
    (delta,) = bench.scheduler.commit(plan, bench.executor.run(plan))
    assert [entry.token_id for entry in delta.logprobs] == delta.new_token_ids


def test_pages_outside_the_window_are_freed_while_the_request_runs():
    bench = Bench(groups=(KVGroup(layers=(0,), window=5),), max_num_batched_tokens=4)
    bench.add("a", range(30), max_tokens=20)
    most = 0
    while bench.scheduler.has_work():
        bench.step()
        pool = bench.scheduler.kv.pool
        most = max(most, pool.num_blocks - 1 - pool.num_free)
    assert most <= bench.scheduler.kv.most_blocks(50) == 3


def test_seeds_come_from_the_request_or_from_the_engine_and_the_arrival():
    assert request_seed(5, 0, 0) == 5
    assert request_seed(-1, 0, 0) == -1
    assert request_seed(2**64 - 2, 0, 0) == -2
    drawn = [request_seed(None, engine, number) for engine in range(3) for number in range(3)]
    assert len(set(drawn)) == 9
    assert all(-(2**63) <= seed < 2**63 for seed in drawn)


def test_stats_show_running_and_waiting():
    bench = Bench(max_num_seqs=2, num_blocks=11)
    for name in "abc":
        bench.add(name, range(8), max_tokens=4)
    bench.step()
    stats = bench.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.steps, stats.step_tokens) == (2, 1, 1, 12)
    assert stats.kv_usage == 0.3


def test_one_group_per_attention_kind_gets_its_own_table():
    groups = (KVGroup(layers=(0,)), KVGroup(layers=(1,), window=4))
    bench = Bench(groups=groups, max_num_batched_tokens=8)
    bench.add("a", range(16), max_tokens=2)
    first, second = bench.step(), bench.step()
    assert first.new_rows[0].block_ids == [[1, 2], [3, 4]]
    assert second.block_updates == [(0, 1, 0, [0]), (0, 0, 2, [5, 6]), (0, 1, 2, [7, 8])]


def test_the_pool_may_be_one_block():
    info = ExecutorInfo(num_blocks=2, block_size=4, groups=FULL)
    scheduler = Scheduler(engine_config(), info)
    scheduler.add(engine_request([1, 2], max_tokens=2))
    for _ in range(2):
        plan = scheduler.plan()
        deltas = scheduler.commit(plan, result_for(plan, [3]))
    assert deltas[0].finish_reason == "length"

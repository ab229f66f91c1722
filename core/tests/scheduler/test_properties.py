"""Whatever the load: outputs equal the brute force, every plan keeps its promises, and nothing leaks."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.contracts.executor import KVGroup, Progress
from dovetail.scheduler.request import request_seed
from dovetail.scheduler.scheduler import Scheduler
from dovetail.testing import Completion, ScriptedExecutor, engine_config, engine_request, scripted_engine

MAX_LEN = 32


@dataclass(frozen=True)
class Arrival:
    """One request, the step at which it arrives, and the step at which it is aborted."""

    step: int
    abort: int | None
    prompt: list[int]
    params: dict
    eos: tuple[int, ...]
    priority: int
    salt: str | None


# Few distinct prefixes, so that prompts share blocks.
PROMPTS = st.builds(
    lambda prefix, length, tail: ([prefix] * length + tail)[: MAX_LEN - 1],
    st.integers(0, 1),
    st.integers(0, 24),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
)
PARAMS = st.fixed_dictionaries(
    {"max_tokens": st.one_of(st.none(), st.integers(1, 12)), "temperature": st.sampled_from([0.0, 0.0, 1.0])},
    optional={
        "stop_token_ids": st.just((1,)),
        "ignore_eos": st.booleans(),
        "prompt_logprobs": st.just(0),
        "logprobs": st.just(1),
        "min_tokens": st.just(1),
    },
)
ARRIVALS = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 12),
        abort=st.one_of(st.none(), st.none(), st.integers(0, 25)),
        prompt=PROMPTS,
        params=PARAMS,
        eos=st.sampled_from([(), (2,), (2, 3)]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, "other"]),
    ),
    min_size=1,
    max_size=8,
)
WINDOWS = st.sampled_from([(None,), (None,), (7,), (None, 5), (3, None, 11), (5, 5)])


def tightest_pool(windows, block_size, budget):
    """Blocks with which one full context just fits."""
    scheduler = Scheduler(
        engine_config(max_model_len=MAX_LEN, max_num_batched_tokens=budget, block_size=block_size),
        ScriptedExecutor(engine_config(block_size=block_size), groups=groups_of(windows)).load(Progress()),
    )
    return scheduler.kv.most_blocks(MAX_LEN - 1) + 1


def groups_of(windows):
    return tuple(KVGroup(layers=(layer,), window=window) for layer, window in enumerate(windows))


def check(arrivals, completions, aborted, executor, config):
    """Every request got what the brute force says; an aborted one got a prefix of it."""
    for number, (request, arrival) in enumerate(arrivals):
        seed = request_seed(request.params.seed, config.seed, number)
        expected = executor.model.complete(request, MAX_LEN, seed)
        got = completions[request.request_id]
        if got.finish_reason == "abort":
            assert request.request_id in aborted
            assert got.token_ids == expected.token_ids[: len(got.token_ids)]
            continue
        assert got.token_ids == expected.token_ids
        assert (got.finish_reason, got.stop_reason) == (expected.finish_reason, expected.stop_reason)
        assert got.num_cached_tokens < len(arrival.prompt)
        assert got.times.last_token >= got.times.first_token >= got.times.first_scheduled > 0
        if "logprobs" in arrival.params:
            assert [entry.token_id for entry in got.logprobs] == got.token_ids
        if "prompt_logprobs" in arrival.params:
            assert got.num_cached_tokens == 0
            assert got.prompt_logprobs[0] is None
            assert [entry.token_id for entry in got.prompt_logprobs[1:]] == arrival.prompt[1:]
        else:
            assert got.prompt_logprobs is None


@settings(max_examples=300, deadline=None)
@given(
    arrivals=ARRIVALS,
    windows=WINDOWS,
    block_size=st.integers(1, 5),
    budget=st.integers(1, 40),
    extra_blocks=st.sampled_from([0, 1, 2, 3, 6, 12]),
    num_drafts=st.sampled_from([0, 0, 1, 4]),
    accuracy=st.sampled_from([0.0, 0.5, 1.0]),
    policy=st.sampled_from(["fcfs", "priority"]),
    caching=st.booleans(),
    chunked=st.booleans(),
    slots=st.integers(1, 4),
    ahead=st.booleans(),
)
def test_any_load_gives_the_brute_force_output_and_leaks_nothing(
    arrivals, windows, block_size, budget, extra_blocks, num_drafts, accuracy, policy, caching, chunked, slots, ahead
):
    budget = budget if chunked else max(budget, MAX_LEN)
    config = engine_config(
        vocab_size=7,
        max_model_len=MAX_LEN,
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        block_size=block_size,
        scheduling_policy=policy,
        enable_prefix_caching=caching,
        enable_chunked_prefill=chunked,
        async_scheduling=ahead and not num_drafts,
    )
    engine, executor = scripted_engine(
        config,
        num_blocks=tightest_pool(windows, block_size, budget) + extra_blocks,
        groups=groups_of(windows),
        num_drafts=num_drafts,
        draft_accuracy=accuracy,
    )
    live, added, aborted, completions = sorted(arrivals, key=lambda a: a.step), [], set(), {}
    for step in range(5000):
        while live and live[0].step <= step:
            arrival = live.pop(0)
            request = engine_request(
                arrival.prompt,
                eos_token_ids=arrival.eos,
                priority=arrival.priority,
                cache_salt=arrival.salt,
                **arrival.params,
            )
            added.append((request, arrival))
            engine.add(request)
        gone = [request.request_id for request, arrival in added if arrival.abort == step]
        engine.abort(gone)
        aborted.update(gone)
        if not live and not engine.has_work():
            break
        for delta in engine.step():
            completions.setdefault(delta.request_id, Completion()).extend(delta)
    assert not engine.has_work()
    check(added, completions, aborted, executor, config)
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0.0)
    first_tokens = [request for request, _ in added if completions[request.request_id].token_ids]
    assert stats.prompt_tokens == sum(len(request.prompt_token_ids) for request in first_tokens)
    assert stats.generation_tokens == sum(len(completion.token_ids) for completion in completions.values())
    assert stats.drafts_accepted <= stats.drafts_proposed
    assert stats.step_tokens == sum(plan.total_tokens for plan in executor.plans)
    assert stats.num_preemptions == sum(completion.num_preemptions for completion in completions.values())


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=6),
    windows=WINDOWS,
    budget=st.integers(1, 20),
    extra_blocks=st.integers(0, 8),
    num_drafts=st.sampled_from([0, 2]),
    aborts=st.dictionaries(st.integers(0, 5), st.integers(0, 12), max_size=2),
    depth=st.integers(2, 4),
    ahead=st.booleans(),
)
def test_planning_ahead_of_results_changes_no_output(
    prompts, windows, budget, extra_blocks, num_drafts, aborts, depth, ahead
):
    """Up to ``depth`` plans are made before the first is committed: the ledger tells computed from in flight."""
    config = engine_config(
        vocab_size=7,
        max_model_len=MAX_LEN,
        max_num_seqs=3,
        max_num_batched_tokens=budget,
        async_scheduling=ahead and not num_drafts,
    )
    executor = ScriptedExecutor(
        config,
        num_blocks=tightest_pool(windows, config.block_size, budget) + extra_blocks,
        groups=groups_of(windows),
        num_drafts=num_drafts,
        draft_accuracy=0.5,
    )
    scheduler = Scheduler(config, executor.load(Progress()))
    requests = [engine_request(prompt, max_tokens=8) for prompt in prompts]
    for request in requests:
        scheduler.add(request)
    completions, in_flight = {}, []
    for step in range(5000):
        scheduler.abort(requests[i].request_id for i, when in aborts.items() if when == step and i < len(requests))
        plan = scheduler.plan()
        if plan is not None:
            in_flight.append((plan, executor.run(plan)))
        if len(in_flight) >= depth or (plan is None and in_flight):
            deltas = scheduler.commit(*in_flight.pop(0))
        else:
            deltas = scheduler.take_aborted()
        for delta in deltas:
            completions.setdefault(delta.request_id, Completion()).extend(delta)
        if not scheduler.has_work() and not in_flight:
            break
    assert not scheduler.has_work()
    for request in requests:
        got, expected = completions[request.request_id], executor.model.complete(request, MAX_LEN)
        complete = got.finish_reason != "abort"
        assert got.token_ids == expected.token_ids[: None if complete else len(got.token_ids)]
    assert scheduler.kv.pool.num_free == scheduler.kv.pool.num_blocks - 1

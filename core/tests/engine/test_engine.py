import pytest

from dovetail.errors import ContextLengthError, RequestError
from dovetail.testing import engine_config, engine_request, run_until_idle, scripted_engine


def engine(**config):
    executor = {key: config.pop(key) for key in ("num_blocks", "fail_at") if key in config}
    return scripted_engine(engine_config(**config), **executor)


def test_batched_outputs_equal_brute_force():
    batched, executor = engine(max_num_batched_tokens=13)
    requests = [engine_request(range(i, 2 * i + 1), max_tokens=10) for i in range(20)]
    for request in requests:
        batched.add(request)
    completions = run_until_idle(batched)
    for request in requests:
        expected = executor.model.complete(request, 64)
        assert completions[request.request_id].token_ids == expected.token_ids
    assert batched.stats().kv_usage == 0.0


def test_an_idle_engine_has_nothing_to_say():
    idle, executor = engine()
    assert not idle.has_work()
    assert idle.step() == []
    assert executor.plans == []


def test_abort_is_idempotent_and_reported_once():
    busy, _ = engine()
    busy.add(engine_request([1], request_id="a"))
    busy.step()
    busy.abort(["a", "unknown"])
    busy.abort(["a"])
    (delta,) = busy.step()
    assert (delta.request_id, delta.finish_reason, delta.new_token_ids) == ("a", "abort", [])
    assert busy.step() == []
    assert not busy.has_work()


def test_an_id_may_be_used_again_after_its_request_ended():
    reused, _ = engine()
    reused.add(engine_request([1], request_id="a", max_tokens=1))
    with pytest.raises(RequestError, match="'a' is in use") as refused:
        reused.add(engine_request([2], request_id="a"))
    assert refused.value.param == "request_id"
    run_until_idle(reused)
    reused.add(engine_request([2], request_id="a", max_tokens=1))
    assert run_until_idle(reused)["a"].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "params", "message", "param"),
    [
        ([], {}, "prompt is empty", "prompt"),
        ([1, 100], {}, "prompt contains token 100; this model's tokens are 0 to 99", "prompt"),
        ([1, 2.0], {}, "prompt contains 2.0, which is no integer; this model's tokens are 0 to 99", "prompt"),
        ([1, None], {}, "prompt contains None, which is no integer; this model's tokens are 0 to 99", "prompt"),
        ([-1], {}, "prompt contains token -1", "prompt"),
        ([1], {"stop_token_ids": (100,)}, "stop_token_ids contains token 100", "stop_token_ids"),
        ([1], {"allowed_token_ids": (5, 100)}, "allowed_token_ids contains token 100", "allowed_token_ids"),
        ([1], {"logit_bias": {-3: 1.0}}, "logit_bias contains token -3", "logit_bias"),
        ([1], {"max_tokens": None, "min_tokens": 64}, "min_tokens is 64, .* leaves room for 63", "min_tokens"),
        ([1], {"max_tokens": None, "min_tokens": 2**63 - 1}, "min_tokens is 9223372036854775807", "min_tokens"),
    ],
)
def test_requests_that_no_step_could_compute_are_refused(prompt, params, message, param):
    strict, _ = engine()
    with pytest.raises(RequestError, match=message) as refused:
        strict.add(engine_request(prompt, **params))
    assert refused.value.param == param
    assert not strict.has_work()


def test_a_prompt_without_room_for_output_names_both_sizes():
    strict, _ = engine(max_model_len=8)
    with pytest.raises(ContextLengthError) as refused:
        strict.add(engine_request([1] * 8, max_tokens=5))
    assert str(refused.value).startswith(
        "This model's maximum context length is 8 tokens. However, you requested 13 tokens "
        "(8 in the prompt, 5 for the output)."
    )
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    strict.add(engine_request([1] * 7, max_tokens=5, request_id="a"))
    completion = run_until_idle(strict)["a"]
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


def test_a_sequence_larger_than_the_cache_is_refused_with_the_remedy():
    small, _ = engine(num_blocks=5)
    with pytest.raises(RequestError, match=r"18 tokens .* need 5 KV blocks, and the cache has 4.*--kv-cache-memory"):
        small.add(engine_request([1] * 8, max_tokens=10))
    small.add(engine_request([1] * 8, max_tokens=9, request_id="a"))
    assert len(run_until_idle(small)["a"].token_ids) == 9


def test_an_executor_failure_is_not_swallowed():
    failing, _ = engine(fail_at=1)
    failing.add(engine_request([1], max_tokens=3))
    failing.step()
    with pytest.raises(RuntimeError, match="told to fail"):
        failing.step()


def test_close_closes_the_executor():
    closing, executor = engine()
    closing.close()
    closing.close()
    assert executor.closed


def test_times_are_in_order_and_carry_the_arrival():
    timed, _ = engine()
    timed.add(engine_request([1], request_id="a", max_tokens=3))
    times = run_until_idle(timed)["a"].times
    assert times.arrival == 0.0
    assert 0 < times.first_scheduled <= times.first_token <= times.last_token

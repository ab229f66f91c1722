"""OutputProcessor: fan-out, deltas, stop strings, log-probabilities, and endings."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.engine.outputs import Logprob
from dovetail.engine.processor import OutputProcessor
from dovetail.errors import ContextLengthError, RequestError
from dovetail.messages import RequestOutputDelta, RequestTimes, TokenLogprobs
from dovetail.sampling_params import SamplingParams

EOS = 2


@pytest.fixture
def processor(tokenizer):
    return OutputProcessor(tokenizer, (EOS,), tokenizer.vocab_size, 100)


def start(processor, prompt=(5, 6), request_id="r", **params):
    return processor.add(request_id, list(prompt), SamplingParams(**{"max_tokens": None, **params}))


def delta(tokens, finish=None, request_id="r", **fields):
    return RequestOutputDelta(request_id=request_id, new_token_ids=list(tokens), finish_reason=finish, **fields)


def run(processor, ids, sizes=(1,), finish="length"):
    """Feed ids in chunks, the finish reason with the last; returns the updates until the request is gone."""
    updates, position, turn = [], 0, 0
    while position < len(ids):
        size = sizes[turn % len(sizes)]
        last = position + size >= len(ids)
        update = processor.process(delta(ids[position : position + size], finish if last else None))
        position, turn = position + size, turn + 1
        if update is None:
            break
        updates.append(update)
    return updates


def test_one_request_becomes_one_engine_request(processor):
    (request,) = processor.add(
        "r", [5, 6], SamplingParams(seed=3, stop=("x",)), prompt="hi", priority=2, arrival_time=1.5, cache_salt="s"
    )
    assert request.request_id == "r"
    assert request.prompt_token_ids == [5, 6]
    assert request.eos_token_ids == (EOS,)
    assert (request.priority, request.arrival_time, request.cache_salt) == (2, 1.5, "s")
    assert (request.params.n, request.params.seed, request.params.stop) == (1, 3, ())
    output = processor.output("r")
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("hi", [5, 6], False)


def test_n_requests_have_seeds_in_a_row_and_share_prompt_logprobs(processor):
    requests = start(processor, n=3, seed=7, prompt_logprobs=1)
    assert len({request.request_id for request in requests}) == 3
    assert [request.params.seed for request in requests] == [7, 8, 9]
    assert [request.params.n for request in requests] == [1, 1, 1]
    assert [request.params.prompt_logprobs for request in requests] == [1, None, None]
    assert [request.params.seed for request in start(processor, request_id="s", n=2)] == [None, None]
    largest = start(processor, request_id="t", n=3, seed=2**64 - 2)
    assert [request.params.seed for request in largest] == [2**64 - 2, 2**64 - 1, 0]


def test_completions_are_gathered_by_index(processor, tokenizer):
    first, second = start(processor, n=2)
    wolf, girl = (tokenizer.encode(text, False) for text in ("wolf", "girl"))
    update = processor.process(delta(girl, "length", second.request_id, num_cached_tokens=8))
    assert update.output.num_cached_tokens == 0, "the first completion computed the prompt"
    assert (update.delta.index, update.delta.text, update.output.finished) == (1, "girl", False)
    update = processor.process(delta(wolf, "stop", first.request_id, num_cached_tokens=4))
    assert update.output.finished
    assert update.output.num_cached_tokens == 4
    assert [completion.index for completion in update.output.outputs] == [0, 1]
    assert update.output.outputs[1].text == "girl"
    assert [completion.finish_reason for completion in update.output.outputs] == ["stop", "length"]
    assert len(processor) == 0


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_deltas_add_up_to_the_output(tokenizer, data):
    processor = OutputProcessor(tokenizer, (EOS,), tokenizer.vocab_size, 100)
    ids = data.draw(st.lists(st.integers(3, tokenizer.vocab_size - 1), min_size=1, max_size=20))
    start(processor, stop=data.draw(st.sampled_from([(), ("e", "th"), ("\ufffd",)])))
    updates = run(processor, ids, data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    completion = updates[-1].output.outputs[0]
    assert "".join(update.delta.text for update in updates) == completion.text
    assert [token for update in updates for token in update.delta.token_ids] == completion.token_ids
    assert updates[-1].delta.finish_reason == completion.finish_reason is not None
    if completion.stop_reason is None:
        assert completion.token_ids == ids
        assert completion.text == tokenizer.decode(ids)
    assert updates[-1].output.finished
    assert len(processor) == 0


def test_the_state_is_the_same_object_every_time(processor):
    start(processor)
    output = processor.output("r")
    assert all(update.output is output for update in run(processor, [10, 11, 12]))


def test_a_split_character_arrives_whole(processor, tokenizer):
    start(processor)
    ids = tokenizer.encode("a🙂", False)
    texts = [update.delta.text for update in run(processor, ids)]
    assert texts[0] == "a"
    assert [text for text in texts if text] == ["a", "🙂"]


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (50,)])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_are_cut(processor, tokenizer, sizes, include):
    ids = tokenizer.encode("the wolf said hello to the girl", False)
    start(processor, stop=("lf s", "nowhere"), include_stop_str_in_output=include)
    updates = run(processor, ids, sizes)
    completion = updates[-1].output.outputs[0]
    assert completion.text == ("the wolf s" if include else "the wo")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "lf s")
    completed = tokenizer.decode(completion.token_ids)
    assert "lf s" in completed
    assert "lf s" not in tokenizer.decode(completion.token_ids[:-1])
    if sizes != (50,):
        assert updates[-1].abort == ["r"]
    assert len(processor) == 0


def test_an_engine_that_ended_by_itself_is_not_aborted(processor, tokenizer):
    start(processor, stop=("wolf",))
    (update,) = run(processor, tokenizer.encode("the wolf said", False), (50,))
    assert update.abort == []
    assert (update.delta.finish_reason, update.delta.stop_reason) == ("stop", "wolf")


def test_deltas_after_a_stop_string_are_ignored(processor, tokenizer):
    start(processor, stop=("wolf",))
    run(processor, tokenizer.encode("the wolf", False))
    assert processor.process(delta([], "abort")) is None


def test_text_that_might_begin_a_stop_string_is_held_and_released(processor, tokenizer):
    start(processor, stop=("wolves",))
    ids = tokenizer.encode("a wol", False)
    updates = run(processor, ids)
    assert not any("w" in update.delta.text for update in updates[:-1])
    assert updates[-1].output.outputs[0].text == "a wol"


def test_stop_strings_wait_for_min_tokens(processor, tokenizer):
    ids = tokenizer.encode("a b a b a b", False)
    bs = [i for i, token in enumerate(ids) if "b" in tokenizer.token_text(token)]
    start(processor, stop=("b",), min_tokens=bs[1] + 1)
    completion = run(processor, ids)[-1].output.outputs[0]
    assert len(completion.token_ids) == bs[1] + 1
    assert completion.text == "a b a "


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_the_token_that_stopped_the_engine_is_text_only_on_demand(processor, tokenizer, stop, include):
    ids = tokenizer.encode("the wolf", False)
    start(processor, stop=stop, stop_token_ids=[ids[-1]], include_stop_str_in_output=include)
    update = run(processor, ids, (2, 50), finish="stop")[-1]
    completion = update.output.outputs[0]
    assert completion.token_ids == ids
    assert completion.text == tokenizer.decode(ids if include else ids[:-1])


@pytest.mark.parametrize(("skip", "text"), [(True, "a"), (False, "a<|user|>")])
def test_special_tokens_are_skipped_or_kept(processor, tokenizer, skip, text):
    start(processor, skip_special_tokens=skip)
    ids = [*tokenizer.encode("a", False), tokenizer.token_to_id("<|user|>"), EOS]
    assert run(processor, ids, finish="stop")[-1].output.outputs[0].text == text


def test_without_detokenization_there_are_only_tokens(processor):
    start(processor, detokenize=False)
    completion = run(processor, [10, 11, EOS], finish="stop")[-1].output.outputs[0]
    assert (completion.text, completion.token_ids) == ("", [10, 11, EOS])
    with pytest.raises(RequestError, match="detokenize") as caught:
        start(processor, detokenize=False, stop=("x",))
    assert caught.value.param == "stop"


def test_logprobs_have_the_chosen_token_first_and_text(processor, tokenizer):
    start(processor, logprobs=2, prompt_logprobs=1)
    wolf, half = tokenizer.encode("w", False)[0], tokenizer.encode("🙂", False)[0]
    entries = [
        TokenLogprobs(half, -3.0, 9, [wolf, EOS], [-0.5, -1.0]),
        TokenLogprobs(wolf, -0.1, 1, [EOS, wolf], [-0.1, -0.1]),
    ]
    prompt = [None, TokenLogprobs(6, -2.0, 4, [EOS], [-0.2])]
    update = processor.process(delta([half, wolf], logprobs=entries, prompt_logprobs=prompt))
    first, second = update.delta.logprobs
    assert list(first.items()) == [
        (half, Logprob(-3.0, 9, "\ufffd")),
        (wolf, Logprob(-0.5, 1, "w")),
        (EOS, Logprob(-1.0, 2, "</s>")),
    ]
    assert list(second) == [wolf, EOS]
    assert second[wolf].rank == 1, "its own rank, though an equal one is listed before it"
    assert update.output.prompt_logprobs[0] is None
    assert list(update.output.prompt_logprobs[1]) == [6, EOS]
    processor.process(delta([wolf], "length", logprobs=entries[1:]))
    assert len(update.output.outputs[0].logprobs) == 3


def test_logprobs_end_with_the_stop_string(processor, tokenizer):
    ids = tokenizer.encode("the wolf said", False)
    entries = [TokenLogprobs(token, -1.0, 1, [], []) for token in ids]
    start(processor, logprobs=0, stop=("w",))
    update = processor.process(delta(ids, logprobs=entries))
    assert len(update.delta.logprobs) == len(update.delta.token_ids) < len(ids)


def test_without_the_parameter_there_are_no_logprobs(processor):
    start(processor)
    update = processor.process(delta([10], "length", logprobs=[TokenLogprobs(10, -1.0, 1, [], [])]))
    assert update.delta.logprobs is None
    assert update.output.outputs[0].logprobs is None


def test_an_error_and_the_times_reach_the_output(processor):
    start(processor)
    times = RequestTimes(1.0, 2.0, 3.0, 4.0)
    update = processor.process(delta([], "error", error="out of luck", times=times))
    assert (update.output.error, update.output.times, update.output.finished) == ("out of luck", times, True)
    assert update.delta.finish_reason == "error"


def test_an_engine_abort_reaches_the_output(processor, tokenizer):
    start(processor, stop=("wolves",))
    processor.process(delta(tokenizer.encode("wol", False)))
    update = processor.process(delta([], "abort"))
    assert (update.delta.text, update.output.outputs[0].finish_reason) == ("wol", "abort")


def test_abort_forgets_and_names_what_still_runs(processor):
    first, second = start(processor, n=2)
    processor.process(delta([10], "length", first.request_id))
    assert processor.abort(["r", "unknown"]) == [second.request_id]
    assert processor.abort(["r"]) == []
    assert processor.process(delta([10], None, second.request_id)) is None
    assert len(processor) == 0
    start(processor)


def test_an_id_in_use_is_refused(processor):
    start(processor)
    with pytest.raises(RequestError, match="'r' is in use"):
        start(processor)


def test_what_cannot_run_is_refused_and_leaves_nothing(processor, tokenizer):
    with pytest.raises(RequestError, match="empty"):
        start(processor, prompt=())
    with pytest.raises(RequestError, match="token 99999") as caught:
        start(processor, prompt=(99999,))
    assert caught.value.param == "prompt"
    with pytest.raises(ContextLengthError, match="maximum context length is 100 tokens"):
        start(processor, prompt=(5,) * 100)
    with pytest.raises(RequestError) as caught:
        start(processor, logit_bias={-1: 1.0})
    assert caught.value.param == "logit_bias"
    assert len(processor) == 0

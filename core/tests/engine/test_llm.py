"""LLM over a scripted executor: every way to call it, and that it stays usable."""

from __future__ import annotations

import json
import os
import signal
import threading
from itertools import pairwise

import pytest

import dovetail
from dovetail.engine import llm as module
from dovetail.engine.llm import LLM
from dovetail.errors import ConfigError, ContextLengthError, EngineDeadError, RequestError
from dovetail.sampling_params import SamplingParams
from dovetail.testing import ScriptedExecutor, engine_config

TEN = SamplingParams(max_tokens=10, temperature=0.0)


@pytest.fixture
def make(folders, monkeypatch):
    """Make an LLM; keyword arguments go to the executor, ``config`` to the configuration."""
    made = []

    def resolve(options):
        make.options = options
        folder = folders["byte_level"]
        changes = {"model_path": str(folder), "vocab_size": 424, "eos_token_ids": (2,), "max_model_len": 100}
        return engine_config(**{**changes, **make.config})

    def make(*args, config=None, executor=None, **options):
        make.config = config or {}

        def factory(resolved):
            make.executor = ScriptedExecutor(resolved, **(executor or {}))
            return make.executor

        made.append(LLM(*args, executor_factory=factory, **options))
        return made[-1]

    monkeypatch.setattr(module, "_resolve", resolve)
    yield make
    for one in made:
        one.close()


@pytest.fixture
def llm(make):
    return make()


def test_it_is_exported():
    assert dovetail.LLM is LLM


def test_every_form_of_prompt_gives_the_same(llm):
    ids = llm.get_tokenizer().encode("the wolf")
    forms = ["the wolf", ids, {"prompt": "the wolf"}, {"prompt_token_ids": ids}]
    outputs = llm.generate(forms, TEN)
    assert [output.prompt for output in outputs] == ["the wolf", None, "the wolf", None]
    assert all(output.prompt_token_ids == ids and output.finished for output in outputs)
    texts = {output.outputs[0].text for output in outputs}
    assert len(texts) == 1
    for form in forms:
        (output,) = llm.generate(form, TEN)
        assert {output.outputs[0].text} == texts
    assert output.outputs[0].finish_reason in ("length", "stop")
    assert llm.generate([], TEN) == []
    both = llm.generate({"prompt": "shown", "prompt_token_ids": ids}, TEN)
    assert (both[0].prompt, both[0].prompt_token_ids) == ("shown", ids)


def test_outputs_come_in_order_with_their_own_parameters(llm):
    params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (9, 1, 5)]
    outputs = llm.generate(["one", "two", "three"], params, priority=[2, 0, 1])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [9, 1, 5]
    assert [output.prompt for output in outputs] == ["one", "two", "three"]


def test_n_completions(llm):
    (output,) = llm.generate("x", SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    assert [len(completion.token_ids) for completion in output.outputs] == [4, 4, 4]


def test_a_stop_string_frees_the_engine(llm):
    (full,) = llm.generate("a story", SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    text = full.outputs[0].text
    stop = text[5:8]
    (output,) = llm.generate(
        "a story", SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True, stop=(stop,))
    )
    assert output.outputs[0].text == text[: text.index(stop)]
    assert output.outputs[0].stop_reason == stop
    assert llm._engine.stats().num_running == 0


def test_chat_renders_and_adds_no_second_beginning(llm):
    messages = [{"role": "user", "content": "hi"}]
    (output,) = llm.chat(messages, TEN)
    assert output.prompt == "<s><|user|>hi</s><|assistant|>"
    assert output.prompt_token_ids.count(1) == 1
    assert [one.prompt for one in llm.chat([messages, messages], TEN)] == [output.prompt] * 2
    (bare,) = llm.chat(messages, TEN, add_generation_prompt=False, chat_template_kwargs={"bos_token": ""})
    assert bare.prompt == "<|user|>hi</s>"
    (opened,) = llm.chat(messages, TEN, add_generation_prompt=False, continue_final_message=True)
    assert opened.prompt == "<s><|user|>hi"
    with pytest.raises(RequestError, match="messages is empty"):
        llm.chat([])


def test_stream_grows_to_what_generate_gives(llm):
    (whole,) = llm.generate("the wolf", TEN)
    outputs = list(llm.stream("the wolf", TEN))
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(
        range(1, len(whole.outputs[0].token_ids) + 1)
    )
    texts = [output.outputs[0].text for output in outputs]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert outputs[-1].outputs == whole.outputs
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_streams_and_generate_may_be_mixed(llm):
    (whole,) = llm.generate("the wolf", TEN)
    first, second = llm.stream("the wolf", TEN), llm.stream("the wolf", TEN)
    next(first)
    next(second)
    llm.generate("something else", SamplingParams(max_tokens=60, ignore_eos=True))
    assert list(first)[-1].outputs == whole.outputs
    assert list(second)[-1].outputs == whole.outputs


def test_a_prompt_may_be_changed_once_it_is_given(llm):
    """Else the request would take the cached pages of what its list holds when its turn comes."""
    prompt, other = [5] * 70, [9] * 70
    (whole,) = llm.generate([prompt], TEN)
    llm.generate([other], TEN)
    given = list(prompt)
    stream = llm.stream(given, TEN)
    given[:] = other
    last = list(stream)[-1]
    assert (last.outputs, last.prompt_token_ids) == (whole.outputs, prompt)


def test_leaving_a_stream_aborts_it(llm):
    for _ in llm.stream("the wolf", SamplingParams(max_tokens=80, ignore_eos=True)):
        break
    assert (llm._engine.stats().num_running, len(llm._processor)) == (0, 0)


def test_stream_refuses_at_once(llm):
    with pytest.raises(RequestError, match="empty"):
        llm.stream([])


@pytest.mark.parametrize(
    ("prompts", "params", "error", "says"),
    [
        (["a", "b"], [TEN], RequestError, "2 prompts but 1 sampling parameters"),
        (["a", []], TEN, RequestError, "empty"),
        (["a", [1] * 100], TEN, ContextLengthError, "maximum context length is 100 tokens"),
        (["a", [424]], TEN, RequestError, "token 424"),
        (["a", 7], TEN, RequestError, "a int: 7"),
        (["a", {"text": "b"}], TEN, RequestError, "'prompt' or 'prompt_token_ids'"),
    ],
)
def test_nothing_runs_if_one_cannot(llm, make, prompts, params, error, says):
    with pytest.raises(error, match=says):
        llm.generate(prompts, params)
    assert make.executor.plans == []
    assert len(llm._processor) == 0
    assert llm.generate("a", TEN)[0].finished


def test_priorities_must_match(llm):
    with pytest.raises(RequestError, match="1 prompts but 2 priorities"):
        llm.generate("a", TEN, priority=[1, 2])


def test_what_only_the_engine_can_refuse_leaves_nothing(make):
    llm = make(executor={"num_blocks": 8})
    with pytest.raises(RequestError, match="KV blocks"):
        llm.generate(["a", "b"], [TEN, SamplingParams(max_tokens=80)])
    assert llm._engine.stats().num_waiting == 0
    assert llm.generate("a", TEN)[0].finished


def test_defaults_come_from_the_checkpoint(make, folders, tmp_path):
    assert make().get_default_sampling_params() == SamplingParams()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["byte_level"] / name).read_bytes())
    recommended = {"temperature": 0.3, "max_new_tokens": 3, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    llm = make(config={"model_path": str(tmp_path), "eos_token_ids": ()})
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.3, max_tokens=3)
    assert len(llm.generate("a")[0].outputs[0].token_ids) == 3
    assert len(list(llm.stream("a"))) == 3


def test_options_are_checked_and_passed(make, folders):
    llm = make("some/model", dtype="float32", max_num_seqs=4, tokenizer=folders["byte_fallback"])
    assert (make.options.model, make.options.dtype, make.options.max_num_seqs) == ("some/model", "float32", 4)
    assert llm.get_tokenizer().id_to_token(3) == "<0x00>"
    with pytest.raises(ConfigError, match="Did you mean max_model_len"):
        make(max_modell_len=5)
    with pytest.raises(ConfigError, match="no tokenizer folder"):
        make(tokenizer="/no/such/folder")


def test_a_failing_load_closes_the_executor(folders, make, monkeypatch):
    def fail(self, progress):
        raise MemoryError("too large")

    monkeypatch.setattr(ScriptedExecutor, "load", fail)
    with pytest.raises(MemoryError):
        make()
    assert make.executor.closed


def test_a_failing_step_ends_the_engine(make):
    llm = make(executor={"fail_at": 2})
    with pytest.raises(RuntimeError, match="told to fail"):
        llm.generate("a", TEN)
    with pytest.raises(EngineDeadError, match="make a new LLM") as caught:
        llm.generate("a", TEN)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_closing(make):
    with make() as llm:
        llm.generate("a", TEN)
    assert make.executor.closed
    llm.close()


@pytest.fixture
def interruptible():
    """A background job of a shell inherits that interrupts are ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_step_and_leaves_the_engine_usable(make, monkeypatch):
    llm = make()
    (whole,) = llm.generate("the wolf", TEN)
    run, completed = make.executor.run, []

    def interrupted(plan):
        os.kill(os.getpid(), signal.SIGINT)
        result = run(plan)
        completed.append(plan.step)
        return result

    monkeypatch.setattr(make.executor, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("the girl", TEN)
    assert len(completed) == 1
    monkeypatch.undo()
    assert (llm._engine.stats().num_running, len(llm._processor)) == (0, 0)
    assert llm.generate("the wolf", TEN)[0].outputs == whole.outputs


@pytest.mark.usefixtures("interruptible")
def test_a_second_interrupt_does_not_wait(make, monkeypatch):
    llm = make()

    def stuck(plan):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second interrupt was held back")

    monkeypatch.setattr(make.executor, "run", stuck)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", TEN)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_works_in_other_threads_and_without_a_handler(llm):
    found = []
    thread = threading.Thread(target=lambda: found.extend(llm.generate("a", TEN)))
    thread.start()
    thread.join()
    assert found[0].finished
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert llm.generate("a", TEN)[0].outputs == found[0].outputs
    finally:
        signal.signal(signal.SIGINT, previous)


def test_the_progress_bar_is_for_terminals_only(llm, capsys):
    llm.generate(["a", "b"], TEN)
    assert capsys.readouterr().err == ""


def test_the_effective_configuration_is_logged_at_info(make, caplog):
    with caplog.at_level("INFO", logger="dovetail.engine"):
        make(max_model_len=100)
    assert "* limits        100 tokens per request, 8 requests and 64 tokens per step" in caplog.text
    assert "  attention     scripted (dovetail-core 0; for a test)" in caplog.text

"""Chat templates against transformers' ``apply_chat_template``, and what happens to messages that do not fit."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from dovetail.engine.chat_template import ChatTemplate
from dovetail.errors import ConfigError, RequestError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

PLAIN = """{{ bos_token }}{% for message in messages %}
<|{{ message['role'] }}|>
{{ message['content'] }}{{ eos_token }}
{% endfor %}
    {% if add_generation_prompt %}
<|assistant|>
    {% endif %}"""

STRICT = """{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] | trim + '\\n\\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' -}}
    {%- else -%}
        {% generation %}{{- ' ' + message['content'] | trim + eos_token -}}{% endgeneration %}
    {%- endif -%}
{%- endfor -%}"""

TOOLS = """{%- if tools is not none and tools %}
    {{- '<|system|>Tools: ' + (tools | tojson) + '\\n' }}
    {%- for tool in tools %}
        {{- tool.function | tojson(indent=2, sort_keys=true) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'debug' %}{% continue %}{% endif %}
    {{- '<|' + message.role + ('' if message.name is undefined else ' ' + message.name) + '|>' }}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' + call.function.name + ' ' + (call.function.arguments | tojson) + '</tool_call>' }}
        {%- endfor %}
    {%- elif message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}{{- part.text }}{% endfor %}
    {%- endif %}
    {%- if message.reasoning_content is defined %}{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' + ('<think>' if thinking else '') }}{% endif %}"""

USER = {"role": "user", "content": "  What's <b>2 & 3</b>? é "}
TURNS = [
    {"role": "system", "content": "Be brief."},
    USER,
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 日本?"},
]
CALLS = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "<é>"}}}],
    },
    {"role": "tool", "content": "5", "tool_call_id": "x", "name": "add"},
    {"role": "debug", "content": "not shown"},
    {"role": "assistant", "content": "It is 5.", "reasoning": "easy", "name": None},
]
FUNCTIONS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds <a> & b", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture(scope="module")
def theirs(folders):
    return PreTrainedTokenizerFast(tokenizer_file=str(folders["byte_level"] / "tokenizer.json"), **TOKENS)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    ("source", "messages", "kwargs"),
    [
        (PLAIN, [USER], {}),
        (PLAIN, TURNS, {}),
        (STRICT, [USER], {}),
        (STRICT, TURNS, {}),
        (TOOLS, [USER], {}),
        (TOOLS, CALLS, {"tools": FUNCTIONS}),
        (TOOLS, TURNS, {"tools": FUNCTIONS, "thinking": True}),
        (TOOLS, [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}),
        ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", TURNS, {}),
        ("{{ documents is none }}{{ nothing }}{{ unk_token }}", [USER], {}),
        ("{{ bos_token }}", [USER], {"bos_token": "<other>"}),
    ],
)
def test_equals_transformers(theirs, source, messages, kwargs, prompt):
    ours = ChatTemplate(source, TOKENS).render(messages, add_generation_prompt=prompt, **kwargs)
    assert ours == theirs.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=prompt, **kwargs
    )


@pytest.mark.parametrize("source", [PLAIN, STRICT, TOOLS])
@pytest.mark.parametrize("last", ["The answer is", " spaces around ", "ends in space "])
def test_continuing_equals_transformers(theirs, source, last):
    messages = [USER, {"role": "assistant", "content": last}]
    ours = ChatTemplate(source, TOKENS).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == theirs.apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    assert ours.rstrip().endswith(last.strip())


def test_continuing_parts_equals_transformers(theirs):
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "Once"}, {"type": "text", "text": " upon"}]}]
    ours = ChatTemplate(TOOLS).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == "<|assistant|>Once upon"
    assert ours == theirs.apply_chat_template(
        messages, chat_template=TOOLS, tokenize=False, continue_final_message=True
    )


def test_the_demo_equals_transformers(loaded, demo_folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(demo_folder))
    for messages in (TURNS, CALLS):
        assert loaded["demo"].apply_chat_template(messages, FUNCTIONS) == theirs.apply_chat_template(
            messages, tools=FUNCTIONS, tokenize=False, add_generation_prompt=True
        )


PARTS = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]


def test_parts_are_joined_for_templates_that_know_only_text():
    template = ChatTemplate(PLAIN, TOKENS)
    assert not template.takes_parts
    assert template.render(PARTS) == template.render([{"role": "user", "content": "one\ntwo"}])


def test_a_template_that_fails_on_parts_gets_text():
    template = ChatTemplate("{% for m in messages %}{{ m.content + '!' }}{% endfor %}")
    assert template.render(PARTS) == "one\ntwo!"


def test_parts_are_passed_to_templates_that_write_them():
    assert ChatTemplate(TOOLS).takes_parts
    assert "onetwo" in ChatTemplate(TOOLS).render(PARTS)


def test_arguments_sent_as_json_text_are_parsed():
    def call(arguments):
        function = {"name": "add", "arguments": arguments}
        return ChatTemplate(TOOLS).render([{"role": "assistant", "tool_calls": [{"function": function}]}])

    assert call('{"a":1}') == call({"a": 1})
    assert '"{broken"' in call("{broken")
    assert '"[1]"' in call("[1]")
    assert "custom" in ChatTemplate("{{ messages[0].tool_calls }}").render([{"role": "a", "tool_calls": ["custom"]}])


@pytest.mark.parametrize("arguments", ["{", "[" * 200_000])
def test_arguments_that_are_no_json_stay_text(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments }}")
    assert template.render([{"role": "assistant", "tool_calls": [call]}]) == arguments


@pytest.mark.parametrize("calls", [5, {}, "text"])
def test_tool_calls_that_are_no_list_are_refused(calls):
    with pytest.raises(RequestError, match=r"messages\[0\].tool_calls must be a list"):
        ChatTemplate(TOOLS).render([{"role": "assistant", "tool_calls": calls}])


def test_variables_may_have_any_name():
    variables = {"self": "a", "source": "b", "kwargs": "c"}
    template = ChatTemplate("{{ source }}{{ kwargs }}")
    assert template.render([{"role": "user", "content": "x"}], **variables) == "bc"


def test_messages_are_not_changed():
    message = {"role": "assistant", "content": "x", "name": None}
    ChatTemplate(PLAIN).render([message], add_generation_prompt=False, continue_final_message=True)
    assert message == {"role": "assistant", "content": "x", "name": None}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages is empty"),
        (["hi"], r"messages\[0\] must be an object with a role"),
        ([USER, {"content": "x"}], r"messages\[1\] must be an object with a role"),
        ([{"role": "user", "content": 7}], r"messages\[0\].content is a int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type 'image_url'"),
        ([{"role": "user", "content": ["x"]}], "a part of type 'str'"),
        ([{"role": "assistant", "content": "x"}], "Roles must alternate"),
    ],
)
def test_messages_that_do_not_fit_are_refused(messages, says):
    with pytest.raises(RequestError, match=says) as caught:
        ChatTemplate(STRICT, TOKENS).render(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "message", "says"),
    [
        (PLAIN, {"role": "assistant", "tool_calls": []}, "no text to continue"),
        ("{{ messages[0].role }}", {"role": "assistant", "content": "x"}, "does not write the last message"),
        ("{{ messages[0].content | upper }}", {"role": "assistant", "content": "x"}, "does not write the last"),
    ],
)
def test_what_cannot_be_continued_is_refused(source, message, says):
    with pytest.raises(RequestError, match=says):
        ChatTemplate(source).render([message], add_generation_prompt=False, continue_final_message=True)


def test_any_failure_of_the_template_is_the_messages_fault():
    with pytest.raises(RequestError, match=r"rejects these messages: .*content"):
        ChatTemplate("{{ messages[0].content + '!' }}").render([{"role": "user"}])


def test_contradictory_arguments_are_refused():
    with pytest.raises(RequestError, match="both true") as caught:
        ChatTemplate(PLAIN).render([USER], continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    with pytest.raises(RequestError, match="must not set 'documents'") as caught:
        ChatTemplate(PLAIN).render([USER], documents=[])
    assert caught.value.param == "chat_template_kwargs"


def test_a_template_that_does_not_compile_is_refused():
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("\n{% if %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(RequestError):
        ChatTemplate(source).render([USER]).strip()

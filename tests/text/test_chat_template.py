"""Chat templates byte for byte against transformers; what clients get wrong; what templates may not
do.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jengine.errors import InvalidRequestError
from jengine.text.chat_template import MAX_CHARS, MAX_TURNS, render_chat
from jengine.text.messages import normalise_messages
from tests.oracles.tiny_llama import train_tiny_tokenizer

FOLDER = Path(__file__).parent / "templates"
TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted(FOLDER.glob("*.jinja"))}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place, in <b>°C</b> & more",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Zürich", "東京"]},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "東京", "days": 2}},
}
USER = {"role": "user", "content": '  What\'s <the> weather in 東京 & "Zürich"? 😀\n'}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is sunny. "}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "And tomorrow?"}],
    "reasoning": [USER, {**ANSWER, "content": "Sunny.", "reasoning_content": "Let me see"}, USER],
    "tool call": [
        {"role": "system", "content": "Use tools."},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"temperature": 21.5}'},
        {"role": "assistant", "content": "21.5 degrees"},
        {"role": "user", "content": "Thanks"},
    ],
    "nulls": [USER, {"role": "assistant", "content": "Hi", "tool_calls": None, "name": None}, USER],
}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train_tiny_tokenizer(), **SPECIALS)


def expected(oracle: PreTrainedTokenizerFast, template: str, messages: list, **options: Any) -> str:
    text = oracle.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("with_tools", [False, True], ids=["plain", "tools"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_equal_transformers(
    oracle: PreTrainedTokenizerFast, name: str, with_tools: bool, conversation: str
) -> None:
    messages = CONVERSATIONS[conversation]
    tools = [WEATHER, WEATHER] if with_tools else None
    for generation in (False, True):
        ours = render_chat(
            TEMPLATES[name],
            messages,
            tools=tools,
            add_generation_prompt=generation,
            variables=SPECIALS,
        )
        theirs = expected(
            oracle, TEMPLATES[name], messages, tools=tools, add_generation_prompt=generation
        )
        assert ours == theirs
        assert ours


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXT, min_size=1, max_size=4),
    st.sampled_from(["smollm2", "qwen2_5", "llama3_style"]),
    TEXT,
)
def test_any_text_equals_transformers(texts: list[str], name: str, argument: str) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=train_tiny_tokenizer(), **SPECIALS)
    messages: list[dict[str, Any]] = [{"role": "user", "content": text} for text in texts]
    call = {"function": {"name": "f", "arguments": {argument: [argument, 1.5, None, True]}}}
    messages.append({"role": "assistant", "content": texts[0], "tool_calls": [call]})
    ours = render_chat(TEMPLATES[name], messages, variables=SPECIALS)
    assert ours == expected(oracle, TEMPLATES[name], messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", ["It is", " It is sunny \n", "x"])
def test_continuing_the_final_message_equals_transformers(
    oracle: PreTrainedTokenizerFast, name: str, text: str
) -> None:
    messages = [USER, {"role": "assistant", "content": text}]
    ours = render_chat(
        TEMPLATES[name],
        messages,
        add_generation_prompt=False,
        continue_final_message=True,
        variables=SPECIALS,
    )
    assert ours == expected(oracle, TEMPLATES[name], messages, continue_final_message=True)
    assert ours.endswith(text) or ours.endswith(text.strip())


def test_variables_reach_the_template(oracle: PreTrainedTokenizerFast) -> None:
    for name, variables in (
        ("qwen3", {"enable_thinking": False}),
        ("llama3_style", {"date_string": "1 Jan 2030", "bos_token": "[start]"}),
        ("parts_style", {"documents": [{"title": "a", "text": "<b>"}]}),
    ):
        ours = render_chat(TEMPLATES[name], [USER], variables={**SPECIALS, **variables})
        theirs = expected(oracle, TEMPLATES[name], [USER], add_generation_prompt=True, **variables)
        assert ours == theirs != render_chat(TEMPLATES[name], [USER], variables=SPECIALS)


def test_parts_stay_parts_only_where_the_template_reads_them(
    oracle: PreTrainedTokenizerFast,
) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}]
    ours = render_chat(TEMPLATES["parts_style"], messages)
    assert ours == expected(oracle, TEMPLATES["parts_style"], messages, add_generation_prompt=True)
    assert "[1/2] one[2/2] two" in ours
    joined = [{"role": "user", "content": "one\ntwo"}]
    for name in ("smollm2", "qwen3", "llama3_style", "mistral_style"):
        ours = render_chat(TEMPLATES[name], messages, variables=SPECIALS)
        assert ours == render_chat(TEMPLATES[name], joined, variables=SPECIALS)


def test_arguments_in_a_json_string_become_an_object() -> None:
    function = {"name": "f", "arguments": '{"b": 1, "a": "<x>"}'}
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}
    normal = normalise_messages([message], takes_parts=False)[0]
    assert normal["tool_calls"][0]["function"]["arguments"] == {"b": 1, "a": "<x>"}
    assert "content" not in normal
    assert function["arguments"] == '{"b": 1, "a": "<x>"}'  # the caller's message is untouched


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list of messages"),
        ({"role": "user"}, "must be a list of messages"),
        ([], "at least one message"),
        (["hi"], "messages[0] must be an object"),
        ([USER, {"content": "x"}], "messages[1].role must be a non-empty string"),
        ([{"role": 3, "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 3}], "messages[0].content must be a string, a list of parts"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "content[0] has type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "content[0].text must be"),
        ([{"role": "user", "content": [7]}], "content[0] has type None"),
        ([{"role": "user", "content": "x", "tool_calls": "f"}], "tool_calls must be a list"),
        (
            [{"role": "user", "content": "x", "tool_calls": [{"function": {"arguments": "{"}}]}],
            "tool_calls[0].function.arguments is no JSON",
        ),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "holds a set"),
    ],
)
def test_malformed_messages_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(message)) as caught:
        render_chat(TEMPLATES["smollm2"], messages)
    assert caught.value.field == "messages"


@pytest.mark.parametrize("tools", ["f", [3], {"type": "function"}])
def test_malformed_tools_are_refused(tools: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render_chat(TEMPLATES["qwen3"], [USER], tools=tools)
    assert caught.value.field == "tools"


def test_a_template_may_reject_a_conversation() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        render_chat(TEMPLATES["mistral_style"], [USER, USER], variables=SPECIALS)
    assert caught.value.field == "messages"
    with pytest.raises(InvalidRequestError, match="rejects them"):  # None + str inside the template
        render_chat("{{ messages[0].content + none }}", [USER])


def test_template_that_is_no_template() -> None:
    for template in ("{% for %}", "{{ x", "{% nonsense %}"):
        with pytest.raises(InvalidRequestError) as caught:
            render_chat(template, [USER])
        assert caught.value.field == "chat_template"


def test_continuation_that_cannot_be() -> None:
    def attempt(template: str, messages: list, **options: Any) -> None:
        options = {"add_generation_prompt": False, "continue_final_message": True, **options}
        with pytest.raises(InvalidRequestError) as caught:
            render_chat(template, messages, **options)
        assert caught.value.field == "continue_final_message"

    attempt(TEMPLATES["smollm2"], [USER], add_generation_prompt=True)
    attempt("{{ messages[0].content }}", [USER, ANSWER])
    attempt(TEMPLATES["qwen3"], [USER, {"role": "assistant", "tool_calls": [CALL]}])


BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(999999999) %}{% endfor %}",
    "loops over a filter": "{% for i in range(9999) %}{% for c in messages[0].content|batch(1) %}"
    "{% for d in range(9999)|map('string') %}{% endfor %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "repeat": "{{ 'x' * 999999999 }}",
    "repeat list": "{{ ([0] * 999999999)|length }}",
    "doubling +": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling ~": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "power": "{{ 9 ** 999999999 }}",
    "output": "{% set x = 'x' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
    "lipsum": "{{ lipsum(n=100000) }}",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(30)
def test_bombs_are_defused(name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        render_chat(BOMBS[name], [USER])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__init__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
        "{{ namespace.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(template: str) -> None:
    """An attribute that is not safe is undefined, hence empty; using it is an error."""
    try:
        assert render_chat(template, [USER]) == ""
    except InvalidRequestError as error:
        assert error.field in ("messages", "chat_template")


def test_bounds_leave_room_for_long_conversations() -> None:
    messages = [{"role": "user", "content": "x" * 200}] * 20_000
    assert len(messages) * 10 < MAX_TURNS and len(messages) * 300 < MAX_CHARS
    text = render_chat(TEMPLATES["qwen2_5"], messages)
    assert text.count("<|im_start|>user") == 20_000


def test_json_is_not_escaped_for_html() -> None:
    value = {"a": "<b> & 'c' \u2028 é", "d": [1.0, None, True]}
    text = render_chat("{{ messages[0].extra | tojson }}", [{**USER, "extra": value}])
    assert text == json.dumps(value, ensure_ascii=False)

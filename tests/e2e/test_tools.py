"""A conversation with calls of tools: OpenAI's client, a live server, and a tiny DeepSeek-V4 whose
random weights a constraint makes call.
"""

# ruff: noqa: RUF001  (the model's bars are full-width ones)
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.live import LiveServer, live_server
from tests.oracles.deepseek_v4 import make_deepseek_v4
from tests.oracles.tiny_llama import save_tiny_tokenizer, train_tiny_tokenizer
from tests.server.harness import post

pytestmark = pytest.mark.slow  # a model and a server of its own
D = "｜DSML｜"
FLAGS = ["--max-model-len", "4096", "--max-num-seqs", "2", "--enable-auto-tool-choice"]
FLAGS += ["--tool-call-parser", "deepseek_v4", "--reasoning-parser", "deepseek_v4"]
SCHEMA = {"type": "object", "properties": {"s": {"type": "string"}, "x": {"type": "integer"}}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALL = (
    rf'<{D}invoke name="f">\n<{D}parameter name="s" string="true">[a-z "]{{1,8}}</{D}parameter>\n'
    rf'<{D}parameter name="x" string="false">[1-9][0-9]?</{D}parameter>\n</{D}invoke>\n'
)
CALLS = {"regex": rf"[a-z]{{1,5}}\n\n<{D}tool_calls>\n{CALL}{CALL}</{D}tool_calls>"}
OPTIONS: Any = {"model": "tiny", "tools": TOOLS, "max_tokens": 400, "temperature": 1.0, "seed": 3}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("v4")
    save_tiny_tokenizer(folder, chat_template=None)
    tokenizer = train_tiny_tokenizer()
    tokenizer.add_special_tokens(["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    make_deepseek_v4(folder, vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=4096)
    log = folder / "server.log"
    with live_server(log, *FLAGS, "--served-model-name", "tiny", model=str(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def client(live: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.http}/v1", api_key="none", max_retries=0)


def test_calls_their_results_and_the_answer(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Call f twice."}]
    extra = {"structured_outputs": CALLS}
    (choice,) = client.chat.completions.create(
        messages=messages, extra_body=extra, **OPTIONS
    ).choices
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls or []
    assert [call.type for call in calls] == ["function", "function"]
    for call in calls:
        assert call.type == "function"
        assert call.function.name == "f"
        arguments = json.loads(call.function.arguments)
        assert list(arguments) == ["s", "x"]
        assert isinstance(arguments["s"], str)
        assert isinstance(arguments["x"], int)
    with client.chat.completions.stream(messages=messages, extra_body=extra, **OPTIONS) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == choice.message.content
    assert [c.function.arguments for c in final.message.tool_calls or []] == [
        c.function.arguments for c in calls if c.type == "function"
    ]

    messages.append(choice.message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "42"} for c in calls]
    answer = client.chat.completions.create(
        messages=messages, extra_body={"structured_outputs": {"regex": "done"}}, **OPTIONS
    )
    assert answer.choices[0].message.content == "done"
    assert answer.choices[0].finish_reason == "stop"


def test_reasoning_ends_at_its_token(live: LiveServer, client: openai.OpenAI) -> None:
    _, tokens, _ = post(live.http + "/tokenize", {"prompt": "</think>"})
    (end,) = tokens["tokens"][-1:]
    messages: Any = [{"role": "user", "content": "Think."}]
    thinking = {"chat_template_kwargs": {"thinking": True}}
    options = {**OPTIONS, "max_tokens": 8, "extra_body": thinking}
    (choice,) = client.chat.completions.create(messages=messages, **options).choices
    assert choice.message.content is None
    assert choice.message.model_extra is not None
    assert (
        choice.message.model_extra["reasoning"] == choice.message.model_extra["reasoning_content"]
    )
    biased = {**options, "logit_bias": {str(end): 100}}
    (choice,) = client.chat.completions.create(messages=messages, **biased).choices
    assert choice.message.content == "</think>" * 7  # after the first

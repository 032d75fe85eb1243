"""Every check at the door names its field and its limit; every default is filled in."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine.config import EngineConfig, ReasoningConfig
from jengine.errors import InvalidRequestError
from jengine.input_processor import InputProcessor, PreparedRequest
from jengine.model_info import ModelInfo
from jengine.request import MAX_BANNED_IDS, SamplingParams
from jengine.structured_outputs import StructuredOutputsParams
from jengine.text.tokenizer import Tokenizer
from tests.oracles.echo_core import EOS_ID, VOCAB_SIZE, make_echo_model

MAX_MODEL_LEN = 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_echo_model(tmp_path_factory.mktemp("echo")))


class Door:
    def __init__(self, tokenizer: Tokenizer | None, **config: Any) -> None:
        info = ModelInfo(
            "m", ("m",), "", "", VOCAB_SIZE, MAX_MODEL_LEN, (EOS_ID,), None, None, "float32"
        )
        self._inputs = InputProcessor(
            EngineConfig.from_kwargs("m", **config), info, tokenizer, lambda: 11
        )

    def __call__(self, prompt: Any = "ab", *, where: Any = (), **sampling: Any) -> PreparedRequest:
        return self._inputs.prepare(prompt, SamplingParams(**sampling), "id", **dict(where))


@pytest.fixture
def door(tokenizer: Tokenizer) -> Door:
    return Door(tokenizer)


@pytest.mark.parametrize(
    ("prompt", "text", "token_ids"),
    [
        ("ab", "ab", [97, 98]),
        ([97, 98], None, [97, 98]),
        ((97, 98), None, [97, 98]),
        (np.array([97, 98]), None, [97, 98]),
        ({"prompt": "ab"}, "ab", [97, 98]),
        ({"prompt_token_ids": [97]}, None, [97]),
        ({"prompt_token_ids": [97], "prompt": "said"}, "said", [97]),
    ],
)
def test_forms_of_a_prompt(door: Door, prompt: Any, text: str | None, token_ids: list[int]) -> None:
    prepared = door(prompt)
    assert (prepared.prompt, prepared.prompt_token_ids) == (text, token_ids)
    assert all(type(i) is int for i in prepared.prompt_token_ids)


@pytest.mark.parametrize(
    ("prompt", "field", "says"),
    [
        ("", "prompt", "empty"),
        ([], "prompt", "empty"),
        ({}, "prompt", "'prompt' or 'prompt_token_ids'"),
        (None, "prompt", "string"),
        (3, "prompt", "string"),
        ([1.5], "prompt", "list of token ids"),
        (["a"], "prompt", "list of token ids"),
        ([97, VOCAB_SIZE], "prompt_token_ids", f"{VOCAB_SIZE} is outside"),
        ([-1], "prompt_token_ids", "-1 is outside"),
        ([97] * MAX_MODEL_LEN, "prompt", f"{MAX_MODEL_LEN} tokens"),
        ({"prompt": "a", "multi_modal_data": {}}, "prompt", "multi_modal_data"),
    ],
)
def test_bad_prompts(door: Door, prompt: Any, field: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as error:
        door(prompt)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("sampling", "field", "says"),
    [
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "vocabulary"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias", "vocabulary"),
        ({"allowed_token_ids": [9999]}, "allowed_token_ids", "vocabulary"),
        ({"logprobs": 21}, "logprobs", "at most 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
        ({"logprobs": -1}, "logprobs", "max_logprobs=-1"),
        ({"logprob_token_ids": [VOCAB_SIZE]}, "logprob_token_ids", "vocabulary"),
        ({"logprob_token_ids": [1] * 129}, "logprob_token_ids", "at most 128"),
        ({"logprob_token_ids": [1, 2], "logprobs": 1}, "logprob_token_ids", "their number, 2"),
        ({"thinking_token_budget": 3}, "thinking_token_budget", "reasoning_config"),
        ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens", "at most 32"),
        ({"bad_words": [" "]}, "bad_words", "no tokens"),
        (
            {"stop_token_ids": list(range(MAX_BANNED_IDS)), "min_tokens": 1},
            "stop_token_ids",
            f"at most {MAX_BANNED_IDS}",
        ),
        ({"bad_words": [f"w{i}" for i in range(MAX_BANNED_IDS)]}, "bad_words", "at most 128"),
    ],
)
def test_bad_sampling(door: Door, sampling: Any, field: str, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says) as error:
        door(**sampling)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 1.5), ("temperature", "hot"), ("stop", [1]), ("seed", 2**70), ("logit_bias", [1])],
)
def test_wrong_types_are_found_before_the_wire(door: Door, field: str, value: Any) -> None:
    params = SamplingParams()
    setattr(params, field, value)
    with pytest.raises(InvalidRequestError):
        door._inputs.prepare("a", params, "id")


def test_a_value_changed_after_construction_is_checked_again(door: Door) -> None:
    params = SamplingParams()
    params.top_p = 7.0
    with pytest.raises(InvalidRequestError, match="top_p") as error:
        door._inputs.prepare("a", params, "id")
    assert error.value.field == "top_p"


@pytest.mark.parametrize(
    ("where", "field"),
    [
        ({"priority": 1}, "priority"),
        ({"priority": "x"}, "priority"),
        ({"cache_salt": 3}, "cache_salt"),
    ],
)
def test_bad_envelopes(door: Door, where: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        door(where=where)
    assert error.value.field == field


def test_priority_needs_its_policy(tokenizer: Tokenizer) -> None:
    prepared = Door(tokenizer, scheduling_policy="priority")(where={"priority": -3})
    assert prepared.children[0].priority == -3


@pytest.mark.parametrize(
    ("asked", "given"), [(None, MAX_MODEL_LEN - 2), (5, 5), (1000, MAX_MODEL_LEN - 2)]
)
def test_max_tokens_is_filled_and_clipped(door: Door, asked: int | None, given: int) -> None:
    sampling = door(max_tokens=asked).sampling
    assert sampling.max_tokens == given
    assert door(max_tokens=1000, min_tokens=900).sampling.min_tokens == MAX_MODEL_LEN - 2


@pytest.mark.parametrize(("keep", "kept"), [(2, "yz"), (-1, "z" * 31)])
def test_truncation_keeps_the_end(door: Door, keep: int, kept: str) -> None:
    prompt = "xyz" if keep == 2 else "y" * 10 + "z" * 31
    prepared = door(prompt, truncate_prompt_tokens=keep)
    assert bytes(prepared.prompt_token_ids).decode() == kept


def test_bad_words_are_banned_with_and_without_a_space(door: Door) -> None:
    words = door(bad_words=["no", " ox"]).sampling.bad_word_ids or []
    assert [bytes(ids) for ids in words] == [b"no", b" no", b"ox", b" ox"]


def test_the_seed_is_the_users_or_drawn(door: Door) -> None:
    assert door(seed=-5).children[0].seed == 2**64 - 5
    assert [child.seed for child in door(n=2).children] == [11, 12]
    assert [child.seed for child in door(n=2, seed=2**63 - 1).children] == [2**63 - 1, 2**63]


def test_a_thinking_budget_brings_its_markers(tokenizer: Tokenizer) -> None:
    config = ReasoningConfig(reasoning_start_str="<t>", reasoning_end_str="</t>")
    door = Door(tokenizer, reasoning_config=config)
    (child,) = door(thinking_token_budget=0).children
    assert child.sampling.thinking_markers == [list(b"<t>"), list(b"</t>")]
    for params in (door(thinking_token_budget=-1), door(thinking_markers=[[1], [2]])):
        assert params.sampling.thinking_token_budget is None
        assert params.sampling.thinking_markers is None
    for more in (
        {"allowed_token_ids": list(b"</t")},
        {"structured_outputs": StructuredOutputsParams(regex="a")},
    ):
        with pytest.raises(InvalidRequestError, match="thinking_token_budget: "):
            door(thinking_token_budget=1, **more)
    with pytest.raises(InvalidRequestError, match="must be >= -1, got -2"):
        door(thinking_token_budget=-2)


def test_the_whole_vocabulary_where_it_is_allowed(tokenizer: Tokenizer) -> None:
    door = Door(tokenizer, max_logprobs=-1)
    assert door(logprobs=-1).sampling.logprobs == -1
    door = Door(tokenizer, logprobs_mode="processed_logprobs")
    with pytest.raises(InvalidRequestError, match="logprob_token_ids: needs logprobs_mode raw"):
        door(logprob_token_ids=[1])
    door = Door(tokenizer, max_logprobs=-1)
    with pytest.raises(InvalidRequestError, match=f"at most {VOCAB_SIZE}"):
        door(logprobs=VOCAB_SIZE + 1)


def test_the_callers_parameters_stay_untouched(door: Door) -> None:
    params = SamplingParams(max_tokens=None, bad_words=["x"])
    door._inputs.prepare("a", params, "id")
    assert (params.max_tokens, params.bad_word_ids) == (None, None)


@pytest.mark.parametrize(
    ("prompt", "sampling", "says"),
    [
        ("text", {}, "token ids"),
        ([1], {"stop": "x"}, "tokenizer"),
        ([1], {"bad_words": ["x"]}, "tok"),
    ],
)
def test_without_a_tokenizer(prompt: Any, sampling: Any, says: str) -> None:
    door = Door(None)
    assert not door([1]).sampling.detokenize
    with pytest.raises(InvalidRequestError, match=says):
        door(prompt, **sampling)


def test_the_engines_chat_template_wins(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("<{{ messages[0].content }}>")
    messages = [{"role": "user", "content": "hi"}]
    render = Door(tokenizer, chat_template=str(file))._inputs.render_chat
    assert render(messages, add_generation_prompt=False) == "<hi>"
    assert render(messages, chat_template="{{ 1 + 1 }}") == "2"
    assert Door(tokenizer)._inputs.render_chat(messages) == "[user]hi[assistant]"

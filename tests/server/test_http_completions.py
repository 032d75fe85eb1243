"""/v1/completions on the echo core, whose greedy output repeats the prompt's bytes."""

import pytest

from tests.server.harness import MODEL_NAME, RunningServer, events, post

PATH = "/v1/completions"


def ask(server: RunningServer, **body: object) -> dict:
    status, answer, _ = post(server.http + PATH, {"max_tokens": 7, **body})
    assert status == 200, answer
    return answer


def test_the_whole_answer(server: RunningServer) -> None:
    answer = ask(server, prompt="hello", model=MODEL_NAME)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == MODEL_NAME
    assert answer["choices"] == [
        {
            "index": 0,
            "text": "hellohe",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_max_tokens_defaults_to_16(server: RunningServer) -> None:
    _, answer, _ = post(server.http + PATH, {"prompt": "ab"})
    assert answer["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ababababababab"[:7]]),
        (["ab", "xyz"], ["abababa", "xyzxyzx"]),
        ([ord("q"), ord("r")], ["qrqrqrq"]),
        ([[ord("q")], [ord("r"), ord("s")]], ["qqqqqqq", "rsrsrsr"]),
    ],
)
def test_every_form_of_prompt(server: RunningServer, prompt: object, texts: list[str]) -> None:
    answer = ask(server, prompt=prompt)
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))


def test_n_counts_within_each_prompt(server: RunningServer) -> None:
    answer = ask(server, prompt=["ab", "cd"], n=3, temperature=1.0, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts[:3])) == 3, "choices of one prompt have different seeds"
    again = ask(server, prompt=["ab", "cd"], n=3, temperature=1.0, seed=5)
    assert [choice["text"] for choice in again["choices"]] == texts
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["usage"]["completion_tokens"] == 42


def test_stop_strings_and_tokens(server: RunningServer) -> None:
    (choice,) = ask(server, prompt="abcdef", stop=["ef", "d"])["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("abc", "stop", "d")
    (choice,) = ask(server, prompt="abcdef", stop="d", include_stop_str_in_output=True)["choices"]
    assert choice["text"] == "abcd"
    (choice,) = ask(server, prompt="abcdef", stop_token_ids=[ord("c")])["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", ord("c"))


def test_end_of_sequence_has_no_stop_reason(server: RunningServer) -> None:
    (choice,) = ask(server, prompt=[97, 256])["choices"]  # 256 is the echo model's <eos>
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", None)


def test_echo_with_logprobs_covers_the_prompt(server: RunningServer) -> None:
    (choice,) = ask(server, prompt="abc", echo=True, logprobs=1, max_tokens=2)["choices"]
    assert choice["text"] == "abcab"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c", "a", "b"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == [-0.5] * 4
    # The echo core's best candidate is "a" (or "b" where "a" was chosen); the chosen one is always
    # listed.
    assert logprobs["top_logprobs"][1] == {"a": -0.25, "b": -0.5}


def test_scoring_a_prompt_generates_nothing(server: RunningServer) -> None:
    answer = ask(server, prompt="abc", echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


def test_logprobs_zero_is_the_chosen_token_alone(server: RunningServer) -> None:
    (choice,) = ask(server, prompt="xyz", logprobs=0, max_tokens=2)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"x": -0.5}, {"y": -0.5}]


def test_tokens_as_ids(server: RunningServer) -> None:
    body = {"prompt": "ab", "logprobs": 0, "return_tokens_as_token_ids": True, "max_tokens": 1}
    (choice,) = ask(server, **body, return_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"] == ["token_id:97"]
    assert choice["token_ids"] == [97]
    assert choice["prompt_token_ids"] == [97, 98]


def test_logprobs_of_named_tokens(server: RunningServer) -> None:
    body = {"prompt": "ab", "logprob_token_ids": [120, 97], "max_tokens": 2}
    (choice,) = ask(server, **body)["choices"]
    shown = [{"a": -0.5, "x": -15.0}, {"a": -12.125, "x": -15.0, "b": -0.5}]
    assert choice["logprobs"]["top_logprobs"] == shown, "with the chosen one, as vLLM"
    assert choice["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert ask(server, **body, logprobs=2)["choices"] == [choice]
    streamed = [c["choices"][0] for c in events(server.http + PATH, body | {"stream": True})]
    assert [top for c in streamed for top in c["logprobs"]["top_logprobs"]] == shown


def test_prompt_logprobs(server: RunningServer) -> None:
    (choice,) = ask(server, prompt="ab", prompt_logprobs=0)["choices"]
    assert choice["prompt_logprobs"] == [
        None,
        {"98": {"logprob": -0.5, "rank": 2, "decoded_token": "b"}},
    ]


@pytest.mark.parametrize("extra", [{}, {"logprobs": 2}, {"echo": True}, {"stop": ["d"]}])
def test_stream_equals_whole(server: RunningServer, extra: dict) -> None:
    body = {"prompt": "abcäß€😀d", "max_tokens": 30, **extra}
    whole = ask(server, **body)
    chunks = events(server.http + PATH, {**body, "stream": True})
    choices = [chunk["choices"][0] for chunk in chunks]
    (expected,) = whole["choices"]
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    assert "\ufffd" not in expected["text"]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[-1] == expected["finish_reason"]
    assert set(reasons[:-1]) <= {None}, "one finish reason, on the last chunk"
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    if "logprobs" in extra:
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        assert tokens == expected["logprobs"]["tokens"]


@pytest.mark.parametrize("continuous", [False, True])
def test_usage_of_a_stream(server: RunningServer, continuous: bool) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    body = {"prompt": ["ab", "cd"], "max_tokens": 5, "stream": True, "stream_options": options}
    *chunks, last = events(server.http + PATH, body)
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == 4
    assert last["usage"]["completion_tokens"] == 10
    if continuous:
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 10
    else:
        assert all("usage" not in chunk for chunk in chunks)


def test_streamed_prompts_keep_their_indices(server: RunningServer) -> None:
    body = {"prompt": ["ab", "cd", "ef"], "max_tokens": 6, "stream": True}
    texts = {0: "", 1: "", 2: ""}
    for chunk in events(server.http + PATH, body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "ababab", 1: "cdcdcd", 2: "efefef"}


def test_the_model_s_defaults_hold_and_requests_win(server: RunningServer) -> None:
    # The echo model suggests temperature 0.
    assert ask(server, prompt="ab")["choices"][0]["text"] == "abababa"
    drawn = ask(server, prompt="ab", temperature=1.0, seed=1)["choices"][0]["text"]
    assert drawn != "abababa"

"""Tokens to text: detokenising, stop strings, logprobs, n completions; no engine and no loop."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jengine.config import EngineConfig
from jengine.errors import DuplicateRequestError, InvalidRequestError, QueueFullError
from jengine.input_processor import InputProcessor
from jengine.model_info import ModelInfo
from jengine.output_processor import OutputProcessor, RequestState
from jengine.outputs import Logprob, RequestOutput
from jengine.protocol import CoreOutput, EngineStats, LogprobsData, Refusal, StepOutputs
from jengine.request import FinishReason, RequestOutputKind, SamplingParams
from jengine.text.tokenizer import Tokenizer
from tests.oracles.echo_core import EOS_ID, VOCAB_SIZE, make_echo_model

DELTA = RequestOutputKind.DELTA
CUMULATIVE = RequestOutputKind.CUMULATIVE
FINAL_ONLY = RequestOutputKind.FINAL_ONLY


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One token for each byte, so that characters and stop strings are split."""
    return Tokenizer.from_folder(make_echo_model(tmp_path_factory.mktemp("echo")))


class Bench:
    """A request and its output processor, fed by hand."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: Any = "p", **sampling: Any):
        self.processor = OutputProcessor(tokenizer)
        self.prepared = _inputs(tokenizer).prepare(
            prompt, SamplingParams(**{"max_tokens": 500, **sampling}), "id"
        )
        self.state: RequestState = self.processor.add(self.prepared)
        self.core_ids = [child.request_id for child in self.prepared.children]
        self.aborted: list[str] = []

    def feed(self, token_ids: list[int], index: int = 0, **fields: Any) -> Any:
        """What the reader gets after a step: an output, or None."""
        output = CoreOutput(self.core_ids[index], token_ids, **fields)
        _, aborted = self.processor.process(StepOutputs([output], EngineStats(), timestamp=5.0))
        self.aborted += aborted
        return self.state.take()

    def feed_text(self, text: str, tokens_per_step: int = 1) -> list[RequestOutput]:
        data = list(text.encode())
        outputs = []
        for i in range(0, len(data), tokens_per_step):
            if not self.state.is_finished:
                outputs.append(self.feed(data[i : i + tokens_per_step]))
        return [output for output in outputs if output is not None]


def _inputs(tokenizer: Tokenizer | None) -> InputProcessor:
    config = EngineConfig.from_kwargs("m", max_logprobs=-1, skip_tokenizer_init=tokenizer is None)
    info = ModelInfo("m", ("m",), "", "", VOCAB_SIZE, 1024, (EOS_ID,), None, None, "float32")
    return InputProcessor(config, info, tokenizer, lambda: 11)


def test_a_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    texts = [o.outputs[0].text for o in Bench(tokenizer, output_kind=DELTA).feed_text("aé😀b")]
    assert texts == ["a", "", "é", "", "", "", "😀", "b"]


@pytest.mark.parametrize("tokens_per_step", [2, 3, 7, 20])
def test_text_does_not_depend_on_how_many_tokens_come_at_once(
    tokenizer: Tokenizer, tokens_per_step: int
) -> None:
    outputs = Bench(tokenizer, output_kind=DELTA).feed_text("aé😀 b世界", tokens_per_step)
    assert "".join(o.outputs[0].text for o in outputs) == "aé😀 b世界"


def test_an_unfinished_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    output = bench.feed([*b"a\xf0\x9f"], finish_reason=FinishReason.LENGTH)
    assert output.outputs[0].text == "a\ufffd"


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_output_kinds(tokenizer: Tokenizer, kind: RequestOutputKind) -> None:
    bench = Bench(tokenizer, output_kind=kind)
    outputs = [bench.feed([97]), bench.feed([98, 99])]
    outputs.append(bench.feed([100], finish_reason=FinishReason.LENGTH))
    seen = [(o.outputs[0].text, o.outputs[0].token_ids, o.finished) for o in outputs if o]
    assert (
        seen
        == {
            DELTA: [("a", [97], False), ("bc", [98, 99], False), ("d", [100], True)],
            CUMULATIVE: [
                ("a", [97], False),
                ("abc", [97, 98, 99], False),
                ("abcd", [97, 98, 99, 100], True),
            ],
            FINAL_ONLY: [("abcd", [97, 98, 99, 100], True)],
        }[kind]
    )


def test_outputs_do_not_change_after_they_were_given(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, logprobs=0)
    first = bench.feed([97], logprobs=[LogprobsData([97], [-1.0], 1)])
    before = dataclasses.replace(first.outputs[0], token_ids=[97])
    bench.feed([98], logprobs=[LogprobsData([98], [-1.0], 1)])
    assert (first.outputs[0].token_ids, first.outputs[0].logprobs) == ([97], before.logprobs)
    assert len(first.outputs[0].logprobs) == 1


# --- stop strings


@pytest.mark.parametrize(
    ("sampling", "text", "stop_reason", "token_count"),
    [
        ({"stop": "END"}, "ab", "END", 5),
        ({"stop": ["x", "END"]}, "ab", "END", 5),
        ({"stop": "END", "include_stop_str_in_output": True}, "abEND", "END", 5),
        ({"stop": "bE"}, "a", "bE", 3),
        ({"stop": "é"}, "abEND", "é", 7),
        ({"stop": "D"}, "abEN", "D", 5),
    ],
)
def test_stop_strings_end_the_text(
    tokenizer: Tokenizer, sampling: dict, text: str, stop_reason: str, token_count: int
) -> None:
    bench = Bench(tokenizer, output_kind=DELTA, **sampling)
    outputs = bench.feed_text("abENDégh")
    assert "".join(o.outputs[0].text for o in outputs) == text
    last = outputs[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == ("stop", stop_reason)
    assert sum(len(o.outputs[0].token_ids) for o in outputs) == token_count
    assert bench.aborted == bench.core_ids  # the core is told
    assert not bench.processor.requests


@given(
    text=st.text("abé", max_size=12),
    stops=st.lists(st.text("abé", min_size=1, max_size=3), min_size=1, max_size=3),
    tokens_per_step=st.integers(1, 5),
    min_tokens=st.integers(0, 6),
)
def test_stop_strings_equal_a_search_after_every_token(
    tokenizer: Tokenizer, text: str, stops: list[str], tokens_per_step: int, min_tokens: int
) -> None:
    """The oracle decodes all bytes so far, after each, and looks for what it completed."""
    data, expected, stopped_by = text.encode(), text, None
    for end in range(1, len(data) + 1):
        seen = data[:end].decode(errors="ignore")
        if end <= min_tokens or len(seen.encode()) != end:
            continue
        found = [s for s in stops if seen.endswith(s)]
        if found:
            stopped_by = max(found, key=len)
            expected = seen[: -len(stopped_by)]
            break
    bench = Bench(tokenizer, output_kind=DELTA, stop=stops, min_tokens=min_tokens)
    outputs = bench.feed_text(text, tokens_per_step)
    if not bench.state.is_finished:
        outputs.append(bench.feed([EOS_ID], finish_reason=FinishReason.STOP))
    assert "".join(o.outputs[0].text for o in outputs) == expected
    assert outputs[-1].outputs[0].stop_reason == stopped_by


def test_what_may_become_a_stop_string_is_held_back_then_given(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, output_kind=DELTA, stop="END")
    assert [bench.feed([byte]).outputs[0].text for byte in b"aENd"] == ["a", "", "", "ENd"]
    assert [bench.feed([byte]).outputs[0].text for byte in b"EN"] == ["", ""]
    assert bench.feed([], finish_reason=FinishReason.LENGTH).outputs[0].text == "EN"


@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "abc")])
def test_a_stop_token_counts_but_is_not_shown(
    tokenizer: Tokenizer, include: bool, text: str
) -> None:
    bench = Bench(tokenizer, include_stop_str_in_output=include)
    output = bench.feed([97, 98, 99], finish_reason=FinishReason.STOP, stop_reason=99)
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids) == (text, [97, 98, 99])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", 99)


# --- logprobs


def test_logprobs_hold_the_chosen_token_and_the_best(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, logprobs=2)
    position = LogprobsData([98, 97, 99], [-3.0, -0.5, -1.0], rank=7)
    again = LogprobsData([97, 97, 99], [-0.5, -0.5, -1.0], rank=1)
    completion = bench.feed([98, 97], logprobs=[position, again]).outputs[0]
    assert completion.logprobs == [
        {98: Logprob(-3.0, 7, "b"), 97: Logprob(-0.5, 1, "a"), 99: Logprob(-1.0, 2, "c")},
        {97: Logprob(-0.5, 1, "a"), 99: Logprob(-1.0, 2, "c")},
    ]
    assert completion.cumulative_logprob == pytest.approx(-3.5)


def test_logprobs_zero_gives_only_the_chosen(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, logprobs=0)
    output = bench.feed([98], logprobs=[LogprobsData([98], [-3.0], rank=7)])
    assert output.outputs[0].logprobs == [{98: Logprob(-3.0, 7, "b")}]


def test_no_logprobs_unless_asked(tokenizer: Tokenizer) -> None:
    completion = Bench(tokenizer).feed([98]).outputs[0]
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)


def test_delta_logprobs_belong_to_the_delta(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, logprobs=0, output_kind=DELTA)
    for token_id in (97, 98):
        output = bench.feed([token_id], logprobs=[LogprobsData([token_id], [-1.0], 1)])
        assert [list(position) for position in output.outputs[0].logprobs] == [[token_id]]
    assert output.outputs[0].cumulative_logprob == pytest.approx(-2.0)


@pytest.mark.parametrize("kind", [DELTA, CUMULATIVE])
def test_prompt_logprobs_gather_over_chunks(tokenizer: Tokenizer, kind: RequestOutputKind) -> None:
    bench = Bench(tokenizer, "abc", prompt_logprobs=0, output_kind=kind)
    assert bench.feed([], prompt_logprobs=[LogprobsData([98], [-1.0], 1)]) is None
    output = bench.feed([100], prompt_logprobs=[LogprobsData([99], [-2.0], 2)])
    expected = [None, {98: Logprob(-1.0, 1, "b")}, {99: Logprob(-2.0, 2, "c")}]
    assert output.prompt_logprobs == expected
    assert bench.feed([101]).prompt_logprobs == (None if kind is DELTA else expected)


# --- several completions


def test_n_completions_share_one_stream(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, "pq", n=3, seed=5, prompt_logprobs=1, output_kind=DELTA)
    children = bench.prepared.children
    assert [child.request_id.partition("~")[0] for child in children] == ["id-0", "id-1", "id-2"]
    assert [child.seed for child in children] == [5, 6, 7]
    assert [child.sampling.n for child in children] == [1, 1, 1]
    assert [child.sampling.prompt_logprobs for child in children] == [1, None, None]
    output = bench.feed([98], index=1)
    assert [(c.index, c.text) for c in output.outputs] == [(1, "b")]
    assert output.prompt_logprobs is None  # child 0 has not brought them yet
    bench.feed([99], index=1, finish_reason=FinishReason.LENGTH)
    assert not bench.state.is_finished
    bench.feed([97], index=0, finish_reason=FinishReason.LENGTH)
    output = bench.feed([100], index=2, finish_reason=FinishReason.LENGTH)
    assert output.finished
    assert not bench.processor.requests


def test_n_final_outputs_come_together_in_order(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, n=2, output_kind=FINAL_ONLY)
    assert bench.feed([98], index=1, finish_reason=FinishReason.LENGTH) is None
    output = bench.feed([97], index=0, finish_reason=FinishReason.LENGTH)
    assert [(c.index, c.text) for c in output.outputs] == [(0, "a"), (1, "b")]


def test_cached_tokens_are_those_of_the_first_completion(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, n=2)
    bench.feed([97], index=0, num_cached_tokens=0)
    assert bench.feed([98], index=1, num_cached_tokens=64).num_cached_tokens == 0


# --- ends


def test_finish_gives_what_there_is_and_names_what_runs(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer, n=2)
    bench.feed([97], index=0, finish_reason=FinishReason.LENGTH)
    assert bench.processor.finish("id", FinishReason.ABORT) == [bench.core_ids[1]]
    output = bench.state.take()
    assert output is not None
    assert [c.finish_reason for c in output.outputs] == ["abort"]
    assert output.finished
    assert bench.processor.finish("id", FinishReason.ABORT) == []
    assert bench.feed([98], index=1) is None  # the core was a step ahead


def test_tokens_of_an_aborted_request_do_not_reach_its_successor(tokenizer: Tokenizer) -> None:
    processor, inputs = OutputProcessor(tokenizer), _inputs(tokenizer)
    first = inputs.prepare("p", SamplingParams(), "same")
    processor.add(first)
    processor.finish("same", FinishReason.ABORT)
    second = processor.add(inputs.prepare("p", SamplingParams(), "same"))
    late = CoreOutput(first.children[0].request_id, [97])
    assert processor.process(StepOutputs([late], EngineStats(), 1.0)) == ([], [])
    assert second.take() is None


def test_an_id_in_flight_is_refused(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    with pytest.raises(DuplicateRequestError, match="'id'"):
        bench.processor.add(bench.prepared)


@pytest.mark.parametrize(
    ("refusal", "message", "error"),
    [
        (Refusal.QUEUE_FULL, "4 requests wait", QueueFullError),
        (Refusal.INVALID, "prompt: needs 9 pages", InvalidRequestError),
    ],
)
def test_a_refusal_becomes_the_error_it_was(
    tokenizer: Tokenizer, refusal: Refusal, message: str, error: type[Exception]
) -> None:
    bench = Bench(tokenizer, n=2)
    bench.feed([], error=message, refusal=refusal, finish_reason=FinishReason.ERROR)
    assert isinstance(bench.state.error, error)
    assert str(bench.state.error) == message
    assert bench.core_ids[1] in bench.aborted  # the sibling goes, too


def test_an_error_of_the_core_is_told(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    output = bench.feed([], error="logits not finite", finish_reason=FinishReason.ERROR)
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("error", "logits not finite")


def test_timings(tokenizer: Tokenizer) -> None:
    bench = Bench(tokenizer)
    bench.feed([97], scheduled_time=3.0, first_token_time=4.5, num_preemptions=1)
    metrics = bench.feed([98], finish_reason=FinishReason.LENGTH).metrics
    assert (metrics.scheduled_time, metrics.first_token_time) == (3.0, 4.5)
    assert (metrics.last_token_time, metrics.finished_time) == (5.0, 5.0)
    assert metrics.num_preemptions == 1


def test_facts_come_with_the_first_tokens_and_the_last(tokenizer: Tokenizer) -> None:
    """In between an output may hold nothing but tokens."""
    bench = Bench(tokenizer)
    bench.feed([97], scheduled_time=3.0, first_token_time=4.5, num_cached_tokens=16)
    output = bench.feed([98, 99])
    assert (output.num_cached_tokens, output.metrics.first_token_time) == (16, 4.5)
    facts: dict[str, Any] = dict(
        scheduled_time=3.0, first_token_time=4.5, num_cached_tokens=16, num_preemptions=2
    )
    output = bench.feed([100], finish_reason=FinishReason.LENGTH, **facts)
    assert (output.num_cached_tokens, output.metrics.num_preemptions) == (16, 2)


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_tokens_that_come_several_at_a_time_end_where_single_ones_end(
    tokenizer: Tokenizer, cut: int
) -> None:
    """A stop string in the middle of what one dispatch brought, with a log-probability each."""
    bench = Bench(tokenizer, stop="de", logprobs=0)
    data, output = list(b"abcdefgh"), None
    for i in range(0, len(data), cut):
        logprobs = [LogprobsData([t], [-float(t)], 1) for t in data[i : i + cut]]
        if not bench.state.is_finished:
            output = bench.feed(data[i : i + cut], logprobs=logprobs)
    assert output is not None and output.finished
    completion = output.outputs[0]
    assert (completion.text, completion.token_ids) == ("abc", list(b"abcde"))
    assert completion.cumulative_logprob == -sum(b"abcde")
    assert [list(position) for position in completion.logprobs] == [[t] for t in b"abcde"]
    assert bench.aborted == bench.core_ids


def test_all_tokens_in_one_output(tokenizer: Tokenizer) -> None:
    """As the core sends a request that nobody reads step by step."""
    bench = Bench(tokenizer, output_kind=FINAL_ONLY)
    output = bench.feed([*"aé😀".encode(), EOS_ID], finish_reason=FinishReason.STOP)
    assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("aé😀", 8)
    bench = Bench(None, [1, 2], output_kind=FINAL_ONLY)
    output = bench.feed([5, 6, 7], finish_reason=FinishReason.LENGTH)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [5, 6, 7])


def test_without_tokenizer_there_are_ids_only() -> None:
    bench = Bench(None, [1, 2], logprobs=0)
    output = bench.feed([97], logprobs=[LogprobsData([97], [-1.0], 1)])
    assert (output.prompt, output.outputs[0].text) == (None, "")
    assert output.outputs[0].logprobs == [{97: Logprob(-1.0, 1, None)}]


def test_attributes_are_those_of_vllm(tokenizer: Tokenizer) -> None:
    """Names read off vLLM 0.22's outputs.py."""
    output = Bench(tokenizer).feed([97])
    assert {f.name for f in dataclasses.fields(output)} == {
        *("request_id", "prompt", "prompt_token_ids", "prompt_logprobs", "outputs", "finished"),
        *("metrics", "lora_request", "encoder_prompt", "encoder_prompt_token_ids"),
        *("num_cached_tokens", "kv_transfer_params"),
    }
    assert {f.name for f in dataclasses.fields(output.outputs[0])} == {
        *("index", "text", "token_ids", "cumulative_logprob", "logprobs", "routed_experts"),
        *("finish_reason", "stop_reason", "lora_request"),
    }
    assert [f.name for f in dataclasses.fields(Logprob)] == ["logprob", "rank", "decoded_token"]


def test_the_model_folder_is_a_tokenizer_of_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The premise of this file."""
    assert tokenizer.encode("é<eos>") == [0xC3, 0xA9, EOS_ID]

"""Structured outputs of the demo model, through `LLM` and `AsyncEngine`."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from jengine import LLM, AsyncEngine, EngineConfig, SamplingParams, StructuredOutputsParams
from jengine.errors import InvalidRequestError
from jengine.grammar import limits
from jengine.outputs import RequestOutput
from jengine.request import RequestOutputKind
from tests.oracles.grammars import HOSTILE, PERSON, compact, many_schemas, satisfies

ENGINE = dict(
    max_num_seqs=48,
    max_num_batched_tokens=256,
    max_model_len=512,
    kv_cache_memory_bytes=256 << 20,
    decode_buckets=(8, 48),
    prefill_buckets=(256,),
)
REGEXES = [
    r"\d{4}-\d{2}-\d{2}",
    r"(Mr|Mrs)\. [A-Z][a-z]{2,10}",
    r"[A-Za-z0-9]{3,12}@example\.(com|org)",
    r"(https?://)?www\.[a-z]{2,8}\.com/[a-z]{0,5}",
    r"\((-?\d{1,3}(\.\d)?, ){2}\d\)",
]
CHOICES = ["positive", "negative", "neutral", "I don't know.", "世界", 'a "quoted" one']
FREE = SamplingParams(temperature=1.0, max_tokens=40, ignore_eos=True, seed=5)
PROMPT = "Write a record of a person: "


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_gguf), **ENGINE) as llm:  # type: ignore[arg-type]
        yield llm


def generate(llm: LLM, params: list[SamplingParams], prompt: str = PROMPT) -> list[RequestOutput]:
    return llm.generate([prompt] * len(params), params, use_tqdm=False)


def bound(constraint: StructuredOutputsParams, seed: int = 0, **fields: Any) -> SamplingParams:
    fields = {"temperature": 1.0, "max_tokens": 120, **fields}
    return SamplingParams(seed=seed, structured_outputs=constraint, **fields)


@pytest.mark.parametrize(
    "constraint",
    [
        compact(PERSON),
        *(StructuredOutputsParams(regex=regex) for regex in REGEXES),
        StructuredOutputsParams(choice=CHOICES),
    ],
    ids=lambda c: c.regex or c.kind,
)
def test_random_sampling_satisfies_the_constraint(
    llm: LLM, constraint: StructuredOutputsParams
) -> None:
    outputs = generate(llm, [bound(constraint, seed) for seed in range(16)])
    for output in outputs:
        (completion,) = output.outputs
        assert completion.finish_reason == "stop"
        assert satisfies(constraint, completion.text), completion.text
    assert len({output.outputs[0].text for output in outputs}) > 1


def test_white_space_as_asked(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9}},
              "required": ["a"], "additionalProperties": False}  # fmt: skip
    spaced = StructuredOutputsParams(json=schema, whitespace_pattern=r"\n {2}")
    for output in generate(llm, [bound(spaced, seed) for seed in range(8)]):
        assert satisfies(spaced, output.outputs[0].text)
    none = generate(llm, [bound(compact(schema), seed) for seed in range(8)])
    assert not any(c.isspace() for output in none for c in output.outputs[0].text)


def test_closed_objects(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    closed = StructuredOutputsParams(
        json=schema, disable_any_whitespace=True, disable_additional_properties=True
    )
    texts = {o.outputs[0].text for o in generate(llm, [bound(closed, s) for s in range(8)])}
    assert texts <= {'{"a":true}', '{"a":false}'}


def test_grammars(llm: LLM) -> None:
    lark = StructuredOutputsParams(
        grammar='start: "SELECT " col ("," col){0,3} " FROM " /[a-z]{1,8}/\ncol: /[a-z]{1,6}/'
    )
    ebnf = StructuredOutputsParams(grammar='root ::= "yes" | "no" tail\ntail ::= [0-9] [0-9]')
    query = StructuredOutputsParams(regex="SELECT [a-z]{1,6}(,[a-z]{1,6}){0,3} FROM [a-z]{1,8}")
    answer = StructuredOutputsParams(regex="yes|no[0-9][0-9]")
    for constraint, pattern in ((lark, query), (ebnf, answer)):
        for output in generate(llm, [bound(constraint, seed) for seed in range(4)]):
            assert satisfies(pattern, output.outputs[0].text)


def test_structural_tags(llm: LLM) -> None:
    """Free text until a trigger; after it only the structure."""
    tag = StructuredOutputsParams(
        structural_tag='{"triggers": ["<call"], "structures": [{"begin": "<call=f>", "schema": '
        '{"type": "object", "properties": {"x": {"type": "integer", "maximum": 9, "minimum": 0}}, '
        '"required": ["x"], "additionalProperties": false}, "end": "</call>"}]}',
        disable_any_whitespace=True,
    )
    prompt = '<call=f>{"x":1}</call> <call=f>{"x":2}</call> <call=f>{"x":3}</call> '
    params = [bound(tag, seed, max_tokens=60, temperature=0.2) for seed in range(4)]
    texts = [output.outputs[0].text for output in generate(llm, params, prompt)]
    calls = [call for text in texts for call in text.split("<call")[1:] if "</call>" in call]
    assert calls
    pattern = StructuredOutputsParams(regex=r'=f>\{"x":[0-9]\}</call>[\s\S]*')
    assert all(satisfies(pattern, call) for call in calls)


def test_n_completions_seeds_and_stop_strings(llm: LLM) -> None:
    constraint = StructuredOutputsParams(regex="[a-z]{4,12}-[0-9]{3}")
    params = bound(constraint, 3, n=4)
    (first,), (again,) = generate(llm, [params]), generate(llm, [params])
    texts = [completion.text for completion in first.outputs]
    assert texts == [completion.text for completion in again.outputs]
    assert len(set(texts)) > 1
    assert all(satisfies(constraint, text) for text in texts)
    (stopped,) = generate(llm, [bound(constraint, 3, stop=["-"])])
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", "-")
    assert stopped.outputs[0].text == texts[0].partition("-")[0]


def test_32_schemas_beside_free_requests(llm: LLM) -> None:
    free = [FREE.clone(seed=seed) for seed in range(8)]
    expected = [output.outputs[0].token_ids for output in generate(llm, free)]
    constraints = [compact(schema) for schema in many_schemas(32)]
    mixed = [bound(c, seed) for seed, c in enumerate(constraints)]
    outputs = generate(llm, [*mixed[:16], *free, *mixed[16:]])
    got = outputs[:16] + outputs[24:]
    for constraint, output in zip(constraints, got, strict=True):
        assert output.outputs[0].finish_reason == "stop"
        assert satisfies(constraint, output.outputs[0].text)
    assert [output.outputs[0].token_ids for output in outputs[16:24]] == expected
    assert llm._engine.stats.num_compilations == 0


def test_an_engine_without_a_tokenizer(smollm2_gguf: Path) -> None:
    with (
        LLM(str(smollm2_gguf), skip_tokenizer_init=True, **ENGINE) as llm,  # type: ignore[arg-type]
        pytest.raises(InvalidRequestError, match="needs a tokenizer"),
    ):
        llm.generate([[1, 2]], bound(StructuredOutputsParams(regex="a")), use_tqdm=False)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(smollm2_gguf: Path) -> AsyncIterator[AsyncEngine]:
    """The core in a process of its own, as servers run it."""
    config = EngineConfig.from_kwargs(str(smollm2_gguf), **ENGINE)
    engine = await AsyncEngine.create(config)
    yield engine
    await engine.shutdown()


async def complete(engine: AsyncEngine, name: str, params: SamplingParams) -> RequestOutput:
    params = params.clone(output_kind=RequestOutputKind.FINAL_ONLY)
    async for output in engine.generate(PROMPT, params, name):
        if output.finished:
            return output
    raise AssertionError("a stream without an end")


@pytest.mark.asyncio(loop_scope="module")
async def test_hostile_constraints_leave_a_neighbour_alone(engine: AsyncEngine) -> None:
    free = FREE.clone(max_tokens=200, output_kind=RequestOutputKind.DELTA)
    expected = (await complete(engine, "alone", free)).outputs[0].token_ids
    gaps: list[float] = []
    tokens: list[int] = []

    async def stream() -> None:
        last = time.monotonic()
        async for output in engine.generate(PROMPT, free, "neighbour"):
            tokens.extend(output.outputs[0].token_ids)
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    async def attack(name: str) -> str:
        constraint = StructuredOutputsParams(**HOSTILE[name][0])
        try:
            output = await complete(engine, name, bound(constraint, max_tokens=60))
        except InvalidRequestError as error:
            return error.field
        return output.outputs[0].finish_reason or ""

    started = time.monotonic()
    neighbour = asyncio.create_task(stream())
    ends = dict(zip(HOSTILE, await asyncio.gather(*map(attack, HOSTILE)), strict=True))
    attacked_for = time.monotonic() - started
    await neighbour
    assert tokens == expected
    for name, (fields, is_refused) in HOSTILE.items():
        if is_refused:
            assert ends[name] == f"structured_outputs.{next(iter(fields))}"
        assert ends[name] in ("stop", "length", "error") or ends[name].startswith("structured_")
    assert attacked_for < len(HOSTILE) * (limits.CHECK_SECONDS + 1)
    assert max(gaps) < 2.0, "on two busy cores"
    assert not engine.is_dead


@pytest.mark.asyncio(loop_scope="module")
async def test_streamed_text_is_whole(engine: AsyncEngine) -> None:
    constraint = compact(PERSON)
    params = bound(constraint, 1, output_kind=RequestOutputKind.DELTA)
    outputs = [output async for output in engine.generate(PROMPT, params, "streamed")]
    assert outputs[-1].outputs[0].finish_reason == "stop"
    assert satisfies(constraint, "".join(output.outputs[0].text for output in outputs))


@pytest.mark.asyncio(loop_scope="module")
async def test_a_reader_that_leaves(engine: AsyncEngine) -> None:
    params = bound(StructuredOutputsParams(regex="[a-z]{900}"), max_tokens=None)
    stream = engine.generate(PROMPT, params, "leaves")
    await anext(stream)
    await stream.aclose()
    await complete(engine, "next", bound(StructuredOutputsParams(choice=["a", "b"])))
    assert await engine.call_utility("check_integrity")

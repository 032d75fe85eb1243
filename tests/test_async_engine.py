"""Streams over an engine core that echoes; test_async_engine_real.py has the real one."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jengine import async_engine
from jengine.async_engine import AsyncEngine
from jengine.config import EngineConfig
from jengine.errors import (
    DuplicateRequestError,
    EngineDeadError,
    EngineDrainingError,
    InvalidRequestError,
    JengineError,
    QueueFullError,
    UnsupportedError,
)
from jengine.outputs import RequestOutput
from jengine.request import RequestOutputKind, SamplingParams
from jengine.structured_outputs import StructuredOutputsParams
from tests.oracles.echo_core import FACTORY, make_echo_model

DELTA = RequestOutputKind.DELTA


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 6, "output_kind": DELTA, **fields})


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


def text_of(outputs: list[RequestOutput], index: int = 0) -> str:
    return "".join(c.text for o in outputs for c in o.outputs if c.index == index)


@contextlib.asynccontextmanager
async def echo_engine(
    folder: Path, echo: dict[str, Any] | None = None, *, in_process: bool = True, **config: Any
) -> AsyncIterator[AsyncEngine]:
    overrides = {"echo": echo or {}}
    config = {"load_format": "dummy", "max_model_len": 100_000, "hf_overrides": overrides, **config}
    model = make_echo_model(folder / "echo")
    engine = await AsyncEngine.create(
        EngineConfig.from_kwargs(str(model), **config), in_process=in_process, core_factory=FACTORY
    )
    try:
        yield engine
    finally:
        await engine.shutdown()


async def is_idle(engine: AsyncEngine) -> bool:
    """Whether the core has let go of everything; an abort takes a step to get there."""
    for _ in range(100):
        if await engine.call_utility("running") == []:
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.mark.parametrize("in_process", [True, False])
async def test_streams_are_the_same_through_thread_and_process(
    tmp_path: Path, in_process: bool
) -> None:
    async with echo_engine(tmp_path, in_process=in_process) as engine:
        streams = [
            collect(engine.generate(f"prompt {i:02} é", greedy(max_tokens=10), f"r{i}"))
            for i in range(20)
        ]
        for i, outputs in enumerate(await asyncio.gather(*streams)):
            assert text_of(outputs) == f"prompt {i:02} é"[:10]
            assert outputs[-1].finished
            assert outputs[-1].outputs[0].finish_reason == "length"
            assert outputs[0].prompt == f"prompt {i:02} é"
        assert await engine.reset_prefix_cache()
        assert await engine.call_utility("echo", 1, "x", [None]) == [1, "x", [None]]
        with pytest.raises(JengineError, match="unknown"):
            await engine.call_utility("no_such_thing")


async def test_facts_about_the_model(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, served_model_name="nice", max_model_len=99) as engine:
        info = engine.model_info
        assert (info.served_model_names, info.architecture) == (("nice",), "EchoForCausalLM")
        assert (info.max_model_len, info.vocab_size, info.dtype) == (99, 258, "float32")
        assert (info.eos_token_ids, info.bos_token_id, info.pad_token_id) == ((256,), 257, None)
        assert info.default_sampling_params == {"temperature": 0.0, "max_tokens": 7}
        assert info.tokenizer_folder == tmp_path / "echo"
        assert engine.ready.num_pages == 8
        assert not engine.is_dead
        assert engine.dead_error is None
    async with echo_engine(tmp_path, generation_config="vllm") as engine:
        assert engine.model_info.default_sampling_params == {}


async def test_text_helpers(tmp_path: Path) -> None:
    async with echo_engine(tmp_path) as engine:
        assert await engine.encode("é") == [0xC3, 0xA9]
        assert await engine.decode([0xC3, 0xA9, 256]) == "é<eos>"
        assert await engine.decode([0xC3, 0xA9, 256], skip_special_tokens=True) == "é"
        messages = [{"role": "user", "content": "hi"}]
        assert await engine.render_chat(messages) == "[user]hi[assistant]"
        assert await engine.render_chat(messages, add_generation_prompt=False) == "[user]hi"
    async with echo_engine(tmp_path, skip_tokenizer_init=True) as engine:
        with pytest.raises(UnsupportedError, match="skip_tokenizer_init"):
            _ = engine.tokenizer
        assert text_of(await collect(engine.generate([97], greedy(), "r"))) == ""


async def test_a_slow_reader_gets_fewer_and_larger_outputs(tmp_path: Path) -> None:
    async with echo_engine(tmp_path) as engine:
        outputs = []
        async for output in engine.generate("abcd", greedy(max_tokens=3000, logprobs=0), "r"):
            outputs.append(output)
            await asyncio.sleep(0.02)
        assert text_of(outputs) == "abcd" * 750
        for output in outputs:
            completion = output.outputs[0]
            assert len(completion.logprobs or ()) == len(completion.token_ids) > 0
        assert len(outputs) < 300


async def test_a_reader_in_no_hurry_costs_only_its_tokens(tmp_path: Path) -> None:
    """What waits for a reader is one state, not a queue of outputs."""
    async with echo_engine(tmp_path, {"step_seconds": 0.001}) as engine:
        stream = engine.generate("abcd", greedy(max_tokens=400), "r")
        first = await anext(stream)
        while await engine.call_utility("running"):
            await asyncio.sleep(0.01)
        gc.collect()
        assert sum(type(o) is RequestOutput for o in gc.get_objects()) <= 1
        last = await anext(stream)
        assert last.finished
        assert text_of([first, last]) == "abcd" * 100


@pytest.mark.parametrize("how", ["aclose", "cancel", "break"])
async def test_leaving_a_stream_aborts_it(tmp_path: Path, how: str) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.001}) as engine:
        if how == "cancel":
            task = asyncio.create_task(collect(engine.generate("ab", greedy(max_tokens=None), "r")))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream = engine.generate("ab", greedy(max_tokens=None, n=1), "r")
            async for _ in stream:
                break
            if how == "aclose":
                await stream.aclose()
            del stream
        assert await is_idle(engine)
        assert [reason for _, reason in await engine.call_utility("aborted")] == ["abort"]
        assert text_of(await collect(engine.generate("ab", greedy(), "r"))) == "ababab"


async def test_abort_ends_the_other_stream(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.001}) as engine:
        params = greedy(max_tokens=None, temperature=1.0, n=2)
        task = asyncio.create_task(collect(engine.generate("ab", params, "r")))
        await asyncio.sleep(0.05)
        await engine.abort("r")
        await engine.abort("r")
        await engine.abort("never seen")
        outputs = await asyncio.wait_for(task, 1.0)
        assert outputs[-1].finished
        assert {c.finish_reason for c in outputs[-1].outputs} == {"abort"}
        assert await is_idle(engine)


async def test_a_stop_string_ends_the_request_in_the_core(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.001}) as engine:
        outputs = await collect(
            engine.generate("one END two", greedy(max_tokens=None, stop="END"), "r")
        )
        assert text_of(outputs) == "one "
        assert outputs[-1].outputs[0].stop_reason == "END"
        assert await is_idle(engine)
        assert [reason for _, reason in await engine.call_utility("aborted")] == ["stop"]


async def test_bad_requests_leave_their_neighbours_alone(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.001}, max_model_len=64) as engine:
        neighbour = asyncio.create_task(collect(engine.generate("ab", greedy(max_tokens=40), "n")))
        await asyncio.sleep(0)
        for prompt, field in (("", "prompt"), ([300], "prompt_token_ids"), ("x" * 64, "prompt")):
            with pytest.raises(InvalidRequestError) as error:
                await collect(engine.generate(prompt, greedy(), "bad"))
            assert error.value.field == field
        with pytest.raises(InvalidRequestError):
            await collect(engine.generate("x" * 5000, greedy(), "long"))  # through the thread pool
        with pytest.raises(DuplicateRequestError):
            await collect(engine.generate("ab", greedy(), "n"))
        assert text_of(await neighbour) == "ab" * 20


async def test_what_is_being_prepared_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long prompts and constraints wait for threads; short prompts do not."""
    monkeypatch.setattr(async_engine, "MAX_PREPARING", 0)
    constraint = StructuredOutputsParams(choice=["a"])
    async with echo_engine(tmp_path) as engine:
        with pytest.raises(QueueFullError, match="being prepared"):
            await collect(engine.generate("a", greedy(structured_outputs=constraint), "bound"))
        assert await collect(engine.generate("a", greedy(), "free"))


async def test_two_long_prompts_of_one_id(tmp_path: Path) -> None:
    """The second comes while the first is being tokenised."""
    async with echo_engine(tmp_path) as engine:
        long = "x" * 5000
        first = asyncio.create_task(collect(engine.generate(long, greedy(), "same")))
        await asyncio.sleep(0)
        with pytest.raises(DuplicateRequestError):
            await collect(engine.generate(long, greedy(), "same"))
        assert text_of(await first) == "xxxxxx"


async def test_a_full_queue_refuses(tmp_path: Path) -> None:
    echo = {"step_seconds": 0.01}
    async with echo_engine(tmp_path, echo, max_num_waiting=2) as engine:
        streams = [engine.generate("ab", greedy(max_tokens=None), f"r{i}") for i in range(2)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(QueueFullError, match="full"):
            await collect(engine.generate("ab", greedy(n=3, temperature=1.0), "third"))
        for stream in streams:
            await stream.aclose()
        assert await is_idle(engine)
        assert await collect(engine.generate("ab", greedy(), "third"))


async def test_a_deadline_ends_the_request(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.005}) as engine:
        with pytest.raises(TimeoutError):
            await collect(
                engine.generate(
                    "ab", greedy(max_tokens=None), "r", deadline=time.monotonic() + 0.05
                )
            )
        assert await is_idle(engine)
        with pytest.raises(TimeoutError):
            await collect(engine.generate("ab", greedy(), "r", deadline=time.monotonic() - 1))
        in_time = engine.generate("ab", greedy(), "r", deadline=time.monotonic() + 60)
        assert text_of(await collect(in_time)) == "ababab"


async def test_drain_lets_requests_finish_and_takes_no_more(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.005}) as engine:
        task = asyncio.create_task(collect(engine.generate("ab", greedy(max_tokens=20), "r")))
        await asyncio.sleep(0.01)
        drain = asyncio.create_task(engine.drain(10.0))
        await asyncio.sleep(0)
        assert engine.is_draining
        with pytest.raises(EngineDrainingError):
            await collect(engine.generate("ab", greedy(), "late"))
        await drain
        assert (await task)[-1].outputs[0].finish_reason == "length"


async def test_drain_aborts_what_does_not_finish(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.005}) as engine:
        task = asyncio.create_task(collect(engine.generate("ab", greedy(max_tokens=None), "r")))
        await asyncio.sleep(0.01)
        await engine.drain(0.05)
        assert (await task)[-1].outputs[0].finish_reason == "abort"


@pytest.mark.parametrize("in_process", [True, False])
async def test_shutdown_wakes_open_streams(tmp_path: Path, in_process: bool) -> None:
    async with echo_engine(tmp_path, {"step_seconds": 0.005}, in_process=in_process) as engine:
        task = asyncio.create_task(collect(engine.generate("ab", greedy(max_tokens=None), "r")))
        await asyncio.sleep(0.05)
        await engine.shutdown()
        with pytest.raises(EngineDeadError, match="shut down"):
            await task
        with pytest.raises(EngineDeadError):
            await collect(engine.generate("ab", greedy(), "late"))


async def test_a_core_thread_that_dies_wakes_its_streams(tmp_path: Path) -> None:
    async with echo_engine(tmp_path, {"die_at_step": 4}) as engine:
        with pytest.raises(EngineDeadError, match="as it was told"):
            await collect(engine.generate("ab", greedy(max_tokens=None), "r"))
        assert engine.is_dead


async def test_a_bug_in_the_front_end_leaves_no_reader_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with echo_engine(tmp_path) as engine:

        def fail(message: object) -> None:
            raise IndexError("list index out of range")

        monkeypatch.setattr(engine._outputs, "process", fail)
        with pytest.raises(EngineDeadError, match="front end failed: IndexError"):
            await asyncio.wait_for(collect(engine.generate("ab", greedy(), "r")), 5.0)


async def test_seeds_differ_unless_given(tmp_path: Path) -> None:
    async with echo_engine(tmp_path) as engine:

        async def sample(request_id: str, seed: int | None) -> list[str]:
            params = greedy(n=4, temperature=1.0, seed=seed, max_tokens=12)
            outputs = await collect(engine.generate("ab", params, request_id))
            return [text_of(outputs, index) for index in range(4)]

        first, second = await sample("a", 7), await sample("b", 7)
        assert first == second
        assert len(set(first)) == 4
        assert len({*await sample("c", None), *await sample("d", None)}) == 8


async def test_many_streams_are_on_time(tmp_path: Path) -> None:
    """256 streams of a token each 20 ms never fall behind."""
    async with echo_engine(tmp_path, {"step_seconds": 0.02}, in_process=False) as engine:
        late = []

        async def read(i: int) -> None:
            async for output in engine.generate("ab", greedy(max_tokens=40), f"r{i}"):
                assert output.metrics is not None
                late.append(time.time() - (output.metrics.last_token_time or 0.0))

        await asyncio.gather(*(read(i) for i in range(256)))
        late.sort()
        assert late[len(late) // 2] < 0.2  # ten times what an idle machine needs

"""Streams over the real engine, with transformers as the oracle."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from jengine.async_engine import AsyncEngine
from jengine.beam_search import BeamSearchParams, search_beams
from jengine.config import EngineConfig
from tests.oracles.tiny_llama import make_tiny_llama
from tests.test_async_engine import collect, greedy, text_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("tiny")
    return folder, make_tiny_llama(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def real(
    tiny: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AsyncEngine]:
    engine = await AsyncEngine.create(
        EngineConfig.from_kwargs(
            str(tiny[0]),
            dtype="float32",
            max_num_seqs=4,
            max_num_batched_tokens=32,
            num_pages=48,
            decode_buckets=(4,),
            prefill_buckets=(32,),
            cache_dir=str(tmp_path_factory.mktemp("executables")),
        )
    )
    yield engine
    await engine.shutdown()


async def has_no_pages(engine: AsyncEngine) -> bool:
    """The core checks its own books; then nothing may be in use by requests."""
    assert await engine.call_utility("check_integrity")
    return (engine.stats.num_running, engine.stats.num_waiting) == (0, 0)


@pytest.mark.asyncio(loop_scope="module")
async def test_real_greedy_tokens_are_those_of_transformers(
    real: AsyncEngine, tiny: tuple[Path, torch.nn.Module]
) -> None:
    prompts = [list(range(3 + i, 40 + 2 * i)) for i in range(6)]
    streams = [
        collect(real.generate(prompt, greedy(max_tokens=12, ignore_eos=True), f"g{i}"))
        for i, prompt in enumerate(prompts)
    ]
    for prompt, outputs in zip(prompts, await asyncio.gather(*streams), strict=True):
        ours = [i for o in outputs for i in o.outputs[0].token_ids]
        assert ours == _generate_with_torch(tiny[1], prompt, 12)


@pytest.mark.asyncio(loop_scope="module")
async def test_beams_are_those_of_transformers(
    real: AsyncEngine, tiny: tuple[Path, torch.nn.Module]
) -> None:
    prompt = list(range(7, 40))
    params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
    (output,) = [o async for o in search_beams(real, prompt, params, "beams", prompt="as text")]
    with torch.no_grad():
        model: Any = tiny[1]
        theirs = model.generate(
            torch.tensor([prompt]), num_beams=3, num_return_sequences=3, max_new_tokens=5,
            do_sample=False, eos_token_id=None,
        )  # fmt: skip
    assert [prompt + beam.token_ids for beam in output.outputs] == theirs.tolist()
    assert (output.prompt, output.prompt_token_ids) == ("as text", prompt)
    for beam in output.outputs:
        chosen = [p[t].logprob for t, p in zip(beam.token_ids, beam.logprobs or [], strict=True)]
        assert beam.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-5)
        assert beam.text == await real.decode(beam.token_ids, skip_special_tokens=True)
    assert await has_no_pages(real)


def _generate_with_torch(model: torch.nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(num_tokens):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.asyncio(loop_scope="module")
async def test_real_logprobs_are_those_of_transformers(
    real: AsyncEngine, tiny: tuple[Path, torch.nn.Module]
) -> None:
    prompt = list(range(5, 50))
    params = greedy(max_tokens=1, logprobs=3, prompt_logprobs=0)
    output = (await collect(real.generate(prompt, params, "lp")))[-1]
    with torch.no_grad():
        expected = tiny[1](torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for position, entry in enumerate(output.prompt_logprobs[1:], start=1):
        (token_id, found), *rest = (entry or {}).items()
        assert (token_id, rest) == (prompt[position], [])
        reference = expected[position - 1]
        assert found.logprob == pytest.approx(reference[token_id].item(), abs=1e-4)
        assert found.rank == int((reference > reference[token_id]).sum()) + 1
    (position,) = output.outputs[0].logprobs or [{}]
    best = expected[-1].topk(3)
    assert list(position) == best.indices.tolist()
    assert [entry.rank for entry in position.values()] == [1, 2, 3]
    values = [entry.logprob for entry in position.values()]
    assert values == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.asyncio(loop_scope="module")
async def test_real_seeded_samples_repeat(real: AsyncEngine) -> None:
    async def sample(request_id: str, **fields: Any) -> list[str]:
        params = greedy(n=4, temperature=1.0, max_tokens=10, ignore_eos=True, **fields)
        outputs = await collect(real.generate("The quick", params, request_id))
        return [text_of(outputs, index) for index in range(4)]

    first = await sample("s1", seed=3)
    assert len(set(first)) == 4
    assert await sample("s2", seed=3) == first
    assert (await sample("s3", seed=4))[:3] == first[1:]  # completion i has seed + i


@pytest.mark.asyncio(loop_scope="module")
async def test_real_stop_strings_and_prefix_hits(real: AsyncEngine) -> None:
    params = greedy(max_tokens=30, ignore_eos=True)
    whole = text_of(await collect(real.generate("The quick brown fox" * 12, params, "w")))
    stop = whole[9:12]
    outputs = await collect(
        real.generate("The quick brown fox" * 12, params.clone(stop=stop), "stopped")
    )
    assert text_of(outputs) == whole[: whole.index(stop)]
    assert (outputs[-1].num_cached_tokens or 0) > 0
    assert await has_no_pages(real)


@pytest.mark.asyncio(loop_scope="module")
async def test_real_cancelled_streams_leave_no_pages(real: AsyncEngine) -> None:
    """More streams than fit, left at any moment."""

    async def leave_after(i: int) -> None:
        stream = real.generate([3 + i] * (5 + 3 * i), greedy(max_tokens=100), f"c{i}")
        async with contextlib.aclosing(stream):
            async for output in stream:
                if len(output.outputs[0].token_ids) and i % 3:
                    return

    tasks = [asyncio.create_task(leave_after(i)) for i in range(16)]
    await asyncio.sleep(0.1)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await collect(real.generate("flush", greedy(max_tokens=2), "last"))
    assert await has_no_pages(real)
    assert await real.reset_prefix_cache()

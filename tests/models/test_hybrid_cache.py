"""Caches of layers with windows beside layers that attend fully, in Gemma 3's pattern of five to
one: how many tokens they hold, and that prefix hits are right in both groups.
"""

import pytest

from jengine.config import CacheConfig
from jengine.kv_spec import KVGroup, KVSpec, build_groups
from jengine.models.gemma3 import Gemma3Config, Gemma3ForCausalLM
from jengine.request import Request, SamplingParams
from jengine.runtime.memory import plan_pages
from tests.oracles.driver import Driver
from tests.oracles.tiny_llama import make_tiny_llama

torch = pytest.importorskip("torch")

GIB = 1 << 30
LENGTH_32K = 32768
GEMMA3_4B = dict(
    vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
    num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024,
)  # fmt: skip
PAGE = 16
WINDOW = 20
PROMPT = [3 + (7 * i) % 500 for i in range(96)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def long_request_pages(groups: tuple[KVGroup, ...]) -> tuple[int, ...]:
    return tuple(group.max_pages(LENGTH_32K, 512) for group in groups)


def num_tokens_held(specs: tuple[KVSpec, ...]) -> float:
    """Tokens of requests of 32k that 16 GiB of pages hold."""
    groups = build_groups(specs, PAGE)
    pages = plan_pages(
        groups, CacheConfig(kv_cache_memory_bytes=16 * GIB), free_bytes=0, is_planned=True,
        max_model_len=LENGTH_32K, max_chunk=512, max_num_seqs=256,
    )  # fmt: skip
    needs = long_request_pages(groups)
    return LENGTH_32K * min((have - 1) / need for have, need in zip(pages, needs, strict=True))


def test_a_gemma3_cache_holds_four_times_the_tokens() -> None:
    cfg = Gemma3Config.from_hf(
        GEMMA3_4B, dtype="bfloat16", kv_dtype="bfloat16", max_model_len=LENGTH_32K
    )
    assert cfg.layer_windows == ((1024,) * 5 + (None,)) * 5 + (1024,) * 4
    specs = Gemma3ForCausalLM.kv_specs(cfg)
    full = next(spec for spec in specs if spec.window is None)
    assert num_tokens_held(specs) >= 4 * num_tokens_held((full,) * len(specs))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory):
    """(the oracle, our engine): unused pages hold NaN, so that a wrong hit shows."""
    folder = tmp_path_factory.mktemp("gemma3")
    hf_model = make_tiny_llama(
        folder, family="Gemma3", num_hidden_layers=6, head_dim=16, sliding_window=WINDOW,
        attn_implementation="eager",
    )  # fmt: skip
    driver = Driver(
        folder, max_model_len=128, page_size=PAGE, num_pages=64, max_num_seqs=2,
        max_num_batched_tokens=64, prefill_buckets=(64,), decode_buckets=(2,),
    )  # fmt: skip
    assert [group.spec.window for group in driver.runner.groups] == [WINDOW, None]
    return hf_model, driver


def greedy(hf_model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, hf_model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


def serve(driver: Driver, name: str, prompt: list[int]) -> Request:
    request = Request(name, list(prompt), GREEDY)
    driver.run([request])
    return request


@pytest.mark.parametrize("shared", [32, 64, 95])
def test_prefix_hits_are_right_in_both_groups(gemma3, shared: int) -> None:
    """A hit may end anywhere: the window's group then has to hold the pages before that end, also
    those that the first request had already passed and given back.
    """
    hf_model, driver = gemma3
    driver.reset()
    first = serve(driver, "first", PROMPT)
    prompt = PROMPT[:shared] + [300 + i for i in range(20)]
    second = serve(driver, "second", prompt)
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == shared // PAGE * PAGE
    assert first.output_token_ids == greedy(hf_model, PROMPT)
    assert second.output_token_ids == greedy(hf_model, prompt)

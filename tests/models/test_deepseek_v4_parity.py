"""DeepSeek-V4 against Hugging Face transformers in float32: random configurations, the entries that
each token attends to, and whatever the engine does to a request.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jengine.models.deepseek_v4 import indexer
from jengine.pallas_kernels.select_tokens.api import select_tokens
from jengine.request import Request, SamplingParams
from tests.oracles.core_pump import CorePump
from tests.oracles.deepseek_v4 import HEAVY, SLIDING, SPARSE, logits_of, make_deepseek_v4
from tests.oracles.driver import Driver

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.models.test_families import check_bfloat16  # imports both

TOLERANCE = 1e-4
LENGTH = 75
CASES: dict[str, dict[str, Any]] = {
    "heavy-first": dict(layer_types=[HEAVY, HEAVY, SPARSE, HEAVY], seed=1),  # as Pro begins
    "window-only": dict(layer_types=[SLIDING] * 2, num_hidden_layers=2, num_hash_layers=0, seed=2),
    "sparse-only": dict(
        layer_types=[SPARSE] * 3, num_hidden_layers=3, index_topk=7, sliding_window=5,
        num_hash_layers=2, seed=3,
    ),
    "other-sizes": dict(
        hidden_size=40, num_attention_heads=6, o_groups=3, o_lora_rank=7, head_dim=24,
        qk_rope_head_dim=12, q_lora_rank=20, index_head_dim=20, index_n_heads=24, index_topk=5,
        n_routed_experts=11, num_experts_per_tok=4, moe_intermediate_size=36, swiglu_limit=1.5,
        compress_rates={SPARSE: 4, HEAVY: 16}, sliding_window=11, routed_scaling_factor=2.5,
        seed=4,
    ),
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


def tokens(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 96, length).tolist()


@pytest.mark.slow  # 5 s each: golden logits are compared by default
@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(name: str, tmp_path: Path) -> None:
    hf_model = make_deepseek_v4(tmp_path, **CASES[name])
    driver = Driver(
        tmp_path, max_model_len=LENGTH + 5, num_pages=16, max_num_seqs=1,
        prefill_buckets=(LENGTH,), decode_buckets=(1,), max_num_batched_tokens=LENGTH,
    )  # fmt: skip
    expected = logits_of(hf_model, tokens(LENGTH))
    for chunks in ([LENGTH], [9, 1, 1, LENGTH - 11]):
        logits = driver.logits(tokens(LENGTH), chunks)
        assert np.abs(logits - expected).max() <= TOLERANCE, chunks
    check_bfloat16(driver.loaded.checkpoint.hf_config)


@pytest.mark.slow
def test_each_token_attends_to_the_entries_that_it_attends_to_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each layer with an indexer; from token 32 on there are more than seven to choose from."""
    case = CASES["sparse-only"]
    hf_model = make_deepseek_v4(tmp_path, **case)
    chosen: list[np.ndarray] = []
    for layer in hf_model.model.layers:
        layer.self_attn.compressor.indexer.register_forward_hook(
            lambda module, args, output: chosen.append(output[0].numpy())
        )
    logits_of(hf_model, tokens(LENGTH))
    seen: list[np.ndarray] = []

    def recording(*args: Any, **kwargs: Any) -> jax.Array:
        slots_Tk = select_tokens(*args, **kwargs)
        jax.debug.callback(lambda slots: seen.append(np.asarray(slots)), slots_Tk, ordered=True)
        return slots_Tk

    monkeypatch.setattr(indexer, "select_tokens", recording)
    driver = Driver(
        tmp_path, max_model_len=LENGTH + 5, num_pages=16, max_num_seqs=1,
        prefill_buckets=(LENGTH,), decode_buckets=(1,), max_num_batched_tokens=LENGTH,
    )  # fmt: skip
    driver.logits(tokens(LENGTH), [LENGTH])
    jax.effects_barrier()
    assert len(seen) == len(chosen) == len(hf_model.model.layers)
    first_slot = driver.runner.groups[0].entries_per_page  # pages are 1, 2, ... in order
    for ours, theirs in zip(seen, chosen, strict=True):
        for t in range(LENGTH):
            num_seen = (t + 1) // 4
            entries = {int(slot) - first_slot for slot in ours[t] if slot >= 0}
            assert entries == {int(j) for j in theirs[t] if 0 <= j < num_seen}
            assert len(entries) == min(num_seen, case["index_topk"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("deepseek_v4")
    return folder, make_deepseek_v4(folder)


def greedy(hf_model: Any, prompt: list[int], num_tokens: int = GREEDY.max_tokens or 0) -> list[int]:
    """What transformers says to a prompt, computed anew for each token."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(logits_of(hf_model, ids)[-1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module", params=[1, 5], ids=["single-steps", "five-steps"])
def pump(model: tuple[Path, Any], request: pytest.FixtureRequest) -> CorePump:
    return CorePump(
        model[0], load_format="auto", page_size=8, max_model_len=80, num_pages=14,
        max_decode_steps=request.param, prefill_buckets=(32,), decode_buckets=(4,),
    )  # fmt: skip


@pytest.mark.slow
def test_preemption_and_aborts_change_no_token(pump: CorePump, model: tuple[Path, Any]) -> None:
    """13 pages of entries for four requests, which grow to 3 to 7; two leave in the middle."""
    pump.messages.clear()
    before = pump.core.stats().num_preemptions
    prompts = {f"r{n}": tokens(n, n) for n in (3, 17, 30, 31, 40, 9)}
    for request_id, prompt in prompts.items():
        pump.submit(request_id, prompt, GREEDY)
        pump.turn()
    pump.submit("a", tokens(20, 1), GREEDY)
    for _ in range(4):
        pump.turn()
    pump.abort("a")
    pump.drain()
    got = pump.tokens()
    assert {r: got[r] for r in prompts} == {r: greedy(model[1], p) for r, p in prompts.items()}
    assert pump.core.stats().num_preemptions > before
    assert pump.core.stats().num_pages_used == 0


@pytest.mark.slow
def test_prefix_hits_go_on_from_entries_and_states(model: tuple[Path, Any]) -> None:
    """Steps end at 32 and 43 and after each token: a state is found at 32 and where pages of 8 end
    later, at 48."""
    driver = Driver(
        model[0], max_model_len=80, page_size=8, num_pages=40, max_num_seqs=2,
        max_num_batched_tokens=32, prefill_buckets=(32,), decode_buckets=(2,),
    )  # fmt: skip
    first = Request("first", tokens(43), GREEDY)
    driver.run([first])
    text = [*tokens(43), *first.output_token_ids]
    for length, cached in ((33, 32), (47, 32), (50, 48), (59, 56)):
        second = Request("second", text[:length], GREEDY.clone(max_tokens=3))
        driver.run([second])
        assert second.num_cached_tokens == cached
        assert second.output_token_ids == greedy(model[1], text[:length], 3)

"""Tensor and expert parallelism over fake CPU devices against one device: the same tokens, and the
same logits to the rounding of float32 sums in another order.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jengine.config import EngineConfig
from jengine.layers.param import abstract_parameters
from jengine.models.loader import open_model
from jengine.protocol import CoreReady
from jengine.request import SamplingParams
from jengine.runtime.blueprint import draw_blueprint, open_artifacts
from jengine.runtime.memory import open_devices
from jengine.sharding.placement import Placement
from jengine.text.tokenizer import Tokenizer
from tests.oracles.core_pump import CorePump
from tests.oracles.driver import Driver
from tests.oracles.dummy_model import write_dummy_model
from tests.sharding.parity import REQUESTS, open_driver, serve

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.models.families import CASES as DENSE  # imports both
from tests.models.test_deepseek_parity import CASES as DEEPSEEK
from tests.models.test_deepseek_v32_parity import CASES as SPARSE_ATTENTION
from tests.models.test_gated_hybrid_parity import CASES as HYBRID
from tests.models.test_moe_parity import CASES as MOE
from tests.oracles.tiny_llama import make_tiny_llama

pytestmark = pytest.mark.multi_device

TOLERANCE = 1e-5
TP2, TP4, TP8 = (dict(tensor_parallel_size=n) for n in (2, 4, 8))
EP2, EP4, EP8 = (dict(tp, enable_expert_parallel=True) for tp in (TP2, TP4, TP8))
DP2_EP = dict(data_parallel_size=2, enable_expert_parallel=True)
DP2_TP2_EP = DP2_EP | TP2
TP2_EP2, TP4_EP2 = (dict(ep, expert_parallel_size=2) for ep in (EP4, EP8))
MESHES = {"tp2": TP2, "tp4": TP4, "ep2": EP2, "ep4": EP4, "tp2-ep2": TP2_EP2}
MIXTRAL_OF_EIGHT = dict(
    architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=2
)  # fmt: skip
DIGITS = '{"grammars": [{"lark_grammar": "start: /[0-9]+/"}]}'
SERVED: dict[str, Any] = dict(
    load_format="auto", max_num_seqs=3, prefill_buckets=(32,), decode_buckets=(3,)
)  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{name: dict(case.config, family=case.family) for name, case in DENSE.items()},
    **{f"moe-{name}": case for name, case in MOE.items()},
    **{f"deepseek-{name}": case for name, case in DEEPSEEK.items()},
    **{f"deepseek-{name}": case for name, case in SPARSE_ATTENTION.items()},
    **{f"hybrid-{name}": case for name, case in HYBRID.items()},
}


def check(folder: Path, case: dict[str, Any], mesh: dict[str, Any]) -> Driver:
    """Returns that of the mesh."""
    make_tiny_llama(folder, **case)
    tokens, logits = serve(open_driver(folder))
    driver = open_driver(folder, **mesh)
    their_tokens, their_logits = serve(driver)
    assert np.abs(their_logits - logits).max() <= TOLERANCE
    assert their_tokens == tokens
    return driver


# Of heads that four do not divide.
BY_TWO = (
    "phi3-longrope-window", "hybrid-qwen3-next-bias-tied", "hybrid-qwen3.5-many-value-heads",
)  # fmt: skip


def products() -> Iterator[tuple[str, str]]:
    for name, case in CASES.items():
        for mesh, options in MESHES.items():
            is_for_it = "num_experts_per_tok" in case or "ep" not in mesh
            if is_for_it and (options["tensor_parallel_size"] == 2 or name not in BY_TWO):
                yield name, mesh


@pytest.mark.parametrize(("name", "mesh"), list(products()))
@pytest.mark.slow
def test_every_family(name: str, mesh: str, tmp_path: Path) -> None:
    case = CASES[name]
    for field in ("num_experts", "num_local_experts"):  # where they divide by few
        if field in case:
            case = case | {field: -(-case[field] // 4) * 4}
    check(tmp_path, case, MESHES[mesh])


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama", TP8), ("moe-qwen3", TP8), ("moe-qwen3", EP8), ("moe-qwen3", TP4_EP2),
        ("deepseek-v3", TP8), ("deepseek-v3", EP8), ("deepseek-v32", EP8),
        ("hybrid-qwen3-next", TP8), ("hybrid-qwen3-next", TP4_EP2),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.slow
def test_eight_ranks(name: str, mesh: dict[str, Any], tmp_path: Path) -> None:
    """More ranks than heads of keys, of linear attention too."""
    case = CASES[name] | dict(num_attention_heads=8)
    if "linear_num_value_heads" in case:
        case |= dict(linear_num_value_heads=8)
    if "n_routed_experts" in case:
        case |= dict(n_routed_experts=16)
    check(tmp_path, case, mesh)


def test_heads_of_keys_are_copied_and_a_layer_sums_twice(tmp_path: Path) -> None:
    """Llama over four ranks with two heads of keys. The step's collectives: a sum for the
    embedding, two for each of two layers, the vocabulary's parts side by side.
    """
    driver = check(tmp_path, dict(attention_bias=True, mlp_bias=True), TP4)
    for bucket in ("3x3", "32x3"):
        assert collectives(driver, bucket) == {"all-reduce": 5, "all-gather": 1}
    assert driver.runner.groups[0].spec.entry_shape == (2, 1, 16)
    plan = driver.runner.memory_plan()
    assert plan.kv_cache == 16 * 16 * 2 * 1 * 16 * 4 * 2  # pages of 16 tokens, on each device
    whole = sum(info.num_bytes for info in abstract_parameters(driver.loaded.module).values())
    assert whole / 4 < plan.parameters < whole / 3


def test_experts_are_shared_out(tmp_path: Path) -> None:
    """Qwen3-MoE over two ranks by two: a layer sums twice, routed experts included."""
    driver = check(tmp_path, dict(MOE["qwen3"], num_hidden_layers=1), TP2_EP2)
    (gate_up,) = (p for path, p in driver.runner.params.items() if "gate_up" in path)
    assert gate_up.sharding.shard_shape(gate_up.shape) == (4, 40, 64)
    assert collectives(driver, "3x3") == {"all-reduce": 3, "all-gather": 1}


@pytest.mark.slow  # 8 s; its parts are in other tests
def test_shared_experts_and_latents(tmp_path: Path) -> None:
    """DeepSeek-V3 over two ranks, each with half of the experts: shared ones are summed with the
    routed ones, and every rank keeps all latents.
    """
    driver = check(tmp_path, DEEPSEEK["v3-no-q-lora"], EP2)
    assert collectives(driver, "3x3") == {"all-reduce": 5, "all-gather": 1}
    # XLA joins sums that do not wait for each other: there are none to join.
    assert driver.runner.blueprint.table.lower("3x3").as_text().count("all_reduce") == 5
    assert driver.runner.groups[0].spec.entry_shape == (48 + 16,)


def collectives(driver: Driver, bucket: str) -> dict[str, int]:
    """How many of each kind the compiled step has."""
    return count_collectives(driver.runner.programs[bucket].as_text())


def count_collectives(hlo: str | None) -> dict[str, int]:
    assert hlo is not None
    kinds = re.findall(
        r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", hlo
    )
    return dict(Counter(kinds))


@pytest.mark.parametrize(
    ("mesh", "config"), [(TP4, {}), (DP2_TP2_EP, MIXTRAL_OF_EIGHT)], ids=["tp4", "dp2-tp2-ep"]
)
@pytest.mark.slow
def test_the_engine_serves_the_same(
    mesh: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """Sampled, penalised, scored, planned ahead and several steps in a dispatch; from executables
    on disk the second time.
    """
    folder = write_dummy_model(tmp_path / "model", vocab_size=130, **config)  # four do not divide
    one = outputs(folder, tmp_path)
    assert len(one.logprobs) > 100
    compiled, loaded = (outputs(folder, tmp_path, **mesh) for _ in range(2))
    assert compiled.num_compiled > 0 and loaded.num_compiled == 0
    for four in (compiled, loaded):
        assert four.tokens == one.tokens
        np.testing.assert_allclose(four.logprobs, one.logprobs, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(four.hidden, one.hidden, rtol=0, atol=TOLERANCE)
    two = outputs(folder, tmp_path, **TP2)
    assert two.num_compiled > 0 and two.tokens == one.tokens


@pytest.mark.slow
def test_data_ranks_constrain_preempt_and_abort(tiny_llama: Path) -> None:
    """Few pages on each rank, a grammar on one of them, a request that goes away."""

    def serve(pump: CorePump) -> dict[str, list[int]]:
        for i in range(7):
            params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
            pump.submit(f"r{i}", list(range(3 + i, 20 + i)), params)
        pump.submit("bound", [5, 6], SamplingParams(temperature=0, max_tokens=20), grammar=DIGITS)
        pump.turn()
        pump.turn()
        pump.abort("r3")
        pump.drain()
        return {name: tokens for name, tokens in pump.tokens().items() if name != "r3"}

    one = CorePump(tiny_llama, load_format="auto", num_pages=160)
    two = CorePump(tiny_llama, load_format="auto", num_pages=17, data_parallel_size=2)
    assert serve(two) == serve(one)
    assert two.core.scheduler.stats().num_preemptions > 0
    assert two.core.scheduler.stats().num_pages_total == 2 * 16
    text = Tokenizer.from_folder(tiny_llama).decode(two.tokens()["bound"])
    assert re.match(r"\d+", text)


def test_data_ranks_serve_their_own_requests(tmp_path: Path) -> None:
    """Qwen3-MoE: two ranks with requests of their own and half of the experts each. A layer gathers
    tokens, choices and weights, and scatters the sums.
    """
    make_tiny_llama(tmp_path, **dict(MOE["qwen3"], num_hidden_layers=1))
    one, two = CorePump(tmp_path, **SERVED), CorePump(tmp_path, **SERVED, **DP2_EP)
    for pump in (one, two):
        for i, (prompt, answer) in enumerate(REQUESTS):
            tokens = np.random.default_rng(i).integers(3, 512, prompt).tolist()
            params = SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True, logprobs=4)
            pump.submit(f"r{i}", tokens, params)
        pump.drain()
    assert two.tokens() == one.tokens()
    np.testing.assert_allclose(logprobs_of(two), logprobs_of(one), rtol=0, atol=TOLERANCE)
    hlo = two.core.runner.programs["3x3"].as_text()
    assert count_collectives(hlo) == {"all-gather": 3, "reduce-scatter": 1}


def test_executables_of_different_meshes_are_kept_apart(tmp_path: Path) -> None:
    write_dummy_model(tmp_path / "model", **MIXTRAL_OF_EIGHT)
    cache = dict(keep_executables=True, cache_dir=str(tmp_path / "cache"), load_format="dummy")

    def folder(mesh: dict[str, Any]) -> Path:
        config = EngineConfig.from_kwargs(str(tmp_path / "model"), num_pages=8, **cache, **mesh)
        devices, memory = open_devices(config.cache, config.parallel.num_ranks)
        model = open_model(config)
        placement = Placement(model.split, devices)
        artifacts = open_artifacts(config, placement)
        found = draw_blueprint(config, model, placement, memory, artifacts).programs._store.folder
        assert found is not None
        return found

    four = [folder(mesh) for mesh in (TP4, EP4, TP2_EP2, DP2_TP2_EP)]
    assert len({each.parent for each in four}) == 4  # of one toolchain
    assert {each.parent.parent for each in four} == {folder(TP4).parent.parent}
    assert folder(TP4) == four[0]
    assert folder(TP2).parent.parent != four[0].parent.parent


@dataclasses.dataclass
class Served:
    tokens: dict[str, list[int]]
    logprobs: list[float]
    hidden: np.ndarray  # of a text outside the cache
    num_compiled: int


def outputs(model: Path, tmp_path: Path, **options: Any) -> Served:
    kept = dict(keep_executables=True, cache_dir=str(tmp_path / "cache"))
    pump = CorePump(
        model, **(SERVED | kept | dict(load_format="dummy")), max_decode_steps=4, **options
    )
    rng = np.random.default_rng(1)
    for i, (prompt, answer) in enumerate(REQUESTS):
        params = SamplingParams(
            temperature=0.8 * (i % 2), top_k=20, max_tokens=answer, ignore_eos=True,
            repetition_penalty=1.0 + 0.2 * (i % 3), logprobs=4 if i < 3 else None,
            prompt_logprobs=2 if i == 1 else None, logit_bias={40 + i: 4.0},
        )  # fmt: skip
        pump.submit(f"r{i}", rng.integers(3, 128, prompt).tolist(), params, seed=i)
    pump.drain()
    ready = next(message for message in pump.messages if isinstance(message, CoreReady))
    hidden = np.asarray(pump.core.runner.hidden_states(list(range(3, 30))))
    return Served(pump.tokens(), logprobs_of(pump), hidden, ready.num_compiled)


def logprobs_of(pump: CorePump) -> list[float]:
    """Of outputs, then of prompts, request by request."""
    found = sorted(pump.outputs().items())
    entries = [e for _, outputs in found for o in outputs for e in o.logprobs or []]
    entries += [e for _, outputs in found for o in outputs for e in o.prompt_logprobs or []]
    return [value for entry in entries for value in entry.logprobs]


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ({}, dict(tensor_parallel_size=3), r"num_attention_heads \(4\) does not divide over 3"),
        (dict(intermediate_size=98), TP4, r"intermediate_size \(98\)"),
        (dict(num_attention_heads=12, num_key_value_heads=3), TP4, r"num_key_value_heads \(3\)"),
        ({}, EP2, "no routed experts"),
        ({}, dict(TP4, data_parallel_size=3), "is 12, but 8 devices"),
    ],
)
def test_what_cannot_be_split_is_refused(
    overrides: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_dummy_model(tmp_path, **overrides)
    with pytest.raises(ValueError, match=message):
        open_driver(tmp_path, load_format="dummy", **options)


def test_experts_that_cannot_be_split_are_refused(tmp_path: Path) -> None:
    sparse = dict(
        architectures=["MixtralForCausalLM"], num_local_experts=6, num_experts_per_tok=2,
        intermediate_size=98,
    )  # fmt: skip
    write_dummy_model(tmp_path, **sparse)
    for options, message in ((EP4, r"num_experts \(6\)"), (TP4, r"moe_intermediate_size \(98\)")):
        with pytest.raises(ValueError, match=message):
            open_driver(tmp_path, load_format="dummy", **options)

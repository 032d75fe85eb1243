"""Ready early, prebuilt, restarted: what is compiled when, and under which key.

One cache is filled by `prebuild`; a test takes a copy, and out of it what is to be compiled anew.
"""

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
import pytest

from jengine.config import EngineConfig
from jengine.engine import EngineCore
from jengine.models.loader import open_model
from jengine.prebuild import Prebuilt, prebuild
from jengine.protocol import CallUtility, CoreReady, FromCore, Shutdown, UtilityResult
from jengine.request import SamplingParams
from jengine.runtime import memory
from jengine.runtime.aot import ExecutableStore
from jengine.runtime.blueprint import Blueprint, draw_blueprint, open_artifacts
from jengine.runtime.memory import DeviceMemory
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split
from tests.oracles.core_pump import CorePump
from tests.oracles.dummy_model import write_dummy_model

# Three essential buckets (32x2, 2x2, 1x1) and 16x2.
OPTIONS: dict[str, Any] = dict(
    dtype="float32", load_format="dummy", max_num_seqs=2, max_num_batched_tokens=32, page_size=8,
    prefill_buckets=(16, 32), max_model_len=128, keep_executables=True,
)  # fmt: skip
PAGES: dict[str, Any] = dict(num_pages=24, poison=True)
NAMES = {"32x2", "16x2", "2x2", "1x1", "score", "set_row", "set_pages", "empty_state"}
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
MIB = 1 << 20


@dataclasses.dataclass
class Machine:
    """A model, and a cache of executables."""

    model: Path
    cache: Path

    def config(self, **options: Any) -> EngineConfig:
        options = OPTIONS | dict(cache_dir=str(self.cache)) | options
        return EngineConfig.from_kwargs(str(self.model), **options)

    def start(self, **options: Any) -> CorePump:
        options = OPTIONS | PAGES | dict(cache_dir=str(self.cache)) | options
        return CorePump(self.model, **options)

    def forget(self, *names: str) -> None:
        for name in names:
            (file,) = self.cache.rglob(name)
            file.unlink()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, Prebuilt]:
    folder = tmp_path_factory.mktemp("machine")
    write_dummy_model(folder / "model", num_hidden_layers=1)
    machine = Machine(folder / "model", folder / "cache")
    return machine, prebuild(machine.config(**PAGES))


@pytest.fixture
def machine(built: tuple[Machine, Prebuilt], tmp_path: Path) -> Machine:
    shutil.copytree(built[0].cache, tmp_path / "cache")
    return Machine(built[0].model, tmp_path / "cache")


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Everything that XLA compiles in this process, ours or not."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: (
            events.append(event) if "backend_compile" in event else None
        )
    )
    try:
        yield events
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.fixture
def slow_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """What is compiled is not done until the event is set."""
    gate = threading.Event()
    save = ExecutableStore.save

    def save_late(self: ExecutableStore, name: str, compiled: jax.stages.Compiled) -> None:
        assert gate.wait(60)
        save(self, name, compiled)

    monkeypatch.setattr(ExecutableStore, "save", save_late)
    yield gate
    gate.set()


def greeting(pump: CorePump) -> CoreReady:
    return next(message for message in pump.messages if isinstance(message, CoreReady))


def answer(pump: CorePump) -> UtilityResult:
    """Turns the core until a call is answered; blocks when it has nothing to do."""
    while True:
        for message in pump.messages:
            if isinstance(message, UtilityResult):
                return message
        pump.core.turn()


def prefill_ten(pump: CorePump) -> tuple[list[int], int]:
    """A prompt of ten tokens: (the token sampled, tokens of the bucket that was used)."""
    pump.core.scheduler.reset_prefix_cache()
    pump.messages.clear()
    pump.submit("ten", list(range(3, 13)), ONE_TOKEN)
    pump.drain()
    return pump.tokens()["ten"], pump.core.stats().padded_tokens


def test_large_buckets_serve_while_small_ones_compile(
    machine: Machine, slow_compiler: threading.Event
) -> None:
    machine.forget("16x2", "score")
    pump = machine.start(background_compile=True)
    ready = greeting(pump)
    assert (ready.num_compiled, ready.num_compiling) == (0, 2)
    early, padded = prefill_ten(pump)
    assert padded == 32
    assert pump.core.stats().num_compiling == 2

    pump.core.submit(CallUtility(7, "wait_until_compiled"))
    pump.turn()
    assert not [m for m in pump.messages if isinstance(m, UtilityResult)]
    slow_compiler.set()
    result = answer(pump)
    assert (result.call_id, result.error) == (7, None)
    assert msgspec.msgpack.decode(result.value) == len(NAMES)

    late, padded = prefill_ten(pump)
    assert padded == 16
    assert late == early
    assert pump.core.stats().num_compilations == 0
    assert pump.core.stats().num_compiling == 0


def test_what_is_needed_now_is_waited_for(machine: Machine, slow_compiler: threading.Event) -> None:
    """Prompt log-probabilities have no larger program to fall back on."""
    machine.forget("score")
    pump = machine.start(background_compile=True)
    timer = threading.Timer(0.5, slow_compiler.set)
    timer.start()
    pump.submit("scored", [3, 4, 5, 6], ONE_TOKEN.clone(prompt_logprobs=1))
    pump.drain()
    timer.join()
    assert sum(len(o.prompt_logprobs or []) for o in pump.outputs()["scored"]) == 3
    assert pump.core.stats().num_compilations == 0


def test_essential_buckets_are_waited_for(machine: Machine, slow_compiler: threading.Event) -> None:
    machine.forget("32x2", "16x2")
    timer = threading.Timer(0.5, slow_compiler.set)
    timer.start()
    pump = machine.start(background_compile=True)
    assert slow_compiler.is_set()
    assert "32x2" in pump.core.runner.programs.ready


def test_a_bucket_that_cannot_be_compiled_is_done_without(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(self: ExecutableStore, name: str, compiled: jax.stages.Compiled) -> None:
        raise ValueError("out of something")

    machine.forget("16x2")
    monkeypatch.setattr(ExecutableStore, "save", save)
    pump = machine.start(background_compile=True)
    pump.core.submit(CallUtility(1, "wait_until_compiled"))
    assert "out of something" in (answer(pump).error or "")
    assert prefill_ten(pump)[1] == 32
    assert pump.core.stats().num_compilations == 0
    with pytest.raises(ValueError, match="out of something"):
        machine.start(background_compile=False)


def test_all_are_waited_for_without_background(machine: Machine) -> None:
    machine.forget("16x2", "score")
    for background in (False, None):  # on a CPU the default
        pump = machine.start(background_compile=background)
        assert greeting(pump).num_compiling == 0
        assert set(pump.core.runner.programs.ready) == NAMES
        pump.core.submit(CallUtility(3, "wait_until_compiled"))
        assert msgspec.msgpack.decode(answer(pump).value) == len(NAMES)


def test_a_start_compiles_nothing_after_prebuild(
    machine: Machine, built: tuple[Machine, Prebuilt]
) -> None:
    """Not even a fill of the KV cache, or a draw of dummy weights."""
    result = built[1]
    assert {e.name for e in result.executables if e.was_compiled} == NAMES
    for entry in result.executables:
        (file,) = Path(result.folder).rglob(entry.name)
        assert entry.num_bytes == file.stat().st_size
    with compilations() as events:
        pump = machine.start()
        assert events == []
        jax.jit(lambda x: x * 5 - 1)(np.ones(9))
        assert events  # the listener does hear
    ready = greeting(pump)
    assert ready.num_compiled == 0
    assert sum(ready.phases.values()) == pytest.approx(ready.startup_seconds, rel=0.2)
    assert set(ready.phases) == {
        "device", "model", "plan", "load", "compile", "weights", "kv cache",
    }  # fmt: skip

    assert pump.core.runner.num_pages == result.num_pages
    again = prebuild(machine.config(**PAGES))
    assert [e.name for e in again.executables if e.was_compiled] == []


def test_loaded_executables_give_the_tokens_of_compiled_ones(machine: Machine) -> None:
    params = SamplingParams(temperature=0.9, max_tokens=8, ignore_eos=True)
    loaded, compiled = machine.start(), machine.start(keep_executables=False)
    assert greeting(compiled).num_compiled == len(NAMES)
    assert loaded.alone([3, 4, 5], params, seed=7) == compiled.alone([3, 4, 5], params, seed=7)


def test_a_closed_core_frees_the_kv_cache_and_compiles_no_more(
    machine: Machine, slow_compiler: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.forget("16x2", "score")
    monkeypatch.setattr("jengine.runtime.programs.BACKGROUND_THREADS", 1)
    messages: list[FromCore] = []
    config = machine.config(**PAGES, background_compile=True)
    core = EngineCore(config, messages.append)
    core.submit(Shutdown())
    core.run()
    assert isinstance(messages[-1], CoreReady)
    assert all(x.is_deleted() for x in (*core.runner.kv, core.runner.rows.bias))
    assert core.stats().num_compiling == 1  # being compiled when the order came; `score` is dropped
    slow_compiler.set()
    core.runner.programs._queue.wait(["16x2"])
    assert "score" not in core.runner.programs.ready


def test_a_damaged_executable_is_compiled_again(machine: Machine) -> None:
    (victim,) = machine.cache.rglob("score")
    victim.write_bytes(victim.read_bytes()[:-100])
    assert greeting(machine.start()).num_compiled == 1
    assert greeting(machine.start()).num_compiled == 0


def test_the_key_follows_flags_sources_and_model(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def toolchain() -> Path:
        folder = open_artifacts(machine.config(), one_device()).toolchain
        assert folder is not None
        return folder

    def programs(**options: Any) -> Path:
        folder = blueprint(machine.config(**(PAGES | options))).programs._store.folder
        assert folder is not None
        return folder

    plain, first = toolchain(), programs()
    assert first.parent.parent == plain
    assert programs() == first
    meta = msgspec.json.decode((plain / "meta.json").read_bytes())
    assert (meta["jax"], meta["device_kind"], meta["xla_flags"]) == (jax.__version__, "cpu", "")
    assert programs(num_pages=25).parent == first.parent
    different = [
        programs(num_pages=25),
        programs(poison=False),
        programs(max_num_seqs=1),
        programs(max_model_len=100),
        programs(dtype="bfloat16"),
        programs(hf_overrides={"rms_norm_eps": 1e-6}),
    ]
    monkeypatch.setattr("jengine.runtime.blueprint.source_digest", lambda: "edited")
    different.append(programs())
    assert different[-1].parent.parent == plain
    assert len({first, *different}) == 1 + len(different)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert toolchain() != plain


# --- planned memory, as on a GPU, with the figures of this CPU's executables


def blueprint(config: EngineConfig, device_memory: DeviceMemory | None = None) -> Blueprint:
    placement = one_device()
    known = device_memory or memory.device_memory(placement.device, config.cache)
    artifacts = open_artifacts(config, placement)
    return draw_blueprint(config, open_model(config), placement, known, artifacts)


def one_device() -> Placement:
    return Placement(Split(), (jax.devices()[0],))


def test_planned_pages_fill_the_pool(machine: Machine) -> None:
    config = machine.config()
    pool = DeviceMemory(budget=1000 * MIB, pool=900 * MIB, is_planned=True)
    with compilations() as events:
        plan = blueprint(config, pool)
        assert len(events) == 2  # of the largest mixed and decode buckets, for their figures
        again = blueprint(config, pool)
        assert len(events) == 2  # which are noted
    assert again.num_pages == plan.num_pages

    # Worked out from the model's shapes: what is left of the pool is less than a page.
    parameters = 4 * (2 * 128 * 64 + 128 * 64 + 64 * 64 + 192 * 64 + 64 * 96 + 3 * 64)
    rows = 2 * (4 + 128 * (4 + 1 + 4) + 4 * 128 // 8)
    reserve = 512 * MIB + 4 * 192 * 64  # and the largest parameter that XLA multiplies by
    step = plan.table.lower("32x2").compile().memory_analysis()
    assert step is not None
    batch = 4 * plan.table.layouts[max(plan.buckets)].size
    outputs = step.output_size_in_bytes - step.alias_size_in_bytes
    workspace = step.temp_size_in_bytes + 2 * (outputs + batch)
    page = 8 * (2 * 2 * 16 * 4)  # tokens of (K and V, heads, head size, bytes), one layer
    used = parameters + rows + reserve + workspace + plan.num_pages[0] * page
    assert pool.pool - page < used <= pool.pool


def test_logits_leave_the_step_only_where_somebody_may_ask_for_all(machine: Machine) -> None:
    pool = DeviceMemory(budget=0, pool=0, is_planned=True)
    for max_logprobs, expected in ((20, False), (0, False), (-1, True), (1000, True)):
        config = machine.config(num_pages=30, max_logprobs=max_logprobs)
        assert blueprint(config, pool).table.spec.keeps_logits == expected, max_logprobs


def test_given_pages_need_no_measurement(machine: Machine) -> None:
    pool = DeviceMemory(budget=0, pool=0, is_planned=True)
    for given in (dict(num_pages=30), dict(kv_cache_memory_bytes=MIB)):
        with compilations() as events:
            plan = blueprint(machine.config(**given), pool)
        assert events == []
        assert plan.num_pages[0] >= 30

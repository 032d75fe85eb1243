"""Everything about a runner but its arrays: shapes, buckets, pages and programs. An engine that
starts and `jengine prebuild` draw the same one, so that what the one compiled the other finds.
"""

import dataclasses
import hashlib
import inspect
import logging
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jengine.config import EngineConfig, cache_root, xla_flags
from jengine.kv_spec import KVGroup, build_groups
from jengine.layers.param import ParamInfo, abstract_parameters
from jengine.loading import dummy
from jengine.logits_processors import count_words, load_processors
from jengine.models.loader import ModelDefinition
from jengine.pallas_kernels.linear.triton_gpu import MAX_HEAD_ROWS
from jengine.pallas_kernels.native import loader as native
from jengine.pallas_kernels.platform import is_hopper
from jengine.runtime import memory, xla_options
from jengine.runtime.aot import (
    Artifacts,
    ExecutableStore,
    ProgramCache,
    family_digest,
    source_digest,
)
from jengine.runtime.batch import BatchLayout
from jengine.runtime.batch_invariance import resolve_batch_invariant
from jengine.runtime.buckets import Bucket, build_buckets, essential_buckets, preparation_order
from jengine.runtime.decode_steps import bytes_of_one_token, choose_max_decode_steps
from jengine.runtime.expert_slots import expert_layers, slot_tables
from jengine.runtime.logits_processing import check_processors
from jengine.runtime.memory import DeviceMemory, ExecutableMemory
from jengine.runtime.programs import (
    EMPTY,
    MOVE_EXPERTS,
    SCORE,
    SET_PAGES,
    SET_ROW,
    Programs,
    ProgramTable,
)
from jengine.runtime.shapes import (
    abstract_kv,
    abstract_leaf,
    abstract_rows,
    num_bytes,
)
from jengine.runtime.step import StepSpec
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split

log = logging.getLogger(__name__)

DEFAULT_TOP = (
    20  # log-probabilities computed in the step; more are made from the logits on the host
)
UNPACKED_TIMES = {"e2m1": 4, "e4m3": 2}  # as many bytes as its codes has a weight in bfloat16
GPU_COMPILE_THREADS, CPU_COMPILE_THREADS = 8, 2
# Mixed buckets grow by this. A GPU's step costs what its tokens cost; a CPU's compilation is dear.
GPU_GROWTH, CPU_GROWTH = 2, 4


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a runner is made from. Only `programs` changes: it fills with executables."""

    config: EngineConfig
    model: ModelDefinition
    placement: Placement
    device_memory: DeviceMemory  # of each device
    param_paths: tuple[str, ...]
    buckets: tuple[Bucket, ...]
    max_decode_steps: int
    num_pages: tuple[int, ...]
    reserve: int  # see `memory.reserve_bytes`
    table: ProgramTable
    key: str  # the same where programs of one name do the same
    programs: Programs

    def load(self) -> None:
        """Load the executables that are on disk."""
        self.programs.load(compile_threads(self.config, self.placement.device))

    def compile(self) -> None:
        """Compile those without which we cannot serve, or all: see `background_compile`.

        Before the KV cache is made: XLA times matrix products on copies of their operands, which
        would lie where the cache is to be.
        """
        background = self.config.compile.background_compile
        if background is None:
            background = self.placement.device.platform != "cpu"
        names = essential_programs(self.buckets) if background else self.programs.names
        self.programs.compile(len(names), compile_threads(self.config, self.placement.device))


def essential_programs(buckets: Sequence[Bucket]) -> list[str]:
    return [EMPTY, *map(str, essential_buckets(buckets)), SET_ROW, SET_PAGES]


def all_programs(table: ProgramTable) -> list[str]:
    """In the order to prepare them."""
    buckets = tuple(table.layouts)
    names = [*essential_programs(buckets), *map(str, preparation_order(buckets)), SCORE]
    if table.expert_layers:
        names.append(MOVE_EXPERTS)
    return list(dict.fromkeys(names))


def draw_blueprint(
    config: EngineConfig,
    model: ModelDefinition,
    placement: Placement,
    device_memory: DeviceMemory,
    artifacts: Artifacts,
) -> Blueprint:
    """Plans the memory; on a GPU, the first time, by compiling the largest buckets."""
    platform = placement.device.platform
    groups = build_groups(type(model.module).kv_specs(model.rank_cfg), config.cache.page_size)
    growth = CPU_GROWTH if platform == "cpu" else GPU_GROWTH
    buckets = build_buckets(config.compile, config.scheduler, growth)
    abstract, cuts = abstract_parameters(model.module), model.cuts
    leaves = tuple(
        abstract_leaf(info, cuts.get(path), placement) for path, info in abstract.items()
    )
    tables = slot_tables(model.rank_module)
    leaves += tuple(
        jax.ShapeDtypeStruct(shape, jnp.dtype("int32"), sharding=placement.replicated)
        for shape in tables.values()
    )
    of_rank = abstract_parameters(model.rank_module).values()
    max_steps = config.scheduler.max_decode_steps or choose_max_decode_steps(
        platform, bytes_of_one_token(of_rank, model.cfg)
    )
    if model.split.data > 1:  # which could not agree on a number
        max_steps = 1
    spec = _step_spec(config, model, groups)
    layouts = {b: _layout(config, model, spec, max_steps, b) for b in buckets}
    some = layouts[buckets[0]]
    table = ProgramTable(
        spec=spec,
        layouts=layouts,
        leaves=leaves,
        kv=(),
        rows=abstract_rows(
            some.num_rows,
            some.vocab_size,
            len(groups),
            some.pages_per_seq,
            placement,
            (len(tables), len(model.expert_slots)) if tables else None,
        ),
        hidden=jax.ShapeDtypeStruct((model.cfg.hidden_size,), jnp.dtype(model.cfg.dtype)),
        fill=math.nan if config.cache.poison else 0.0,
        placement=placement,
        expert_layers=expert_layers(abstract, tuple(tables)),
    )
    facts = _program_facts(model, table)
    store = artifacts.store(facts)
    reserve = memory.reserve_bytes(
        device_memory,
        largest_tuned_bytes(of_rank, buckets, is_hopper() and model.cfg.dtype == "bfloat16"),
    )
    num_pages = _plan_pages(config, model, table, device_memory, reserve, store)
    table = with_pages(table, num_pages)
    options = artifacts.options | xla_options.tuning_cache(platform, artifacts.cache("autotune"))
    inside = "-".join(map(str, num_pages)) + ("-poison" if config.cache.poison else "")
    return Blueprint(
        config=config,
        model=model,
        placement=placement,
        device_memory=device_memory,
        param_paths=tuple(abstract),
        buckets=buckets,
        max_decode_steps=max_steps,
        num_pages=num_pages,
        reserve=reserve,
        table=table,
        key=artifacts.key({**facts, "pages": inside}),
        programs=Programs(table, all_programs(table), store.inside(inside), options),
    )


def largest_tuned_bytes(
    parameters: Iterable[ParamInfo], buckets: Sequence[Bucket], has_own_head: bool
) -> int:
    """Bytes of the largest parameter that XLA multiplies by in a program compiled while we serve.

    Not those of routed experts, which have a kernel of their own; nor the output head's, if it has
    one (`has_own_head`): with more rows than that takes, the essential programs have tuned it.
    """
    essential = {bucket.num_seqs for bucket in essential_buckets(buckets)}
    is_head_tuned = not has_own_head or any(
        bucket.num_seqs > MAX_HEAD_ROWS and bucket.num_seqs not in essential for bucket in buckets
    )
    left_out = {"experts"} if is_head_tuned else {"experts", "vocab"}
    tuned = [
        p.num_bytes * UNPACKED_TIMES.get(p.init, 1)
        for p in parameters
        if left_out.isdisjoint(p.logical_axes)
    ]
    return max(tuned, default=0)


def open_artifacts(config: EngineConfig, placement: Placement) -> Artifacts:
    """Where this engine keeps what it compiles."""
    root = Path(config.compile.cache_dir or cache_root() / "executables")
    options = xla_options.compiler_options(
        placement.device.platform, xla_flags(), jax.process_count()
    )
    return Artifacts(root if config.compile.keep_executables else None, placement.devices, options)


def dummy_compiler(artifacts: Artifacts, split: Split) -> ProgramCache:
    """For the programs that draw dummy parameters; all models share them."""
    source = hashlib.sha256(inspect.getsource(dummy).encode()).hexdigest()
    return ProgramCache(artifacts.store({"dummy parameters": source, "split": repr(split)}))


def keep_jax_cache(artifacts: Artifacts) -> None:
    """On a GPU keep what is jitted beside our programs, too, unless the user has a folder for that.
    (On a CPU it saves little: such programs are small.)
    """
    is_free = jax.config.jax_compilation_cache_dir is None
    if is_free and artifacts.devices[0].platform != "cpu" and (folder := artifacts.cache("jax")):
        jax.config.update("jax_compilation_cache_dir", str(folder))


def compile_threads(config: EngineConfig, device: jax.Device) -> int:
    most = CPU_COMPILE_THREADS if device.platform == "cpu" else GPU_COMPILE_THREADS
    return config.compile.compile_threads or min(most, len(os.sched_getaffinity(0)))


def with_pages(table: ProgramTable, num_pages: tuple[int, ...]) -> ProgramTable:
    """The table for KV arrays of so many pages."""
    spec = table.spec
    kv = abstract_kv(spec.groups, spec.group_of_layer, num_pages, table.placement)
    return dataclasses.replace(table, kv=kv)


def _step_spec(
    config: EngineConfig, model: ModelDefinition, groups: tuple[KVGroup, ...]
) -> StepSpec:
    graphdef, *states = nnx.split(model.rank_module, nnx.Param, ...)
    num_top = config.max_logprobs if config.max_logprobs > 0 else DEFAULT_TOP
    num_top = min(num_top, model.cfg.vocab_size)
    return StepSpec(
        graphdef,
        jax.tree.structure(tuple(states)),
        groups,
        num_logprobs=num_top,
        keeps_logits=not 0 <= config.max_logprobs <= num_top,
        logprobs_mode=config.logprobs_mode,
        batch_invariant=resolve_batch_invariant(
            config.batch_invariant,
            model.module,
            model.cfg,
            model.split.num_ranks,
            experts_move=config.parallel.enable_eplb,
        ),
        logits_processors=load_processors(config.logits_processors),
    )


def _layout(
    config: EngineConfig, model: ModelDefinition, spec: StepSpec, max_steps: int, bucket: Bucket
) -> BatchLayout:
    return BatchLayout(
        num_tokens=bucket.num_tokens,
        num_seqs=bucket.num_seqs,
        num_groups=len(spec.groups),
        pages_per_seq=-(-model.max_model_len // spec.groups[0].page_size),
        num_rows=config.scheduler.max_num_seqs,
        vocab_size=model.cfg.vocab_size,
        max_steps=max_steps if bucket.is_decode else 1,
        num_extra=count_words(p.info for p in spec.logits_processors),
    )


def _plan_pages(
    config: EngineConfig,
    model: ModelDefinition,
    table: ProgramTable,
    device_memory: DeviceMemory,
    reserve: int,
    store: ExecutableStore,
) -> tuple[int, ...]:
    def plan(workspace: int) -> tuple[int, ...]:
        free = device_memory.pool - num_bytes(table.leaves) - workspace
        if device_memory.is_planned:
            free -= num_bytes(table.rows) + reserve
        return memory.plan_pages(
            table.spec.groups,
            config.cache,
            free_bytes=free,
            is_planned=device_memory.is_planned,
            max_model_len=model.max_model_len,
            max_chunk=config.scheduler.max_num_batched_tokens,
            max_num_seqs=config.scheduler.max_num_seqs,
        )

    is_given = config.cache.num_pages or config.cache.kv_cache_memory_bytes
    if is_given or not device_memory.is_planned:
        return plan(0)
    # Temporaries do not depend on the number of pages: any will do to find them.
    provisional = with_pages(table, plan(0))
    decode = max(bucket for bucket in table.layouts if bucket.is_decode)
    names = str(max(table.layouts)), str(decode)  # what takes most, of either kind
    if table.expert_layers:
        names += (MOVE_EXPERTS,)
    measured = _measured(provisional, names, store)
    return plan(max(map(memory.workspace_bytes, measured)))


def _measured(
    table: ProgramTable, names: Sequence[str], store: ExecutableStore
) -> list[ExecutableMemory]:
    """What programs take: as noted on disk, else by compiling them, untuned."""
    note = f"memory-{'-'.join(names)}"
    if (known := store.recall(note)) is not None:
        return [ExecutableMemory(**figures) for figures in known["programs"]]
    options = xla_options.measuring_options(table.placement.device.platform, xla_flags())
    lowered = [table.lower(name) for name in names]

    def compile_(lowered: jax.stages.Lowered, name: str) -> jax.stages.Compiled:
        return lowered.compile(compiler_options=dict(table.options(name, options)))

    with ThreadPoolExecutor(len(names)) as pool:
        compiled = list(pool.map(compile_, lowered, names))
    measured = [
        memory.executable_memory(executable, table.program(name).input_bytes)
        for executable, name in zip(compiled, names, strict=True)
    ]
    log.info("planning with %s, untuned: %s", names, measured)
    store.remember(note, {"programs": [dataclasses.asdict(m) for m in measured]})
    return measured


def _program_facts(model: ModelDefinition, table: ProgramTable) -> dict[str, Any]:
    """What programs depend on but for the toolchain, the bucket and the number of pages."""
    layouts = table.layouts.values()
    max_steps = max(layout.max_steps for layout in layouts)
    anywhere = dataclasses.replace(
        next(iter(layouts)), num_tokens=0, num_seqs=0, max_steps=max_steps
    )
    return {
        "sources": source_digest(),
        "family": family_digest(type(model.module).__module__),
        "native": native.fingerprint() if table.placement.device.platform == "cpu" else None,
        "architecture": model.architecture,
        "config": repr(model.cfg),
        "rank's config": repr(model.rank_cfg),
        "split": repr(model.split),
        "groups": repr(table.spec.groups),
        "layout": repr(anywhere),
        "num_logprobs": table.spec.num_logprobs,
        "keeps_logits": table.spec.keeps_logits,
        "logprobs_mode": table.spec.logprobs_mode,
        "batch_invariant": table.spec.batch_invariant,
        "logits_processors": check_processors(table.spec.logits_processors, model.cfg.vocab_size),
    }

"""The engine's own step, compiled for an H100 on a machine without a GPU, and what came out of it.

XLA's GPU compiler needs no GPU: a description of one is enough. What is missing is autotuning, so
nothing here speaks of speed: dots get untuned kernels. The structure is that of the real program:
what is captured in a CUDA graph, which kernels run, what is copied, what shares memory.
"""

import dataclasses
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from jengine.config import EplbConfig
from jengine.kv_spec import KVGroup, build_groups
from jengine.layers.expert_exchange import Exchange
from jengine.layers.param import ParamInfo, abstract_parameters
from jengine.layers.sampling import RowState
from jengine.models.loader import with_slots
from jengine.models.registry import resolve_architecture
from jengine.pallas_kernels.platform import tracing_for, tracing_invariant
from jengine.runtime.batch import BatchLayout
from jengine.runtime.batch_invariance import resolve_batch_invariant
from jengine.runtime.buckets import Bucket
from jengine.runtime.expert_slots import expert_layers, slot_tables
from jengine.runtime.programs import ProgramTable
from jengine.runtime.shapes import abstract_kv, abstract_leaf, abstract_rows
from jengine.runtime.step import StepSpec, build_step
from jengine.runtime.xla_options import bucket_options, compiler_options
from jengine.sharding.cut import cut_array
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split

TARGET_CONFIG = Path(__file__).with_name("h100_target_config.txtpb")
NUM_PAGES, NUM_STATES = 2048, 256
MAX_MODEL_LEN = 8192
NUM_ROWS = 256
NUM_LOGPROBS = 20
CONTAINERS = frozenset({"kCommandBuffer", "kConditional", "kWhile"})

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_600M = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 3072, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
QWEN35_2B = {  # a layer of either kind
    "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 6144, "vocab_size": 151936,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True,
    "linear_num_value_heads": 16,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Thunk:
    """One launch, copy or container of XLA's program, as it stands after the CUDA-graph pass."""

    kind: str  # "kCustomKernel" (any kernel), "kCublasLtMatmul", "kCopy", "kCommandBuffer", ...
    name: str  # of the kernel; of the HLO instruction for a copy
    num_bytes: int  # of a copy
    ancestors: tuple[str, ...]  # kinds, outermost first

    @property
    def is_optional(self) -> bool:
        """In a branch of a conditional, such as the sampler's that greedy steps skip."""
        return "kConditional" in self.ancestors


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """A compiled program for one H100."""

    hlo: str  # optimised
    thunks: tuple[Thunk, ...]
    alias_bytes: int  # of arguments that results take over
    temp_bytes: int

    @property
    def top_level(self) -> list[str]:
        """Kinds of what the host launches, in order."""
        return [thunk.kind for thunk in self.thunks if not thunk.ancestors]

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels that every run launches, matrix products of cuBLAS included."""
        return [
            thunk.name
            for thunk in self.thunks
            if thunk.kind not in CONTAINERS | {"kCopy"} and not thunk.is_optional
        ]

    @property
    def copies(self) -> list[Thunk]:
        return [thunk for thunk in self.thunks if thunk.kind == "kCopy"]


def missing() -> str | None:
    """Why programs cannot be compiled for an H100 here, or None."""
    if sys.version_info < (3, 12):
        return "the CUDA compiler of JAX 0.11 needs Python 3.12"
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        return "jax-cuda13-pjrt is not installed (extra 'test')"
    return None


needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def compile_step(
    config: dict[str, Any],
    num_tokens: int,
    num_seqs: int,
    folder: Path,
    max_steps: int = 1,
    **options: Any,
) -> Program:
    """The step of one bucket as the engine builds and compiles it, over abstract parameters in
    bfloat16. `options` are the compiler's, beside the engine's own."""
    model_class, cfg = read_config(config)
    module = model_class(cfg)
    graphdef, state = nnx.split(module)
    groups = kv_groups(config)
    with tracing_for("cuda"):
        is_invariant = resolve_batch_invariant(None, model_class, cfg)
    spec = StepSpec(
        graphdef,
        jax.tree.structure((state,)),
        groups,
        NUM_LOGPROBS,
        keeps_logits=False,
        batch_invariant=is_invariant,
    )
    layout = BatchLayout(
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        num_groups=len(groups),
        pages_per_seq=MAX_MODEL_LEN // groups[0].page_size,
        num_rows=NUM_ROWS,
        vocab_size=cfg.vocab_size,
        max_steps=max_steps,
    )
    leaves = tuple(_array(p.shape, p.dtype) for p in abstract_parameters(module).values())
    packed = _array((layout.size,), "int32")
    masks = _array(layout.mask_shape, "int32")
    arguments = (leaves, kv_arrays(config), row_state(config), packed, masks)
    options = bucket_options(compiler_options("cuda"), num_tokens, num_seqs, is_invariant) | options
    with tracing_invariant(is_invariant):
        step = build_step(spec, layout)
        return compile_for_h100(step, arguments, ("kv", "rows"), folder, **options)


def compile_ranks_step(
    config: dict[str, Any],
    split: Split,
    num_tokens: int,
    num_seqs: int,
    folder: Path,
    *,
    exchange: Exchange = "auto",
    eplb: EplbConfig | None = None,
    name: str | None = None,
) -> Program:
    """The same step over as many H100s as `split` has ranks; or another program by `name`. `eplb`:
    its experts lie in slots.
    """
    model_class, cfg = read_config(config)
    rank_cfg, order = cfg, ()
    if exchange != "auto":
        rank_cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, exchange=exchange))
    if eplb is not None:
        rank_cfg, order = with_slots(rank_cfg, split, eplb)
    rank_cfg = rank_cfg.of_rank(split)
    whole, rank = abstract_parameters(model_class(cfg)), model_class(rank_cfg)
    placement = Placement(split, _devices(split.num_ranks))
    local = abstract_parameters(rank)

    def leaf(path: str, info: ParamInfo) -> jax.ShapeDtypeStruct:
        places = order if info.logical_axes[:1] == ("experts",) else ()
        sections = info.sections, local[path].sections
        return abstract_leaf(
            info, cut_array(split, info.logical_axes, *sections, places), placement
        )

    tables = slot_tables(rank)
    leaves = (
        *(leaf(path, info) for path, info in whole.items()),
        *(
            jax.ShapeDtypeStruct(shape, jnp.dtype("int32"), sharding=placement.replicated)
            for shape in tables.values()
        ),
    )
    graphdef, *states = nnx.split(rank, nnx.Param, ...)
    groups = build_groups(model_class.kv_specs(rank_cfg))
    with tracing_for("cuda"):
        is_invariant = resolve_batch_invariant(None, model_class, rank_cfg)
    spec = StepSpec(
        graphdef,
        jax.tree.structure(tuple(states)),
        groups,
        NUM_LOGPROBS,
        keeps_logits=False,
        batch_invariant=is_invariant,
    )
    pages_per_seq, vocab_size = MAX_MODEL_LEN // groups[0].page_size, cfg.vocab_size
    bucket = Bucket(num_tokens, num_seqs)
    layout = BatchLayout(num_tokens, num_seqs, len(groups), pages_per_seq, NUM_ROWS, vocab_size)
    num_pages = (NUM_PAGES,) * len(groups)
    table = ProgramTable(
        spec=spec,
        layouts={bucket: layout},
        leaves=leaves,
        kv=abstract_kv(groups, spec.group_of_layer, num_pages, placement),
        rows=abstract_rows(
            NUM_ROWS,
            vocab_size,
            len(groups),
            pages_per_seq,
            placement,
            (len(tables), len(order)) if tables else None,
        ),
        hidden=_array((cfg.hidden_size,), cfg.dtype),
        fill=0.0,
        placement=placement,
        expert_layers=expert_layers(whole, tuple(tables)),
    )
    with tracing_for("cuda"):
        lowered = table.lower(name or str(bucket))
    options = bucket_options(compiler_options("cuda"), num_tokens, num_seqs, is_invariant)
    return _compile(lowered, folder, options)


def read_config(config: dict[str, Any]) -> tuple[Any, Any]:
    """(class, config) of the model."""
    _, model_class = resolve_architecture(config)
    return model_class, model_class.config_class.from_hf(
        config, dtype="bfloat16", kv_dtype="bfloat16", max_model_len=MAX_MODEL_LEN
    )


def kv_groups(config: dict[str, Any]) -> tuple[KVGroup, ...]:
    model_class, cfg = read_config(config)
    return build_groups(model_class.kv_specs(cfg))


def kv_arrays(config: dict[str, Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    arrays = {
        layer: _array(
            (NUM_STATES if group.spec.is_state else NUM_PAGES, *group.page_shape), group.spec.dtype
        )
        for group in kv_groups(config)
        for layer in group.layers
    }
    return tuple(arrays[layer] for layer in range(len(arrays)))


def row_state(config: dict[str, Any]) -> RowState:
    table, groups = (NUM_ROWS, config["vocab_size"]), kv_groups(config)
    return jax.eval_shape(
        lambda: RowState(
            last_token=jnp.zeros(NUM_ROWS, jnp.int32),
            output_counts=jnp.zeros(table, jnp.int32),
            prompt_mask=jnp.zeros(table, jnp.bool_),
            bias=jnp.zeros(table, jnp.float32),
            page_tables=(jnp.zeros((NUM_ROWS, MAX_MODEL_LEN // groups[0].page_size), jnp.int32),)
            * len(groups),
        )
    )


def num_bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_for_h100(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    donated: Sequence[str],
    folder: Path,
    **options: Any,
) -> Program:
    """Trace `function` for CUDA over abstract arguments, compile it and read XLA's dump."""
    sharding = SingleDeviceSharding(_device())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with tracing_for("cuda"):
        lowered = jax.jit(function, donate_argnames=donated).lower(*placed)
    return _compile(lowered, folder, options)


def _compile(lowered: jax.stages.Lowered, folder: Path, options: dict[str, Any]) -> Program:
    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    compiled = lowered.compile(compiler_options={**dump, **options})
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    return Program(
        hlo,
        _read_thunks(folder, hlo),
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
    )


def _device() -> jax.Device:
    return _devices(1)[0]


@functools.cache
def _devices(count: int) -> tuple[jax.Device, ...]:
    """Of one host."""
    topology = topologies.get_topology_desc(
        "h100", platform="cuda", topology=f"1x1x{count}", target_config=TARGET_CONFIG.read_text()
    )
    return tuple(topology.devices)


def _array(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _read_thunks(folder: Path, hlo: str) -> tuple[Thunk, ...]:
    """Thunks from the dump: a list indented by nesting, whose copies are named in a second file.
    The list after the passes is missing where they changed nothing: without graphs."""
    (listing, *_) = [
        *folder.glob("*thunk_sequence_after_thunk_passes.txt"),
        *folder.glob("*thunk_sequence.txt"),
    ]
    (metadata,) = folder.glob("*thunk_metadata.txt")
    names: dict[int, str] = {}
    for block in metadata.read_text().split("thunk_metadata {")[1:]:
        name = re.search(r'profile_annotation: "([^"]*)"', block)
        index = re.search(r"thunk_id: (\d+)", block)
        names[int(index[1]) if index else 0] = name[1] if name else ""
    sizes = _result_sizes(hlo)
    thunks: list[Thunk] = []
    nesting: list[tuple[int, str]] = []  # (indentation, kind) of the thunks that are open
    line_pattern = re.compile(r"( *)(\d+): (k\w+) +\[.*?\] +(\S+)?")
    for line in listing.read_text().splitlines():
        if (match := line_pattern.match(line)) is None:
            continue  # "condition:", "body:", "false_branch:"
        indentation, index, kind, name = len(match[1]), int(match[2]), match[3], match[4] or ""
        while nesting and nesting[-1][0] >= indentation:
            nesting.pop()
        ancestors = tuple(kind for _, kind in nesting)
        size = 0
        if kind == "kCopy":
            name = names.get(index, "")  # none in a branch of a conditional inside a loop
            size = sizes.get(name, 0)
        thunks.append(Thunk(kind, name, size, ancestors))
        nesting.append((indentation, kind))
    return tuple(thunks)


def _result_sizes(hlo: str) -> dict[str, int]:
    """Bytes of every instruction's result, where that is one array."""
    widths = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
              "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
    pattern = re.compile(r"%([\w.\-]+) = (\w+)\[([\d,]*)\]")
    return {
        name: widths.get(dtype, 8) * int(np.prod([int(n) for n in dims.split(",") if n]))
        for name, dtype, dims in pattern.findall(hlo)
    }

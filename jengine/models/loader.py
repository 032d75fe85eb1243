"""From model arguments to a module with its parameters on the device."""

import dataclasses
import logging
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from jengine.config import EngineConfig, EplbConfig, ParallelConfig
from jengine.errors import LoadError
from jengine.layers.expert_slots import ExpertSlots
from jengine.layers.param import abstract_parameters
from jengine.loading.checkpoint import Checkpoint, open_checkpoint
from jengine.loading.converted import ConvertedReader, load_converted
from jengine.loading.dummy import Compile, compile_here, dummy_parameters
from jengine.loading.rules import Reader
from jengine.loading.rules import load_parameters as load_checkpoint
from jengine.models.registry import resolve_architecture
from jengine.models.sparse import SparseConfig
from jengine.pallas_kernels.kv_write.api import is_in_place
from jengine.sharding.cut import Cut, cut_array
from jengine.sharding.expert_balance import first_slots
from jengine.sharding.placement import Placement
from jengine.sharding.split import Split

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """An opened model whose parameters are not read: an abstract module, and where they are.

    `rank_cfg` and `rank_module` are what one rank of `split` holds of it: the same classes with
    smaller numbers, and the same paths. Where nothing is split they are the whole.
    """

    checkpoint: Checkpoint
    architecture: str
    cfg: Any  # the family's frozen config
    module: Any  # nnx.Module; holds no arrays
    split: Split
    rank_cfg: Any
    rank_module: Any
    max_model_len: int
    seed: int  # of dummy parameters
    expert_slots: tuple[int, ...] = ()  # which expert each slot holds at first; (): none has slots

    @property
    def cuts(self) -> dict[str, Cut]:
        """How each parameter is cut, by path; none where nothing is split."""
        if self.split.num_ranks == 1:
            return {}
        whole, local = map(abstract_parameters, (self.module, self.rank_module))
        for path, info in local.items():
            size, part = whole[path].shape[-1], info.shape[-1]
            if part != size and part % info.unit:
                raise ValueError(
                    f"parameter {path!r} has a scale for each {info.unit} bytes of its inputs: "
                    f"{part} of {size}, which would be a rank's, end inside such a group"
                )
        return {
            path: cut_array(
                self.split,
                info.logical_axes,
                info.sections,
                local[path].sections,
                self.expert_slots if info.logical_axes[:1] == ("experts",) else (),
            )
            for path, info in whole.items()
        }


def open_model(config: EngineConfig) -> ModelDefinition:
    """Open the checkpoint and declare the module. Raises `ValueError` naming a field that does not
    divide over the ranks.
    """
    checkpoint = open_checkpoint(config.model)
    hf = checkpoint.hf_config
    architecture, model_class = resolve_architecture(hf)
    max_model_len = resolve_max_model_len(
        hf,
        config.model.max_model_len,
        positions_are_scaled=model_class.config_class.positions_are_scaled,
    )
    dtype = resolve_dtype(hf, config.model.dtype)
    kv_dtype = resolve_kv_dtype(dtype, config.cache.kv_cache_dtype)
    cfg = model_class.config_class.from_hf(
        hf, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
    )
    module = model_class(cfg)
    split = split_of(config.parallel, cfg)
    rank_cfg, rank_module, expert_slots = cfg, module, ()
    if split.num_ranks > 1:
        if isinstance(cfg, SparseConfig):
            moe = dataclasses.replace(cfg.moe, exchange=config.parallel.all2all_backend)
            rank_cfg = dataclasses.replace(cfg, moe=moe)
        if config.parallel.enable_eplb:
            rank_cfg, expert_slots = with_slots(rank_cfg, split, config.parallel.eplb)
        rank_cfg = rank_cfg.of_rank(split)
        rank_module = model_class(rank_cfg)
    model = ModelDefinition(
        checkpoint=checkpoint,
        architecture=architecture,
        cfg=cfg,
        module=module,
        split=split,
        rank_cfg=rank_cfg,
        rank_module=rank_module,
        max_model_len=max_model_len,
        seed=config.model.seed,
        expert_slots=expert_slots,
    )
    _ = model.cuts  # raises if there are none
    return model


def with_slots(
    cfg: SparseConfig, split: Split, eplb: EplbConfig
) -> tuple[SparseConfig, tuple[int, ...]]:
    """The config of a model whose experts lie in slots, and what these hold at first."""
    num_experts, ranks = cfg.moe.num_experts, split.ways("experts")
    num_slots = num_experts + eplb.num_redundant_experts
    split.share(num_slots, "experts", "num_experts + num_redundant_experts")
    if num_slots > num_experts * ranks:
        raise ValueError(
            f"num_redundant_experts ({eplb.num_redundant_experts}): more than one slot on each of "
            f"{ranks} ranks for each of {num_experts} experts"
        )
    slots = ExpertSlots(num_slots, max_replicas=min(ranks, 1 + eplb.num_redundant_experts))
    moe = dataclasses.replace(cfg.moe, slots=slots)
    first = first_slots(num_experts, num_slots, ranks)
    return dataclasses.replace(cfg, moe=moe), tuple(first.tolist())


def split_of(parallel: ParallelConfig, cfg: Any) -> Split:
    """The mesh that a model of this config is cut for."""
    expert = parallel.num_expert_ranks
    if (
        parallel.enable_expert_parallel
        and parallel.num_ranks > 1
        and not isinstance(cfg, SparseConfig)
    ):
        raise ValueError("enable_expert_parallel: the model has no routed experts")
    split = Split(
        data=parallel.data_parallel_size,
        expert=expert,
        tensor=parallel.tensor_parallel_size // expert,
    )
    if not parallel.enable_expert_parallel:  # every data rank has all experts
        split = split.without("experts")
    # Such a vocabulary is small beside the layers; every rank holds it whole.
    return split.without("vocab") if cfg.vocab_size % split.ways("vocab") else split


def load_parameters(
    model: ModelDefinition,
    placement: Placement,
    compile_: Compile = compile_here,
) -> dict[str, jax.Array]:
    """Read, or draw, the parameters onto the devices, by path. They may still be on their way."""
    started = time.perf_counter()
    abstract, cuts = abstract_parameters(model.module), model.cuts
    with tqdm(desc="weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        def put(path: str, read: Reader | ConvertedReader) -> jax.Array:
            if path in cuts:
                return placement.place(cuts[path], read)
            return jax.device_put(read(), placement.replicated)

        tensors, converted = model.checkpoint.tensors, model.checkpoint.converted
        if converted is not None:
            parameters = load_converted(converted, abstract, put, progress)
        elif tensors is None:
            seed = model.seed
            parameters = dummy_parameters(abstract, seed, placement, compile_, progress, cuts)
        else:
            table = type(model.module).weight_table(model.cfg, model.checkpoint.dialect)
            parameters = load_checkpoint(tensors, table, abstract, put, progress)
    log.info("%s loaded in %.1f s", model.architecture, time.perf_counter() - started)
    return parameters


def resolve_max_model_len(
    hf: dict[str, Any], asked: int | None, *, positions_are_scaled: bool
) -> int:
    """The model's own limit, or a smaller one that was asked for. `positions_are_scaled`: see
    `DecoderConfig`.
    """
    limit = int(hf.get("max_position_embeddings") or 2048)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    is_factor = kind in ("linear", "dynamic", "yarn") and not positions_are_scaled
    if is_factor and "original_max_position_embeddings" not in rope:
        limit = int(limit * float(rope.get("factor", 1.0)))
    if asked is None:
        return limit
    if not 1 <= asked <= limit:
        raise LoadError(f"max_model_len {asked} is outside what the model supports (1 to {limit})")
    return asked


def resolve_kv_dtype(dtype: str, asked: str) -> str:
    """For "auto" the model's dtype, unless this back end copies such pages on every write."""
    if asked != "auto":
        return asked
    return dtype if is_in_place(dtype) else "float32"


def resolve_dtype(hf: dict[str, Any], asked: str) -> str:
    """For "auto" the checkpoint's own dtype; bfloat16 for quantised files and float16 weights."""
    if asked == "auto":
        asked = str(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16")
        asked = "bfloat16" if asked == "float16" else asked
    if asked not in DTYPES:
        raise LoadError(f"dtype {asked!r} is not supported; known: {', '.join(DTYPES)}")
    return str(jnp.dtype(asked))

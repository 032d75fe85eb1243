"""The numbers of DeepSeek-V4, from either kind of config.json: the published one, and the one that
transformers writes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jengine.errors import LoadError
from jengine.layers.rope import RopeTable, build_rope
from jengine.layers.sparse_mla import IndexConfig
from jengine.loading.quantization import has_exponents, quant_method
from jengine.models.config_fields import ConfigFields
from jengine.models.sparse import SparseConfig
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.packed import FP8_BLOCKS, FP8_FLOAT_BLOCKS, MXFP4, Packing
from jengine.pallas_kernels.route_experts.grouped import GroupedRouting
from jengine.sharding.split import Split

SPARSE_RATIO = 4  # published layers of this ratio overlap their groups and select among entries
LAYER_TYPES = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "compress_rope_theta": 160000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1048576,
}


@dataclasses.dataclass(frozen=True)
class Compression:
    """How a layer compresses: one entry for `ratio` tokens. Where it `is_sparse`, an entry takes in
    the tokens of two groups, and an indexer picks the entries to attend to."""

    ratio: int
    is_sparse: bool


@dataclasses.dataclass(frozen=True)
class HyperConfig:
    """Of hyper-connections: parallel residual streams, rounds of Sinkhorn's normalisation, what is
    added to stay away from zero."""

    num_streams: int = 4
    sinkhorn_iters: int = 20
    eps: float = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV4Config(SparseConfig):
    """Field names are those of the published config.json where it has them."""

    q_lora_rank: int
    qk_rope_head_dim: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compressions: tuple[Compression | None, ...]  # of each layer; None: it has its window only
    compress_rope: RopeTable  # of layers that compress
    index: IndexConfig
    hyper: HyperConfig
    num_hash_layers: int  # so many first layers choose experts by the token's id
    shared_intermediate_size: int
    num_nextn_predict_layers: int  # draft blocks in the checkpoint
    packing: Packing | None  # of linear maps, but for small ones; None: they are arrays

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        """Raises `LoadError` naming a missing or unsupported field."""
        fields = ConfigFields(hf := {**DEFAULTS, **hf})
        _check_supported(hf)
        num_layers, head_dim = map(fields.integer, ("num_hidden_layers", "head_dim"))
        rotary_dim = fields.integer("qk_rope_head_dim")
        ropes = _ropes(hf, rotary_dim, fields.integer("max_position_embeddings"), max_model_len)
        sparse = SparseConfig.from_hf(
            {
                **hf,
                "head_dim": rotary_dim,  # what rotates
                "num_experts": fields.integer("n_routed_experts"),
                "intermediate_size": fields.integer("moe_intermediate_size"),
                "layer_types": ["full_attention"] * num_layers,  # see `compressions`
                "rope_parameters": {"rope_theta": ropes[0]},
                "partial_rotary_factor": None,  # transformers': of the whole head
                "mlp_bias": False,
            },
            dtype=dtype,
            kv_dtype=kv_dtype,
            max_model_len=max_model_len,
        )
        limit = float(hf.get("swiglu_limit") or 0.0)
        packing, experts_packing = _packings(hf)
        moe = dataclasses.replace(
            sparse.moe,
            packing=experts_packing,
            activation=ClampedSwiGLU(1.0, limit, up_offset=0.0) if limit else None,
            grouped=GroupedRouting(
                "sqrtsoftplus", scale=float(hf["routed_scaling_factor"]), has_bias=True
            ),
        )
        index = IndexConfig(*map(fields.integer, ("index_n_heads", "index_head_dim", "index_topk")))
        hyper = HyperConfig(
            fields.integer("hc_mult", default=HyperConfig.num_streams),
            fields.integer("hc_sinkhorn_iters", default=HyperConfig.sinkhorn_iters),
            float(hf.get("hc_eps", HyperConfig.eps)),
        )
        replaced: dict[str, Any] = {
            **vars(sparse),
            "head_dim": head_dim,
            "attention_scale": head_dim**-0.5,
            "moe": moe,
        }
        cfg = cls(
            **replaced,
            q_lora_rank=fields.integer("q_lora_rank"),
            qk_rope_head_dim=rotary_dim,
            o_groups=fields.integer("o_groups"),
            o_lora_rank=fields.integer("o_lora_rank"),
            sliding_window=fields.integer("sliding_window"),
            compressions=_compressions(hf, num_layers),
            compress_rope=ropes[1],
            index=index,
            hyper=hyper,
            num_hash_layers=_num_hash_layers(hf),
            shared_intermediate_size=moe.moe_intermediate_size * fields.integer("n_shared_experts"),
            num_nextn_predict_layers=hf.get("num_nextn_predict_layers") or 0,
            packing=packing,
        )
        if cfg.num_attention_heads % cfg.o_groups:
            raise LoadError(
                f"config field 'o_groups' is {cfg.o_groups}, which does not divide "
                f"{cfg.num_attention_heads} attention heads"
            )
        return cfg

    def of_rank(self, split: Split) -> Self:
        size, field = self.shared_intermediate_size, "moe_intermediate_size times n_shared_experts"
        return dataclasses.replace(
            super().of_rank(split),
            o_groups=split.share(self.o_groups, "heads", "o_groups"),
            shared_intermediate_size=split.share(size, "mlp", field),
        )

    def layer_rope(self, layer: int) -> RopeTable:
        return self.rope if self.compressions[layer] is None else self.compress_rope


def _check_supported(hf: Mapping[str, Any]) -> None:
    fields = ConfigFields(hf)
    fields.require("scoring_func", ("sqrtsoftplus",), default="sqrtsoftplus")
    fields.require("topk_method", ("noaux_tc",), default="noaux_tc")
    fields.require("norm_topk_prob", (True,), default=True)
    fields.require("num_key_value_heads", (1,), default=1)
    fields.require("attention_bias", (False, None), default=False)
    fields.require("expert_dtype", ("fp4", "fp8", None), default="fp4")
    if drafters := sorted(name for name in hf if name.startswith("dspark_")):
        raise LoadError(
            f"config field {drafters[0]!r}: checkpoints with DSpark drafters are not supported; "
            "those with MTP blocks are"
        )
    quantization = hf.get("quantization_config") or {}
    kind = quantization.get("moe_quant_algo") or quantization.get("quant_method")
    if kind not in (None, "fp8"):
        raise LoadError(f"config field 'quantization_config' asks for {kind!r}; supported: 'fp8'")
    if (block := quantization.get("weight_block_size")) not in (None, [128, 128]):
        raise LoadError(
            f"config field 'quantization_config' has weight_block_size {block}, not [128, 128]"
        )


def _packings(hf: Mapping[str, Any]) -> tuple[Packing | None, Packing | None]:
    """(of linear maps, of routed experts)."""
    if quant_method(hf) is None:
        return None, None
    packing = FP8_BLOCKS if has_exponents(hf) else FP8_FLOAT_BLOCKS
    return packing, packing if hf.get("expert_dtype") == "fp8" else MXFP4


def _ropes(
    hf: Mapping[str, Any], dim: int, max_position: int, max_model_len: int
) -> tuple[float, RopeTable]:
    """(theta of layers with a window only, rotation of the others)."""
    written = hf.get("rope_parameters") or {}
    if "compress" in written:
        main, scaling = written.get("main") or {}, written["compress"]
        theta = float(main.get("rope_theta", 10000.0))
        compress_theta = float(scaling.get("rope_theta", hf["compress_rope_theta"]))
    else:
        scaling = hf.get("rope_scaling") or {}
        theta = float(hf.get("rope_theta", 10000.0))
        compress_theta = float(hf["compress_rope_theta"])
    # YaRN's temperature is not used; what rotates is `dim` as a whole.
    scaling = {**scaling, "attention_factor": 1.0, "partial_rotary_factor": 1.0}
    return theta, build_rope(dim, compress_theta, scaling, max_position, max_model_len)


def _compressions(hf: Mapping[str, Any], num_layers: int) -> tuple[Compression | None, ...]:
    """From `compress_ratios`, whose entries past the layers are those of draft blocks, else from
    `layer_types` and `compress_rates`."""
    ratios = hf.get("compress_ratios")
    if ratios is not None:
        drafts = ratios[num_layers:]
        if len(ratios) < num_layers or any(drafts):
            raise LoadError(
                f"config field 'compress_ratios' must have a ratio for each of {num_layers} "
                f"layers, then 0 for draft blocks, got {ratios!r}"
            )
        return tuple(Compression(r, r == SPARSE_RATIO) if r else None for r in ratios[:num_layers])
    kinds, rates = hf.get("layer_types") or (), hf.get("compress_rates") or {}
    if len(kinds) != num_layers or not {*kinds} <= {*LAYER_TYPES}:
        raise LoadError(
            f"config field 'layer_types' must name one of {', '.join(LAYER_TYPES)} for each of "
            f"{num_layers} layers, got {kinds!r}"
        )
    if missing := {*kinds} - {LAYER_TYPES[0]} - rates.keys():
        raise LoadError(f"config field 'compress_rates' has no rate for {min(missing)!r}")
    return tuple(
        None if kind == LAYER_TYPES[0] else Compression(rates[kind], kind == LAYER_TYPES[1])
        for kind in kinds
    )


def _num_hash_layers(hf: Mapping[str, Any]) -> int:
    kinds = hf.get("mlp_layer_types")
    if kinds is None:
        return int(hf.get("num_hash_layers") or 0)
    first = kinds.count("hash_moe")
    if kinds != ["hash_moe"] * first + ["moe"] * (len(kinds) - first):
        raise LoadError("config field 'mlp_layer_types' must be 'hash_moe' layers, then 'moe' ones")
    return first

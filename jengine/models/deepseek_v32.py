"""DeepSeek-V3.2 and V3.2-Exp (arXiv:2512.02556), GLM-5: V3 with sparse attention. In each layer an
indexer scores the context, and latent attention reads the tokens that scored highest.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from jengine.errors import LoadError
from jengine.kv_spec import KVSpec
from jengine.layers.sparse_mla import IndexConfig, SparseLatentAttention
from jengine.loading.rules import WeightRule, WeightTable
from jengine.models.config_fields import ConfigFields
from jengine.models.decoder_weights import linear_rules, undo_rotary_pairs, weight_rule
from jengine.models.deepseek_v2 import DeepseekMoE
from jengine.models.deepseek_v3 import DeepseekV3Config, DeepseekV3ForCausalLM
from jengine.models.llama import LlamaDecoderLayer, LlamaMLP

DEFAULTS = {  # where config.json may be silent and means something else than V3's
    "max_position_embeddings": 163840,
    "index_n_heads": IndexConfig.num_heads,
    "index_head_dim": IndexConfig.head_dim,
    "index_topk": IndexConfig.top_k,
}
GLM_DEFAULTS = {
    **DEFAULTS,
    "max_position_embeddings": 202752,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_group": 1,
    "topk_group": 1,
    "index_n_heads": 32,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepseekV32Config(DeepseekV3Config):
    """V3's numbers, and those of the indexer."""

    index: IndexConfig = dataclasses.field(default_factory=IndexConfig)
    index_interleave: bool = False  # its rotary pairs lie side by side in the checkpoint

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        hf = {**DEFAULTS, **hf}
        fields = ConfigFields(hf)
        if hf.get("q_lora_rank", 1) is None:
            raise LoadError("config field 'q_lora_rank' is null: the indexer needs the latent")
        fields.require("rope_interleave", (True,), default=True)
        layers = fields.integer("num_hidden_layers")
        if not {*(hf.pop("layer_types", None) or ())} <= {"indexed_attention"}:
            raise LoadError("config field 'layer_types' may only have 'indexed_attention' here")
        if (kinds := hf.get("mlp_layer_types")) is not None:
            first = kinds.count("dense")
            if kinds != ["dense"] * first + ["sparse"] * (layers - first):
                raise LoadError(
                    "config field 'mlp_layer_types' must be 'dense' layers, then 'sparse' ones"
                )
            hf["first_k_dense_replace"] = first
        cfg = super().from_hf(hf, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len)
        index = IndexConfig(*map(fields.integer, ("index_n_heads", "index_head_dim", "index_topk")))
        return dataclasses.replace(cfg, index=index)


class GlmMoeDsaConfig(DeepseekV32Config):
    """The same with other defaults; the rotary pairs of the indexer lie side by side, too."""

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        kinds = hf.get("indexer_types") or hf.get("index_topk_pattern") or ()
        if not {*kinds} <= {"full", "F"} or (hf.get("index_topk_freq") or 1) > 1:
            raise LoadError("layers that share the choice of another's indexer are not supported")
        cfg = super().from_hf(
            {**GLM_DEFAULTS, **hf}, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
        )
        return dataclasses.replace(cfg, index_interleave=True)


class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
    config_class = DeepseekV32Config

    @staticmethod
    def decoder_layer(cfg: Any, layer: int) -> LlamaDecoderLayer:
        attention = SparseLatentAttention(
            cfg.hidden_size,
            cfg.num_attention_heads,
            cfg.mla,
            cfg.index,
            cfg.dtype,
            layer=layer,
            scale=cfg.attention_scale,
            bias=cfg.attention_bias,
        )
        mlp = DeepseekMoE(cfg) if cfg.sparse_layers[layer] else LlamaMLP(cfg)
        return LlamaDecoderLayer(cfg, attention, mlp)

    @staticmethod
    def kv_specs(cfg: Any) -> tuple[KVSpec, ...]:
        """An entry holds the index key too."""
        latents = DeepseekV3ForCausalLM.kv_specs(cfg)
        shape = (cfg.mla.entry_dim + cfg.index.head_dim,)
        return tuple(dataclasses.replace(spec, entry_shape=shape) for spec in latents)

    @staticmethod
    def weight_table(cfg: Any, dialect: str) -> WeightTable:
        table = DeepseekV3ForCausalLM.weight_table(cfg, dialect)
        return dataclasses.replace(table, rules=(*table.rules, *indexer_rules(cfg)))


class GlmMoeDsaForCausalLM(DeepseekV32ForCausalLM):
    config_class = GlmMoeDsaConfig


def indexer_rules(cfg: DeepseekV32Config) -> list[WeightRule]:
    D, R, X = cfg.hidden_size, cfg.mla.qk_rope_head_dim, cfg.index.head_dim
    heads = cfg.index.num_heads
    undo_q, undo_k = (
        undo_rotary_pairs(n, X, R) if cfg.index_interleave else None for n in (heads, 1)
    )
    assert cfg.mla.q_lora_rank is not None  # from_hf saw to it
    theirs, ours = "model.layers.{i}.self_attn.indexer.", "layers.{i}.self_attn.indexer."
    wq_b, wk, weights, norm = "wq_b", "wk", "weights_proj", "k_norm"
    return [
        *linear_rules(
            theirs + wq_b, ours + wq_b, heads * X, cfg.mla.q_lora_rank, bias=False, transform=undo_q
        ),
        *linear_rules(theirs + wk, ours + wk, X, D, bias=False, transform=undo_k),
        *linear_rules(theirs + weights, ours + weights, heads, D, bias=False),
        # Scale and bias move with the values that they belong to.
        weight_rule(theirs + norm, ours + norm, X, transform=undo_k),
        WeightRule(f"{theirs}{norm}.bias", f"{ours}{norm}.bias", (X,), transform=undo_k),
    ]

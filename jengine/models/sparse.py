"""What families with routed experts share: their numbers, and the rules of their tensors."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from jengine.layers.moe import MoEConfig
from jengine.loading.rules import WeightRule
from jengine.models.config_fields import ConfigFields
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import weight_rule
from jengine.sharding.split import Split


@dataclass(frozen=True, kw_only=True)
class SparseConfig(DecoderConfig):
    """A decoder some of whose layers have routed experts in the place of an MLP."""

    moe: MoEConfig
    sparse_layers: tuple[bool, ...]

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        """Raises `LoadError` naming a missing or unsupported field, as `DecoderConfig` does."""
        fields = ConfigFields(hf)
        fields.require("hidden_act", ("silu",), default="silu")
        dense = DecoderConfig.from_hf(
            hf, dtype=dtype, kv_dtype=kv_dtype, max_model_len=max_model_len
        )
        # transformers 5 writes the second name, and takes either
        experts = "num_local_experts" if "num_local_experts" in hf else "num_experts"
        moe = MoEConfig(
            num_experts=fields.integer(experts),
            num_experts_per_tok=fields.integer("num_experts_per_tok"),
            moe_intermediate_size=fields.integer("moe_intermediate_size"),
            norm_topk_prob=bool(hf.get("norm_topk_prob", False)),
        )
        step = fields.integer("decoder_sparse_step", default=1)
        without = hf.get("mlp_only_layers") or ()
        sparse = [i not in without and (i + 1) % step == 0 for i in range(dense.num_hidden_layers)]
        return cls(**vars(dense), moe=moe, sparse_layers=tuple(sparse))

    def of_rank(self, split: Split) -> Self:
        return dataclasses.replace(super().of_rank(split), moe=self.moe.of_rank(split))

    @property
    def has_dense_layers(self) -> bool:
        return not all(self.sparse_layers)


@dataclass(frozen=True)
class ExpertNames:
    """How a family's checkpoints name the parts, without ".weight". `{e}` stands for the expert."""

    router: str
    gate: str
    up: str
    down: str


QWEN_NAMES = ExpertNames(
    router="model.layers.{i}.mlp.gate",
    gate="model.layers.{i}.mlp.experts.{e}.gate_proj",
    up="model.layers.{i}.mlp.experts.{e}.up_proj",
    down="model.layers.{i}.mlp.experts.{e}.down_proj",
)


def expert_rules(cfg: SparseConfig, names: ExpertNames) -> list[WeightRule]:
    """The router, and every expert into its place among the stacked ones."""
    D, F = cfg.hidden_size, cfg.moe.moe_intermediate_size
    gate_up, down = (f"layers.{{i}}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    return [
        weight_rule(names.router, "layers.{i}.mlp.gate", cfg.moe.num_experts, D),
        WeightRule(names.gate + ".weight", gate_up, (F, D)),
        WeightRule(names.up + ".weight", gate_up, (F, D), offset=F),
        WeightRule(names.down + ".weight", down, (D, F)),
    ]

"""What Qwen3-Next and Qwen3.5 share: Gated DeltaNet in most layers, beside layers that attend fully
and gate what they found.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jengine.errors import LoadError
from jengine.kv_spec import KVKind, KVSpec
from jengine.layers.attention import AttentionMetadata
from jengine.layers.gated_delta import STATE_DTYPE, STATE_ITEMSIZE, DeltaConfig, GatedDeltaNet
from jengine.layers.linear import Linear
from jengine.layers.norm import WideRMSNorm
from jengine.loading.rules import WeightRule
from jengine.models.config_fields import ConfigFields
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import (
    HF_NAMES,
    embedding_rules,
    ignored_tensors,
    linear_rules,
    weight_rule,
)
from jengine.models.gemma2 import one_plus
from jengine.models.gemma3 import Gemma3Attention
from jengine.models.llama import LlamaDecoderLayer, kv_spec
from jengine.models.sandwich import layer_norm_rules

DEFAULTS = {  # where config.json may be silent and means something else than Llama's
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 32768,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
NORMS = ("input_layernorm", "post_attention_layernorm")
MIXER = "layers.{i}.self_attn."  # ours, of either kind


def attention_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the layers that attend, all of them fully."""
    layers = ConfigFields(hf).integer("num_hidden_layers")
    return {**hf, "layer_types": ["full_attention"] * layers, "mlp_bias": False}


def delta_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What a config holds besides: the sizes of the other layers, and which they are."""
    fields = ConfigFields(hf)
    fields.require("hidden_act", ("silu",), default="silu")
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim",
             "conv_kernel_dim")  # fmt: skip
    delta = DeltaConfig(**{name: fields.integer(f"linear_{name}") for name in names})
    if delta.num_value_heads % delta.num_key_heads:
        raise LoadError(
            f"config field 'linear_num_value_heads' is {delta.num_value_heads}, which is no "
            f"multiple of {delta.num_key_heads} key heads"
        )
    return {"delta": delta, "linear_layers": linear_layers(hf)}


def linear_layers(hf: Mapping[str, Any]) -> tuple[bool, ...]:
    """From `layer_types`, else all but every `full_attention_interval`-th."""
    fields = ConfigFields(hf)
    num_layers = fields.integer("num_hidden_layers")
    kinds = hf.get("layer_types")
    if kinds is None:
        interval = fields.integer("full_attention_interval")
        return tuple((layer + 1) % interval > 0 for layer in range(num_layers))
    if len(kinds) != num_layers or not {*kinds} <= {"linear_attention", "full_attention"}:
        raise LoadError(
            f"config field 'layer_types' must name linear or full attention for each of "
            f"{num_layers} layers, got {kinds!r}"
        )
    return tuple(kind == "linear_attention" for kind in kinds)


class GatedAttention(Gemma3Attention):
    """Llama's attention with scales of 1 + w in the norms of q's and k's heads; what a head found
    passes a gate of the same size.
    """

    def __init__(self, cfg: DecoderConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        heads_dim = cfg.num_attention_heads * cfg.head_dim
        self.gate_proj = Linear(
            cfg.hidden_size, heads_dim, ("heads", "embed"), cfg.dtype, bias=cfg.attention_bias
        )

    def parts(
        self,
        x_TD: jax.Array,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        found_TF, kv_pages = self.attend(x_TD, kv_pages, metadata, rotation)
        gate_TF = self.gate_proj(x_TD, metadata.num_tokens).astype(jnp.float32)
        gated_TF = found_TF.astype(jnp.float32) * jax.nn.sigmoid(gate_TF)
        return self.o_proj.parts(gated_TF.astype(x_TD.dtype), metadata.num_tokens), kv_pages


def hybrid_layer(
    cfg: DecoderConfig, delta: DeltaConfig | None, layer: int, mlp: nnx.Module
) -> LlamaDecoderLayer:
    """`delta` in layers that do not attend."""
    if delta is None:
        mixer = GatedAttention(cfg, layer)
    else:
        mixer = GatedDeltaNet(
            cfg.hidden_size, delta, cfg.dtype, layer=layer, norm_eps=cfg.rms_norm_eps
        )
    return LlamaDecoderLayer(cfg, mixer, mlp, WideRMSNorm)


def hybrid_kv_specs(
    cfg: DecoderConfig, delta: DeltaConfig, is_linear: Sequence[bool]
) -> tuple[KVSpec, ...]:
    state = KVSpec(KVKind.STATE, (delta.state_size,), STATE_DTYPE, STATE_ITEMSIZE)
    return tuple(state if linear else kv_spec(cfg, layer) for layer, linear in enumerate(is_linear))


def hybrid_rules(cfg: DecoderConfig, delta: DeltaConfig) -> list[WeightRule]:
    """All but the MLPs and what projects into the layers that do not attend."""
    theirs, D = "model.layers.{i}.linear_attn.", cfg.hidden_size
    N, C, W = delta.num_value_heads, delta.conv_dim, delta.conv_kernel_dim
    return [
        *embedding_rules(cfg, HF_NAMES),
        weight_rule(HF_NAMES.norm, "norm", D, transform=one_plus),
        *layer_norm_rules(cfg, HF_NAMES, {name: name for name in NORMS}, one_plus),
        *gated_attention_rules(cfg),
        WeightRule(
            theirs + "conv1d.weight",
            MIXER + "conv1d",
            (C, 1, W),
            transform=lambda weight: weight[:, 0],
            transformed=(C, W),
        ),
        # Once at load, and XLA:CPU's exponential of a few values depends on what it is fused with.
        WeightRule(theirs + "A_log", MIXER + "decay", (N,), transform=exponential),
        WeightRule(theirs + "dt_bias", MIXER + "dt_bias", (N,)),
        weight_rule(theirs + "norm", MIXER + "norm", delta.value_head_dim),
        *linear_rules(theirs + "out_proj", MIXER + "out_proj", D, delta.value_dim, bias=False),
    ]


def exponential(weight: np.ndarray) -> np.ndarray:
    return np.exp(weight.astype(np.float32))


def gated_attention_rules(cfg: DecoderConfig) -> list[WeightRule]:
    """`q_proj` holds, for each head, what projects to its query and to its gate."""
    D, H, N, K = cfg.hidden_size, cfg.head_dim, cfg.num_attention_heads, cfg.num_key_value_heads
    bias, qkv = cfg.attention_bias, MIXER + "qkv_proj"

    def part(target: str, end: str, half: int) -> WeightRule:
        columns = (D,) if end == ".weight" else ()

        def transform(rows: np.ndarray) -> np.ndarray:
            return rows.reshape(N, 2, H, *columns)[:, half].reshape(N * H, *columns)

        return WeightRule(
            HF_NAMES.q + end,
            target + end,
            (2 * N * H, *columns),
            transform=transform,
            transformed=(N * H, *columns),
            is_part=True,
        )

    ends = (".weight", ".bias") if bias else (".weight",)
    targets = (qkv, MIXER + "gate_proj")
    return [
        *(part(target, end, half) for half, target in enumerate(targets) for end in ends),
        *linear_rules(HF_NAMES.k, qkv, K * H, D, bias=bias, offset=N * H),
        *linear_rules(HF_NAMES.v, qkv, K * H, D, bias=bias, offset=(N + K) * H),
        *linear_rules(HF_NAMES.o, MIXER + "o_proj", D, N * H, bias=cfg.attention_out_bias),
        weight_rule(HF_NAMES.q_norm, MIXER + "q_norm", H, transform=one_plus),
        weight_rule(HF_NAMES.k_norm, MIXER + "k_norm", H, transform=one_plus),
    ]


def hybrid_ignored(cfg: DecoderConfig) -> tuple[str, ...]:
    """Further tokens are not predicted: the layers for that are left out."""
    return (*ignored_tensors(cfg, HF_NAMES), "mtp.*")

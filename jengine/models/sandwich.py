"""The residual block with norms on both sides of attention and MLP, which several families have
under several names.
"""

from collections.abc import Mapping

import jax
from flax import nnx

from jengine.layers.attention import AttentionMetadata
from jengine.layers.norm import RMSNorm
from jengine.loading.rules import WeightRule
from jengine.models.decoder_config import DecoderConfig
from jengine.models.decoder_weights import TensorNames, Transform, weight_rule


class SandwichDecoderLayer(nnx.Module):
    """What attention and MLP give is normalised again before it is added. Named as in Gemma 2."""

    def __init__(
        self, cfg: DecoderConfig, self_attn: nnx.Module, mlp: nnx.Module, norm: type[RMSNorm]
    ) -> None:
        D, eps, dtype = cfg.hidden_size, cfg.rms_norm_eps, cfg.dtype
        self.input_layernorm = norm(D, eps, dtype)
        self.self_attn = self_attn
        self.post_attention_layernorm = norm(D, eps, dtype)
        self.pre_feedforward_layernorm = norm(D, eps, dtype)
        self.mlp = mlp
        self.post_feedforward_layernorm = norm(D, eps, dtype)

    def __call__(
        self,
        x_TD: jax.Array,
        added_PTD: jax.Array | None,
        kv_pages: jax.Array,
        metadata: AttentionMetadata,
        rotation: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        del added_PTD  # None: every layer adds up what it gives
        num_tokens = metadata.num_tokens
        attended_TD, kv_pages = self.self_attn(
            self.input_layernorm(x_TD, num_tokens), kv_pages, metadata, rotation
        )
        x_TD = x_TD + self.post_attention_layernorm(attended_TD, num_tokens)
        fed_TD = self.mlp(self.pre_feedforward_layernorm(x_TD, num_tokens), num_tokens)
        return x_TD + self.post_feedforward_layernorm(fed_TD, num_tokens), None, kv_pages


def layer_norm_rules(
    cfg: DecoderConfig,
    names: TensorNames,
    sources: Mapping[str, str],
    transform: Transform | None = None,
) -> list[WeightRule]:
    """Rules of a layer's norms. `sources`: the checkpoint's name, within the layer, of each of
    ours.
    """
    return [
        weight_rule(
            names.layer + source,
            f"layers.{{i}}.{target}",
            cfg.hidden_size,
            transform=transform,
        )
        for target, source in sources.items()
    ]

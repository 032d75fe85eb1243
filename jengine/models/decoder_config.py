"""The numbers of one decoder model, read from a Hugging Face config.json."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from jengine.layers.gated import Activation
from jengine.layers.rope import RopeTable, build_rope
from jengine.models.config_fields import ConfigFields
from jengine.sharding.split import Split


@dataclass(frozen=True)
class DecoderConfig:
    """What decoder families share. Fields are named as in config.json where it has them; those with
    defaults are set by some families only.
    """

    # `max_position_embeddings` is the length that `rope_scaling` stretches to, not from
    positions_are_scaled: ClassVar[bool] = False

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    layer_windows: tuple[int | None, ...]
    rope: RopeTable
    dtype: str
    kv_dtype: str
    attention_scale: float  # of q.k
    hidden_act: Activation = "silu"
    window_rope: RopeTable | None = None  # of layers with a window, where they have their own
    attention_soft_cap: float | None = None
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None

    @classmethod
    def from_hf(
        cls, hf: Mapping[str, Any], *, dtype: str, kv_dtype: str, max_model_len: int
    ) -> Self:
        """Read a config.json. Raises `LoadError` naming a missing or unsupported field."""
        fields = ConfigFields(hf)
        heads = fields.integer("num_attention_heads")
        hidden = fields.integer("hidden_size")
        layers = fields.integer("num_hidden_layers")
        head_dim = fields.integer("head_dim", default=hidden // heads)
        max_position = fields.integer("max_position_embeddings", default=2048)
        theta, scaling = fields.rope()
        attention_bias = bool(hf.get("attention_bias", False))
        return cls(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=fields.integer("num_key_value_heads", default=heads),
            head_dim=head_dim,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=max_position,
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=attention_bias,
            attention_out_bias=attention_bias,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            layer_windows=fields.layer_windows(layers),
            rope=build_rope(head_dim, theta, scaling, max_position, max_model_len),
            dtype=dtype,
            kv_dtype=kv_dtype,
            attention_scale=head_dim**-0.5,
            hidden_act=fields.require("hidden_act", ("silu", "gelu_pytorch_tanh"), default="silu"),
        )

    def of_rank(self, split: Split) -> Self:
        """The numbers of what one rank holds. Raises `ValueError` naming a field that does not
        divide.
        """
        heads, kv_heads = "num_attention_heads", "num_key_value_heads"
        changes = {
            heads: split.share(self.num_attention_heads, "heads", heads),
            kv_heads: split.share_or_copy(self.num_key_value_heads, "heads", kv_heads),
            "vocab_size": split.share(self.vocab_size, "vocab", "vocab_size"),
        }
        if self.has_dense_layers:
            size = self.intermediate_size
            changes["intermediate_size"] = split.share(size, "mlp", "intermediate_size")
        return dataclasses.replace(self, **changes)

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has an MLP of `intermediate_size`."""
        return True

    def layer_rope(self, layer: int) -> RopeTable:
        is_full = self.layer_windows[layer] is None
        return self.rope if is_full or self.window_rope is None else self.window_rope

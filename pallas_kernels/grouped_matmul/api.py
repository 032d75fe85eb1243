"""`expert_parts`: the routed experts of a mixture, each a SwiGLU MLP of its own."""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.grouped_matmul import formula, reference, triton_gpu
from jengine.pallas_kernels.grouped_matmul.activation import ClampedSwiGLU
from jengine.pallas_kernels.packed import Weight

_expert_parts = first_of(
    triton_gpu.expert_parts, reference.expert_parts, formula=formula.expert_parts
)


def expert_parts(
    x_TD: jax.Array,
    expert_ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    gate_up_EFD: Weight,
    down_EDF: Weight,
    *,
    num_tokens: jax.Array,
    gate_up_bias_EF: jax.Array | None = None,
    down_bias_ED: jax.Array | None = None,
    activation: ClampedSwiGLU | None = None,
    num_experts: int | None = None,
) -> jax.Array:
    """Return summands [P, T, D] (which `add_rms_norm` adds up) of, for each token, the sum over its
    k experts, in the order given, of weight times `silu_mul(x @ gate_up[e].T) @ down[e].T`, with
    biases where given, and `activation` in the place of `silu_mul` if it is.

    `gate_up` is [E, 2 F, D], gate above up; `weights` are float32; the experts of one token are
    distinct. Packed experts count as what they are in the dtype of `x`: no more than a part of one
    is ever unpacked. The product of gate and up is rounded to the dtype of `x`; the rest is
    float32, but for summands of many rows, which are rounded. Rows at or past `num_tokens` are
    padding: they touch no expert, and are unspecified; where there are several summands they may be
    NaN. The bits of a row depend on that row, its experts and their weights only. The time grows
    with the experts touched.

    If `num_experts` is given, these are a rank's experts of so many: id E stands for any other, as
    often as it likes. Such an expert adds nothing and takes no time.
    """
    return _expert_parts(
        x_TD,
        expert_ids_Tk,
        weights_Tk,
        gate_up_EFD,
        down_EDF,
        num_tokens=num_tokens,
        gate_up_bias_EF=gate_up_bias_EF,
        down_bias_ED=down_bias_ED,
        activation=activation,
        num_experts=num_experts,
    )

"""`read_streams`: what a block reads of several residual streams, and how its result will join them
(manifold-constrained hyper-connections, arXiv:2512.24880, as DeepSeek-V4 has them).
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.read_streams import reference, triton_gpu

_read = first_of(triton_gpu.read_streams, reference.read_streams)


def read_streams(
    streams_TCD: jax.Array,
    fn_RX: jax.Array,
    base_R: jax.Array,
    scale_3: jax.Array,
    norm_D: jax.Array,
    num_tokens: jax.Array,
    *,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return (x [T, D] in the streams' dtype, post float32 [T, C], mix float32 [T, C, C]).

    Numbers of a token are the product of `fn`, float32, with all its streams side by side, over
    their root mean square: C pre, C post, C x C mix, old streams first. Each kind is multiplied by
    its `scale`, and `base` is added. A sigmoid of pre plus `eps` weighs the streams, whose sum is
    rounded, then normed by its root mean square times `norm`, and rounded: x. Twice a sigmoid makes
    post; `iterations` of Sinkhorn's rounds make mix nearly doubly stochastic.

    Rows past the last token are finite, otherwise unspecified. The bits of a row depend on its own
    streams only.
    """
    return _read(
        streams_TCD,
        fn_RX,
        base_R,
        scale_3,
        norm_D,
        num_tokens,
        iterations=iterations,
        eps=eps,
        norm_eps=norm_eps,
    )

"""Hyper-connections on NVIDIA GPUs (`triton_kernels.py`): two kernels, where XLA needs ten.

A token's product with `fn` is cut into as many chunks for one token as for many: its bits do not
depend on T.
"""

import jax
import jax.numpy as jnp

from jengine.pallas_kernels.platform import require_cuda
from jengine.pallas_kernels.triton_call import Schedule, triton_call

DTYPES = ("bfloat16", "float16", "float32")
CHUNKS = 32
MAX_WIDTH, MAX_STREAMS = 16384, 8
MANY_TOKENS = 512  # from which on more of them share what is read of `fn`; by the same instructions


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
    del num_tokens  # padding rows are computed like the rest
    (T, C, D), dtype = streams_TCD.shape, streams_TCD.dtype
    if dtype not in DTYPES or D > MAX_WIDTH or C > MAX_STREAMS:
        raise NotImplementedError(f"{dtype} streams, {C} of {D}")
    require_cuda()
    from jengine.pallas_kernels.read_streams.triton_kernels import mix_streams, project_streams

    R, depth = fn_RX.shape[0], 32
    sizes = {"T": T, "R": R, "RP": max(16, 1 << R.bit_length())}
    rows = project_rows(T)
    chunk = -(-C * D // (CHUNKS * depth)) * depth
    parts = triton_call(
        project_streams,
        (streams_TCD, fn_RX.astype(jnp.float32)),
        [jax.ShapeDtypeStruct((CHUNKS, T, sizes["RP"]), jnp.float32)],
        grid=(-(-T // rows), CHUNKS),
        constants=sizes
        | {"X": C * D, "ROWS": rows, "CHUNK": chunk, "BK": depth, "WIDE": dtype == jnp.float32},
        schedule=Schedule(4, 3),
    )[0]
    x_TD, post_TC, mix_TCC = triton_call(
        mix_streams,
        (
            streams_TCD,
            parts,
            base_R.astype(jnp.float32),
            scale_3.astype(jnp.float32),
            norm_D.astype(jnp.float32),
        ),
        [
            jax.ShapeDtypeStruct((T, D), dtype),
            jax.ShapeDtypeStruct((T, C), jnp.float32),
            jax.ShapeDtypeStruct((T, C, C), jnp.float32),
        ],
        grid=(T,),
        constants=sizes
        | {
            "C": C,
            "CP": 1 << (C - 1).bit_length(),
            "D": D,
            "DP": 1 << (D - 1).bit_length(),
            "CHUNKS": CHUNKS,
            "ITERATIONS": iterations,
            "EPS": float(eps),
            "NORM_EPS": float(norm_eps),
        },
        schedule=Schedule(num_warps=8, num_stages=1),
    )
    return x_TD, post_TC, mix_TCC


def project_rows(num_tokens: int) -> int:
    """Tokens of a program."""
    return 32 if num_tokens >= MANY_TOKENS else 16

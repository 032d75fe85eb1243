"""Products of few rows, routed experts and attention over latents on a GPU, beside their floors.

    python -m benchmarks.gpu_kernels [products] [experts] [latents] [experts_fp4] [linear_fp8]
                                     [v4 | v4-selection ...]

Each line is the time of one call among several with weights of their own (nothing stays in the L2
cache between two), in one CUDA graph: what a call adds to a decode step, its launch included. The
floor is bytes over 3.0 TB/s or arithmetic over 750 TFLOP/s, whichever takes longer. Products are
compared with what XLA makes of the same, cuBLASLt alone and with its own kernels.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jengine.pallas_kernels.grouped_matmul import triton_gpu as experts_gpu
from jengine.pallas_kernels.linear import triton_gpu as linear_gpu
from jengine.pallas_kernels.mla_attention import triton_gpu as mla_gpu
from jengine.pallas_kernels.silu_mul.reference import silu_mul
from jengine.runtime.xla_options import compiler_options

BYTES_PER_US, FLOPS_PER_US = 3.0e6, 750e6
PRODUCTS = {  # of a layer of Llama-3.1-8B: (outputs, depth, gated)
    "qkv": (6144, 4096, False),
    "o": (4096, 4096, False),
    "gate_up": (14336, 4096, True),
    "down": (4096, 14336, False),
    "head": (128256, 4096, False),
}
ROWS = (1, 8, 32, 64, 128)
EXPERTS = {  # (experts, top_k, embed, mlp)
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "DeepSeek-V2-Lite": (64, 6, 2048, 1408),
}
TOKENS = (1, 8, 64, 256, 1024, 8192)
LATENTS = ((1, 1024), (64, 1024), (64, 4096), (256, 512))  # 16 heads, entries of 512 and 64
OF_V4 = ("selection", "attention", "compression", "streams", "experts")
PACKED = ("experts_fp4", "linear_fp8")  # in packed_weights.py
TABLES = ("products", "experts", "latents", *PACKED, "v4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", choices=[*TABLES, *(f"v4-{name}" for name in OF_V4)])
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for table in options.tables or TABLES:
        if table.startswith("v4"):
            v4(OF_V4 if table == "v4" else (table.removeprefix("v4-"),))
        elif table in PACKED:
            from benchmarks import packed_weights  # which imports this module

            getattr(packed_weights, table)()
        else:
            {"products": products, "experts": experts, "latents": latents}[table]()


def products() -> None:
    for name, (outputs, depth, gated) in PRODUCTS.items():
        copies = max(3, int(400e6 / (outputs * depth)))
        weights = [normal(i, (outputs * (1 + gated), depth)) for i in range(copies)]
        for rows in ROWS:
            xs = [normal(100 + i, (rows, depth)) for i in range(copies)]
            is_head = outputs >= linear_gpu.MIN_HEAD_OUTPUTS
            dtype = jnp.float32 if is_head else jnp.bfloat16
            kernel = linear_gpu.silu_linear if gated else linear_gpu.linear
            if is_head:
                kernel = functools.partial(kernel, out_dtype=dtype)
            floor = weights[0].nbytes / BYTES_PER_US
            line = f"{name} x {rows}: floor {floor:.1f} us"
            if gated or is_head or rows <= linear_gpu.MAX_ROWS:
                line += f", ours {time_calls(kernel, zip(xs, weights, strict=True)):.1f}"
            for label, is_triton in (("XLA", True), ("cuBLASLt", False)):
                us = time_calls(
                    functools.partial(plain_product, gated=gated, dtype=dtype),
                    zip(xs, weights, strict=True),
                    xla_gpu_enable_triton_gemm=is_triton,
                )
                line += f", {label} {us:.1f}"
            print(line, flush=True)


def plain_product(x_TD: jax.Array, w_FD: jax.Array, *, gated: bool, dtype: Any) -> jax.Array:
    y_TF = jax.lax.dot_general(x_TD, w_FD, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    return silu_mul(y_TF) if gated else y_TF


def experts() -> None:
    for name, (E, k, D, F) in EXPERTS.items():
        gate_up, down = normal(1, (E, 2 * F, D)), normal(2, (E, D, F))
        for tokens in TOKENS:
            rng = np.random.default_rng(tokens)
            calls = []
            for i in range(12 if tokens <= 8 else 4):
                ids = np.stack([rng.permutation(E)[:k] for _ in range(tokens)]).astype(np.int32)
                calls.append((normal(10 + i, (tokens, D)), jnp.asarray(ids)))
            weights = jnp.full((tokens, k), 1 / k, jnp.float32)

            def run(
                x: jax.Array, ids: jax.Array, weights: Any, gate_up: Any, down: Any
            ) -> jax.Array:
                return experts_gpu.expert_parts(
                    x, ids, weights, gate_up, down, num_tokens=jnp.int32(x.shape[0])
                )

            touched = np.mean([len(np.unique(np.asarray(ids))) for _, ids in calls])
            floor = max(
                touched * 3 * F * D * 2 / BYTES_PER_US, tokens * k * 6 * F * D / FLOPS_PER_US
            )
            us = time_calls(run, [(*call, weights, gate_up, down) for call in calls])
            print(f"{name} x {tokens}: floor {floor:.0f} us, ours {us:.1f}", flush=True)


def latents() -> None:
    N, C, R, B = 16, 512, 64, 16
    for seqs, context in LATENTS:
        pages_per_seq = context // B
        num_pages = seqs * pages_per_seq
        table = 1 + np.random.default_rng(0).permutation(num_pages).astype(np.int32)
        table_SM = jnp.asarray(table.reshape(seqs, pages_per_seq))
        q, cu = normal(9, (seqs, N, C + R)), jnp.arange(seqs + 1, dtype=jnp.int32)
        lens = jnp.full(seqs, context, jnp.int32)
        copies = max(3, int(200e6 / (num_pages * B * (C + R) * 2)))
        pages = [normal(i, (num_pages + 1, B, C + R)) for i in range(copies)]

        def run(q: jax.Array, pages: jax.Array, table: Any, cu: Any, lens: Any) -> jax.Array:
            return mla_gpu.mla_attention(
                q, pages, table, cu, lens, jnp.int32(q.shape[0]), value_dim=C, scale=0.1,
                is_decode=True,
            )  # fmt: skip

        floor = seqs * context * (C + R) * 2 / BYTES_PER_US
        us = time_calls(run, [(q, p, table_SM, cu, lens) for p in pages])
        print(f"latents {seqs} x {context}: floor {floor:.1f} us, ours {us:.1f}", flush=True)


def v4(names: tuple[str, ...]) -> None:
    from benchmarks import v4_kernels  # which imports this module

    v4_kernels.v4([getattr(v4_kernels, name) for name in names])


@functools.partial(jax.jit, static_argnums=1)
def normal(seed: int, shape: tuple[int, ...]) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def time_calls(run: Callable[..., Any], calls: Any, **options: bool) -> float:
    """Microseconds of one of the calls, all in one program; the best of several rounds."""
    calls = list(calls)
    program = jax.jit(lambda calls: [run(*call) for call in calls]).lower(calls)
    compiled = program.compile(compiler_options={**compiler_options("cuda"), **options})
    for _ in range(2):
        jax.block_until_ready(compiled(calls))
    rounds = []
    for _ in range(7):
        started = time.perf_counter()
        jax.block_until_ready([compiled(calls) for _ in range(6)])
        rounds.append((time.perf_counter() - started) / 6)
    return min(rounds) / len(calls) * 1e6


if __name__ == "__main__":
    main()

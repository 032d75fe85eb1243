"""Compares the bits of rows in batches of many sizes on this machine's GPU: `python -m` this, PART.

A process of its own: a process has one back end, and the tests' is the CPU's.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jengine.layers.sampling import top_p_threshold
from jengine.pallas_kernels.add_rms_norm.api import add_rms_norm
from jengine.pallas_kernels.grouped_matmul.api import expert_parts
from jengine.pallas_kernels.linear.api import linear, silu_linear
from jengine.pallas_kernels.log_softmax_rows.api import log_softmax_rows
from jengine.pallas_kernels.ragged_paged_attention.api import ragged_paged_attention
from jengine.pallas_kernels.rms_norm.api import rms_norm
from jengine.pallas_kernels.route_experts.api import route
from jengine.runtime.xla_options import bucket_options, compiler_options

ROWS = (1, 2, 8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048, 8192)
# (outputs, depth): Llama-3.1-8B and -70B, Qwen3-0.6B, -8B and -30B-A3B, SmolLM2, Mistral's window
PRODUCTS = (
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (8192, 28672),
    (4096, 1024), (1024, 2048), (1024, 3072), (5120, 2048), (2048, 4096), (128, 2048),
    (960, 576), (576, 576), (576, 1536), (4096, 12288), (128256, 4096),
)  # fmt: skip


def main(part: str) -> None:
    PARTS[part]()


def equal(
    name: str, run: Callable[..., Any], rows: Sequence[jax.Array], counts: Sequence[int] = ROWS
) -> None:
    """`run(*rows)` for the first so many rows: the same bits as for all that are compared."""
    expected: list[np.ndarray] = []
    different = []
    for count in counts:
        some = [x[:count] for x in rows]
        options = bucket_options(compiler_options("cuda"), count, min(count, 256), True)
        got = jax.jit(lambda *xs: run(*xs)).lower(*some).compile(options)(*some)  # traced anew
        got = [np.asarray(x.astype(jnp.float32)) for x in jax.tree.leaves(got)]
        for one, other in zip(got, expected, strict=False):
            common = min(len(one), len(other))
            if not np.array_equal(one[:common], other[:common]):
                different.append(count)
        expected = got  # of most rows so far
    print("ok" if not different else f"{name}: rows {different} differ", flush=True)


def normal(seed: int, shape: tuple[int, ...], scale: float = 1.0) -> jax.Array:
    draw = functools.partial(jax.random.normal, shape=shape, dtype=jnp.bfloat16)
    return jax.jit(lambda: draw(jax.random.key(seed)) * scale)()


def products() -> None:
    for outputs, depth in PRODUCTS:
        w, x = normal(1, (outputs, depth), 0.02), normal(2, (ROWS[-1], depth))
        is_head = outputs > 100_000
        counts = [n for n in ROWS if n <= 256] if is_head else ROWS
        dtype = jnp.float32 if outputs == 128 or is_head else jnp.bfloat16
        equal(
            f"{outputs} x {depth}", lambda x, w=w, d=dtype: linear(x, w, out_dtype=d), [x], counts
        )


def others() -> None:
    for width in (576, 1024, 2048, 4096):
        x, weight = normal(3, (ROWS[-1], width)), normal(4, (width,))
        added = normal(5, (ROWS[-1], width))
        equal(f"norm {width}", lambda x, w=weight: rms_norm(x, w, eps=1e-5), [x])
        equal(
            f"sum and norm {width}",
            lambda x, y, w=weight: add_rms_norm(x, y[None], w, eps=1e-5),
            [x, added],
        )
    w, x = normal(1, (2 * 3072, 1024), 0.03), normal(2, (ROWS[-1], 1024))
    equal("gate and up", lambda x: silu_linear(x, w), [x])
    few = [n for n in ROWS if n <= 64]
    for vocab_size in (49_152, 128_256):
        logits = 4 * normal(7, (64, vocab_size)).astype(jnp.float32)
        equal(f"log-softmax {vocab_size}", log_softmax_rows, [logits], few)
        equal(
            f"top-p {vocab_size}",
            lambda x: top_p_threshold(x, jnp.full((x.shape[0],), 0.9)),
            [logits],
            few,
        )


def experts() -> None:
    E, k, D, F = 64, 8, 2048, 768
    gate_up, down = normal(1, (E, 2 * F, D), 0.02), normal(2, (E, D, F), 0.02)
    router = normal(3, (E, D), 0.02)

    def run(x: jax.Array) -> jax.Array:
        logits = linear(x, router, out_dtype=jnp.float32)
        ids, weights = route(logits, k, renormalise=True)
        n = jnp.int32(x.shape[0])
        parts = expert_parts(x, ids, weights, gate_up, down, num_tokens=n)
        return jnp.moveaxis(parts, 0, 1)

    equal("experts", run, [normal(4, (ROWS[-1], D))])


def attention() -> None:
    """Every row of a text: whole, in chunks, and alone among others."""
    for heads, kv_heads, head_dim, window, sinks in (
        (32, 8, 128, None, None),
        (9, 3, 64, None, None),
        (64, 8, 64, 128, True),
        (8, 4, 256, 1024, None),
    ):
        length, page = 9000, 16
        pages = normal(1, (length // page + 2, page, 2, kv_heads, head_dim))
        q = normal(2, (length, heads, head_dim))
        table = jnp.arange(1, length // page + 2, dtype=jnp.int32)
        sink_logits = None if sinks is None else normal(3, (heads,)).astype(jnp.float32)

        def attend(q, table, cu, lens, is_decode, kw=(pages, window, sink_logits, head_dim)):
            pages, window, sink_logits, head_dim = kw
            run = functools.partial(
                ragged_paged_attention,
                scale=head_dim**-0.5,
                window=window,
                sinks_N=sink_logits,
                is_decode=is_decode,
            )
            num_seqs = jnp.int32(lens.shape[0])
            return np.asarray(jax.jit(run)(q, pages, table, cu, lens, num_seqs).astype(jnp.float32))

        def i32(*values: int) -> jax.Array:
            return jnp.asarray(values, jnp.int32)

        whole = attend(q, table[None], i32(0, length), i32(length), False)
        differ = []
        for first, count in ((0, 255), (255, 700), (4000, 129), (8190, 500)):
            end = first + count
            part = attend(q[first:end], table[None], i32(0, count), i32(end), False)
            if not np.array_equal(part, whole[first:end]):
                differ.append(f"chunk {first}:{end}")
        at = np.array(
            [0, 1, 63, 64, 255, 256, 257, 511, 1023, 1500, 2047, 2048, 4096, 8191, 8192, 8999]
        )
        for seqs in (1, 4, 16, 256):
            for group in np.resize(at, max(seqs, len(at))).reshape(-1, seqs):
                tables = jnp.broadcast_to(table, (seqs, len(table)))
                cu = jnp.arange(seqs + 1, dtype=jnp.int32)
                out = attend(q[group], tables, cu, jnp.asarray(group + 1, jnp.int32), True)
                if not np.array_equal(out, whole[group]):
                    bad = group[(out != whole[group]).any((1, 2))]
                    differ.append(f"{seqs} decodes at {sorted(set(bad.tolist()))}")
        print(
            "ok" if not differ else f"attention {heads} {head_dim} {window}: {differ}", flush=True
        )


PARTS = {"products": products, "others": others, "experts": experts, "attention": attention}

if __name__ == "__main__":
    main(sys.argv[1])

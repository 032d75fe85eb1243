"""Times sparse latent attention beside attention to everything, against the length of the context:
`python benchmarks/sparse_attention_cpu.py`.

One layer of a decode step. The choice of tokens reads every index key, which is short; what is
attended to does not grow. Sizes take turns, so that a noisy neighbour hits all. Best times,
milliseconds.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jengine.pallas_kernels.mla_attention import mla_attention
from jengine.pallas_kernels.select_tokens import select_tokens
from jengine.pallas_kernels.sparse_mla_attention import sparse_mla_attention

PAGE = 16
SCALE = 0.1
PARTS = ("select", "attend", "all")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--seqs", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--latent-dim", type=int, default=512)
    parser.add_argument("--rope-dim", type=int, default=64)
    parser.add_argument("--index-heads", type=int, default=16)
    parser.add_argument("--index-dim", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    calls = {context: prepare(args, context) for context in args.contexts}
    times = {(context, part): [] for context in args.contexts for part in PARTS}
    for turn in range(args.repeats + 1):
        for context, part in times:
            started = time.perf_counter()
            calls[context][part]().block_until_ready()
            if turn:  # the first compiles
                times[context, part].append(time.perf_counter() - started)
    print(f"{'context':>8}" + "".join(f"{part:>10}" for part in PARTS))
    for context in args.contexts:
        best = "".join(f"{min(times[context, part]) * 1e3:10.2f}" for part in PARTS)
        print(f"{context:8}{best}")


def prepare(args: argparse.Namespace, context: int) -> dict[str, Callable[[], jax.Array]]:
    """The parts of one step over contexts of this length, of one new token each."""
    S, E = args.seqs, args.latent_dim + args.rope_dim
    pages_per_seq = -(-context // PAGE)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), args.dtype)

    pages = draw(S * pages_per_seq + 1, PAGE, E + args.index_dim)
    table = jnp.arange(1, S * pages_per_seq + 1, dtype=jnp.int32).reshape(S, -1)
    cu_q_lens = jnp.arange(S + 1, dtype=jnp.int32)
    batch = (table, cu_q_lens, jnp.full((S,), context, jnp.int32), jnp.int32(S))
    index_q, weights = draw(S, args.index_heads, args.index_dim), draw(S, args.index_heads)
    q = draw(S, args.heads, E)
    attention = dict(value_dim=args.latent_dim, scale=SCALE)
    select = jax.jit(partial(select_tokens, top_k=args.top_k, scale=SCALE))
    attend = jax.jit(partial(sparse_mla_attention, **attention))
    attend_all = jax.jit(partial(mla_attention, **attention))
    slots = select(index_q, weights.astype(jnp.float32), pages, *batch)
    latents = jnp.asarray(pages[..., :E])
    return {
        "select": lambda: select(index_q, weights.astype(jnp.float32), pages, *batch),
        "attend": lambda: attend(q, pages, slots, jnp.int32(S)),
        "all": lambda: attend_all(q, latents, *batch),
    }


if __name__ == "__main__":
    main()

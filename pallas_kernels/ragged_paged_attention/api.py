"""`ragged_paged_attention`: causal attention of packed queries over the paged cache, prefill and
decode alike.
"""

import jax

from jengine.pallas_kernels.dispatch import first_of
from jengine.pallas_kernels.ragged_paged_attention import cpu_ffi, formula, reference, triton_gpu

_attention = first_of(
    cpu_ffi.ragged_paged_attention,
    triton_gpu.ragged_paged_attention,
    reference.ragged_paged_attention,
    formula=formula.ragged_paged_attention,
)


def ragged_paged_attention(
    q_TNH: jax.Array,
    kv_pages_PB2KH: jax.Array,
    page_table_SM: jax.Array,
    cu_q_lens_S1: jax.Array,
    kv_lens_S: jax.Array,
    num_seqs: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    is_decode: bool = False,
) -> jax.Array:
    """Return [T, N, H] in `q.dtype`.

    Sequence `s < num_seqs` owns tokens `cu_q_lens[s]:cu_q_lens[s + 1]`; its last query stands at
    position `kv_lens[s] - 1`, and its keys and values (this step's included: write them first) lie
    in the pages of `page_table[s]`. A query at position p reads positions `max(0, p - window +
    1)..p`; a table entry that holds none of these may be the null page 0. Nothing else is read:
    unused slots may hold NaN.

    Scores are `soft_cap * tanh(q.k * scale / soft_cap)`; `sinks` adds one logit per head to the
    softmax's sum. `is_decode` promises that every sequence has one new token. Rows past the last
    token are finite, otherwise unspecified. The bits of a row depend on its own sequence only, not
    on T, S, its neighbours or how the prompt was cut into chunks (on GPUs unless traced with
    `tracing_invariant(False)`: long prompts then have a kernel of their own).
    """
    return _attention(
        q_TNH,
        kv_pages_PB2KH,
        page_table_SM,
        cu_q_lens_S1,
        kv_lens_S,
        num_seqs,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks_N=sinks_N,
        is_decode=is_decode,
    )

"""The Triton kernel of `latent_attention`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl

from jengine.pallas_kernels.ragged_paged_attention.triton_kernels import LOG2_E, NEVER, accumulate


@triton.jit
def attend_chunk(
    q_ptr,  # [T, N, P + R]
    k_ptr,  # [N, T, P]
    entries_ptr,  # [T, C + R]: rotated keys behind the latents
    v_ptr,  # [N, T, V]
    token_ptr,  # i32[S + 1]: the first token of a sequence
    tiles_ptr,  # i32[W, 4]: sequence, first token, number of queries, position of the first
    num_tiles_ptr,  # i32[1]
    lse_ptr,  # f32[T, N]: log2 of the sum that earlier positions have
    prior_ptr,  # [T, N, V]: what those give, becomes out
    # outputs
    out_ptr,  # [T, N, V]
    T: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    PP: tl.constexpr,  # P, rounded up to a power of two
    C: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    V: tl.constexpr,
    VP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of queries of one sequence, for one head, against the tokens of the same step."""
    tile = tl.program_id(0) // N
    head = tl.program_id(0) % N
    if tile >= tl.load(num_tiles_ptr):
        return
    first_token = tl.load(tiles_ptr + tile * 4 + 1)
    num_queries = tl.load(tiles_ptr + tile * 4 + 2)
    is_padding = tl.load(tiles_ptr + tile * 4 + 3) < 0
    rows = tl.arange(0, ROWS)
    token = first_token + rows
    is_row = (rows < num_queries)[:, None]
    p = tl.arange(0, PP)[None, :]
    r = tl.arange(0, RP)[None, :]
    v = tl.arange(0, VP)[None, :]
    row = (token.to(tl.int64) * N + head)[:, None]
    q_at = q_ptr + row * (P + R)
    q = tl.load(q_at + p, mask=is_row & (p < P), other=0.0)
    q_rope = tl.load(q_at + P + r, mask=is_row & (r < R), other=0.0)
    begin = tl.load(token_ptr + tl.load(tiles_ptr + tile * 4))
    end = tl.where(is_padding, begin, first_token + num_queries)
    masked = tl.where(is_padding, begin, begin + (first_token + 1 - begin) // BLOCK * BLOCK)
    k_ptr += (head * T).to(tl.int64) * P
    v_ptr += (head * T).to(tl.int64) * V
    top = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VP], tl.float32)
    # Blocks before `masked` are seen whole by every row.
    for start in range(begin, masked, BLOCK):
        key = (start + tl.arange(0, BLOCK))[:, None]
        k = tl.load(k_ptr + key * P + p, mask=p < P, other=0.0)
        k_rope = tl.load(entries_ptr + key * (C + R) + C + r, mask=r < R, other=0.0)
        values = tl.load(v_ptr + key * V + v, mask=v < V, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.dot(q_rope, tl.trans(k_rope), s, input_precision=PRECISION)
        top, total, acc = accumulate(s, values, None, top, total, acc, SCALE * LOG2_E, PRECISION)
    for start in range(masked, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        key = at[:, None]
        is_key = key < end
        k = tl.load(k_ptr + key * P + p, mask=is_key & (p < P), other=0.0)
        k_rope = tl.load(entries_ptr + key * (C + R) + C + r, mask=is_key & (r < R), other=0.0)
        values = tl.load(v_ptr + key * V + v, mask=is_key & (v < V), other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = tl.dot(q_rope, tl.trans(k_rope), s, input_precision=PRECISION)
        is_seen = at[None, :] <= token[:, None]
        top, total, acc = accumulate(s, values, is_seen, top, total, acc, SCALE * LOG2_E, PRECISION)
    # Earlier positions are one more term of the sum, whose logarithm is known.
    lse = tl.load(lse_ptr + token * N + head, mask=rows < num_queries, other=NEVER)
    in_tile = is_row & (v < V)
    prior = tl.load(prior_ptr + row * V + v, mask=in_tile, other=0.0).to(tl.float32)
    new_top = tl.maximum(top, lse)
    decay, share = tl.exp2(top - new_top), tl.exp2(lse - new_top)
    out = (acc * decay[:, None] + prior * share[:, None]) / (total * decay + share)[:, None]
    tl.store(out_ptr + row * V + v, out.to(out_ptr.dtype.element_ty), mask=in_tile)

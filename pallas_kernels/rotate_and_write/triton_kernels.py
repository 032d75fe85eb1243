"""The Triton kernel of `rotate_and_write`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def norm_heads(x, factor, weight, DTYPE: tl.constexpr):
    """Rounded after each product, as `rms_norm` is."""
    normed = (x * factor).to(DTYPE).to(tl.float32)
    return (normed * weight).to(DTYPE).to(tl.float32)


@triton.jit
def add_up(at, mask, P: tl.constexpr, STRIDE: tl.constexpr, DTYPE: tl.constexpr):
    """The sum of P summands, rounded."""
    total = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, P):
        total += tl.load(at + part * STRIDE, mask=mask, other=0.0)
    return total.to(DTYPE).to(tl.float32)


@triton.jit
def rotate_heads(
    qkv_ptr,  # [P, T, N + 2 K, H]
    cos_ptr,  # f32[T, HALF]
    sin_ptr,  # f32[T, HALF]
    q_norm_ptr,  # [H], or anything
    k_norm_ptr,  # [H], or anything
    slots_ptr,  # i32[T]
    num_tokens_ptr,  # i32[1]
    old_pages_ptr,  # aliased to pages
    # outputs
    q_ptr,  # [T, N, H]
    pages_ptr,  # [P * B, 2 K, H]
    T: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HP: tl.constexpr,  # H, rounded up to a power of two
    HALF: tl.constexpr,  # the pairs (i, i + HALF) rotate
    HEADS: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    EPS: tl.constexpr,
):
    """Some heads of one token. Keys, then values: the order of heads is that of a slot."""
    DTYPE: tl.constexpr = q_ptr.dtype.element_ty
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    lane = tl.arange(0, HP)
    partner = tl.where(lane < HALF, lane + HALF, tl.where(lane < 2 * HALF, lane - HALF, lane))
    is_q = (head < N)[:, None]
    is_v = (head >= N + K)[:, None]
    in_head = (lane < H)[None, :]
    mask = (head < N + 2 * K)[:, None] & in_head
    row = ((token * (N + 2 * K)).to(tl.int64) + head)[:, None] * H
    x = add_up(qkv_ptr + row + lane[None, :], mask, P, T * (N + 2 * K) * H, DTYPE)
    y = add_up(qkv_ptr + row + partner[None, :], mask, P, T * (N + 2 * K) * H, DTYPE)
    plain = x
    if HAS_NORMS:
        factor = tl.rsqrt(tl.sum(x * x, 1) / H + EPS)[:, None]
        q_weight = tl.load(q_norm_ptr + lane, mask=lane < H, other=0.0)[None, :]
        k_weight = tl.load(k_norm_ptr + lane, mask=lane < H, other=0.0)[None, :]
        x = norm_heads(x, factor, tl.where(is_q, q_weight, k_weight).to(tl.float32), DTYPE)
        q_weight = tl.load(q_norm_ptr + partner, mask=lane < H, other=0.0)[None, :]
        k_weight = tl.load(k_norm_ptr + partner, mask=lane < H, other=0.0)[None, :]
        y = norm_heads(y, factor, tl.where(is_q, q_weight, k_weight).to(tl.float32), DTYPE)
    angle = token * HALF + tl.where(lane < HALF, lane, lane - HALF)
    rotates = lane < 2 * HALF
    cos = tl.load(cos_ptr + angle, mask=rotates, other=1.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=rotates, other=0.0)[None, :]
    x = x * cos + y * tl.where((lane < HALF)[None, :], -sin, sin)
    x = tl.where(is_v, plain, x).to(DTYPE)
    q_row = ((token * N).to(tl.int64) + head)[:, None] * H
    tl.store(q_ptr + q_row + lane[None, :], x, mask=mask & is_q)
    slot = tl.load(slots_ptr + token)
    if (token < tl.load(num_tokens_ptr)) & (slot >= 0):
        kv_row = (slot.to(tl.int64) * (2 * K) + head - N)[:, None] * H
        entry = x.to(pages_ptr.dtype.element_ty)
        tl.store(pages_ptr + kv_row + lane[None, :], entry, mask=mask & (is_q == 0))

"""Triton kernels of `read_streams`. Imported only where a program for a GPU is traced."""

import triton
import triton.language as tl


@triton.jit
def project_streams(
    streams_ptr,  # [T, X]: the streams of a token side by side
    fn_ptr,  # f32[R, X]
    # outputs
    parts_ptr,  # f32[CHUNKS, T, RP]: products with the rows of `fn`, then the sum of squares
    T: tl.constexpr,
    X: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,  # a power of two above R
    ROWS: tl.constexpr,  # tokens of a program
    CHUNK: tl.constexpr,  # values of a program, of each token
    BK: tl.constexpr,
    WIDE: tl.constexpr,  # the streams are float32
):
    """Some tokens and one chunk of their values."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    r = tl.arange(0, RP)
    squares = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, RP], tl.float32)
    for start in range(0, CHUNK, BK):
        k = chunk * CHUNK + start + tl.arange(0, BK)
        x = tl.load(
            streams_ptr + t[:, None].to(tl.int64) * X + k[None, :],
            mask=(t < T)[:, None] & (k < X)[None, :],
            other=0.0,
        ).to(tl.float32)
        fn = tl.load(
            fn_ptr + r[None, :] * X + k[:, None],
            mask=(r < R)[None, :] & (k < X)[:, None],
            other=0.0,
        )
        squares += tl.sum(x * x, 1)
        if WIDE:
            acc = tl.dot(x, fn, acc, input_precision="ieee")
        else:
            # TF32 holds bfloat16 exactly, and float32 in two parts to 22 bits.
            high = (fn.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            acc = tl.dot(x, high, acc, input_precision="tf32")
            acc = tl.dot(x, fn - high, acc, input_precision="tf32")
    part = tl.where(r[None, :] == R, squares[:, None], acc)
    at = (chunk * T + t)[:, None].to(tl.int64) * RP + r[None, :]
    tl.store(parts_ptr + at, part, mask=(t < T)[:, None])


@triton.jit
def mix_streams(
    streams_ptr,  # [T, C, D]
    parts_ptr,  # f32[CHUNKS, T, RP]
    base_ptr,  # f32[R]
    scale_ptr,  # f32[3]
    norm_ptr,  # f32[D]
    # outputs
    x_ptr,  # [T, D]
    post_ptr,  # f32[T, C]
    mix_ptr,  # f32[T, C, C]
    T: tl.constexpr,
    C: tl.constexpr,
    CP: tl.constexpr,  # C, rounded up to a power of two
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    CHUNKS: tl.constexpr,
    ITERATIONS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """One token: its numbers, what the block reads, how the streams will mix."""
    token = tl.program_id(0)
    parts_ptr += token.to(tl.int64) * RP
    streams_ptr += token.to(tl.int64) * (C * D)
    c = tl.arange(0, CP)
    squares = tl.sum(add_chunks(parts_ptr, R + tl.arange(0, 1), R + 1, T * RP, CHUNKS), 0)
    factor = tl.rsqrt(squares / (C * D) + NORM_EPS)
    pre = add_chunks(parts_ptr, c, C, T * RP, CHUNKS) * factor * tl.load(scale_ptr)
    pre = sigmoid(pre + tl.load(base_ptr + c, mask=c < C, other=0.0)) + EPS
    d = tl.arange(0, DP)
    acc = tl.zeros([DP], tl.float32)
    for i in tl.static_range(C):
        stream = tl.load(streams_ptr + i * D + d, mask=d < D, other=0.0).to(tl.float32)
        acc += tl.sum(tl.where(c == i, pre, 0.0), 0) * stream
    x = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / D + NORM_EPS)
    x = x * tl.load(norm_ptr + d, mask=d < D, other=0.0)
    x_at = x_ptr + token.to(tl.int64) * D + d
    tl.store(x_at, x.to(x_ptr.dtype.element_ty), mask=d < D)

    post = add_chunks(parts_ptr, C + c, 2 * C, T * RP, CHUNKS) * factor * tl.load(scale_ptr + 1)
    post = 2.0 * sigmoid(post + tl.load(base_ptr + C + c, mask=c < C, other=0.0))
    tl.store(post_ptr + token * C + c, post, mask=c < C)

    pair = tl.arange(0, CP * CP)
    is_pair = (pair // CP < C) & (pair % CP < C)
    r = tl.where(is_pair, 2 * C + pair // CP * C + pair % CP, R)
    numbers = add_chunks(parts_ptr, r, R, T * RP, CHUNKS) * factor * tl.load(scale_ptr + 2)
    numbers = numbers + tl.load(base_ptr + r, mask=is_pair, other=0.0)
    mix = sinkhorn(
        tl.reshape(tl.where(is_pair, numbers, -1.0e30), [CP, CP]),
        tl.reshape(is_pair, [CP, CP]),
        ITERATIONS,
        EPS,
    )
    mix_at = mix_ptr + token * (C * C) + pair // CP * C + pair % CP
    tl.store(mix_at, tl.reshape(mix, [CP * CP]), mask=is_pair)


@triton.jit
def add_chunks(parts_ptr, r, end, stride, CHUNKS: tl.constexpr):
    """Columns `r` before `end`, added up over chunks in a fixed order; zero for the others."""
    chunk = tl.arange(0, CHUNKS)
    at = parts_ptr + chunk[:, None] * stride + r[None, :]
    return tl.sum(tl.load(at, mask=(r < end)[None, :], other=0.0), 0)


@triton.jit
def sinkhorn(numbers, is_real, ITERATIONS: tl.constexpr, EPS: tl.constexpr):
    """[c, c]: a softmax of each row, then columns and rows divided by their sums in turn, columns
    first and last. What is not real becomes, and stays, zero."""
    powers = tl.exp(numbers - tl.max(numbers, 1)[:, None])
    mix = tl.where(is_real, powers / tl.sum(powers, 1)[:, None] + EPS, 0.0)
    mix = mix / (tl.sum(mix, 0) + EPS)[None, :]
    for _ in range(ITERATIONS - 1):
        mix = mix / (tl.sum(mix, 1) + EPS)[:, None]
        mix = mix / (tl.sum(mix, 0) + EPS)[None, :]
    return mix


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))

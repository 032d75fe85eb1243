"""The Triton kernel of `compress_tokens`. Imported only where a program for a GPU is traced.

A softmax is three vectors of channels: the largest score, the sum of weights relative to it, the
weighted sum of values. Tokens are joined to it one after the other, as the reference does.
"""

import triton
import triton.language as tl


@triton.jit
def compress_pieces(
    values_ptr,  # f32[T, U, H]
    scores_ptr,  # f32[T, U, H]
    states_ptr,  # f32[P, 3, Q, H]
    slots_ptr,  # i32[2, S]
    pieces_ptr,  # i32[G, 6]: sequence, first row, offset, count, is first, is last
    # outputs
    entries_ptr,  # f32[G, H]
    left_ptr,  # f32[P, 3, Q, H], aliased to states, or f32[S, 3, Q, H]: what sequences leave
    S: tl.constexpr,
    U: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,  # channels of a program
    UNROLL: tl.constexpr,  # tokens that are read at once
    IN_PLACE: tl.constexpr,  # `left` is states: a sequence has one piece
):
    """Some channels of a piece."""
    Q: tl.constexpr = 1 if U == 1 else 3
    piece = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.load(pieces_ptr + piece * 6)
    row = tl.load(pieces_ptr + piece * 6 + 1)
    offset = tl.load(pieces_ptr + piece * 6 + 2)
    count = tl.load(pieces_ptr + piece * 6 + 3)
    is_first = tl.load(pieces_ptr + piece * 6 + 4) != 0
    is_last = tl.load(pieces_ptr + piece * 6 + 5) != 0
    if count == 0:
        tl.store(entries_ptr + piece * H + h, tl.zeros([BLOCK], tl.float32), mask=h < H)
        return
    old_slot = tl.load(slots_ptr + sequence)
    has_old = old_slot >= 0
    old_ptr = states_ptr + tl.maximum(old_slot, 0).to(tl.int64) * (3 * Q * H)
    own_top, own_sum, own_acc = read_softmax(
        old_ptr, U - 1, has_old & is_first & (offset > 0), h, Q, H
    )
    own_top, own_sum, own_acc = take_tokens(
        values_ptr, scores_ptr, row, count, U - 1, own_top, own_sum, own_acc, h, U, H, UNROLL
    )
    top, total, acc = own_top, own_sum, own_acc
    if U == 2:
        # The first half of the group before: in the state, or of the piece before, which another
        # program has. Where the step begins with a new group, the state's group is the one before.
        before_ptr = pieces_ptr + tl.maximum(piece - 1, 0) * 6
        is_begun = (tl.load(before_ptr + 4) != 0) & (tl.load(before_ptr + 2) > 0)
        part = tl.where(is_first & (offset > 0), 2, 0)
        old_top, old_sum, old_acc = read_softmax(
            old_ptr, part, has_old & (is_first | is_begun), h, Q, H
        )
        old_top, old_sum, old_acc = take_tokens(
            values_ptr, scores_ptr, tl.load(before_ptr + 1),
            tl.where(is_first, 0, tl.load(before_ptr + 3)), 0, old_top, old_sum, old_acc,
            h, U, H, UNROLL,
        )  # fmt: skip
        top, total, acc = join(old_top, old_sum, old_acc, own_top, own_sum, own_acc)
    mean = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(entries_ptr + piece * H + h, mean, mask=h < H)
    if is_last:
        new_slot = tl.load(slots_ptr + S + sequence)
        if new_slot >= 0:
            left_at = new_slot if IN_PLACE else sequence
            left_ptr += left_at.to(tl.int64) * (3 * Q * H)
            if U == 2:
                write_softmax(left_ptr, 2, old_top, old_sum, old_acc, h, Q, H)
                is_begun = has_old & is_first & (offset > 0)
                top, total, acc = read_softmax(old_ptr, 0, is_begun, h, Q, H)
                top, total, acc = take_tokens(
                    values_ptr, scores_ptr, row, count, 0, top, total, acc, h, U, H, UNROLL
                )
                write_softmax(left_ptr, 0, top, total, acc, h, Q, H)
            write_softmax(left_ptr, U - 1, own_top, own_sum, own_acc, h, Q, H)


@triton.jit
def take_tokens(
    values_ptr,
    scores_ptr,
    row,
    count,
    half,
    top,
    total,
    acc,
    h,
    U: tl.constexpr,
    H: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The softmax over these tokens as well."""
    for start in range(0, count, UNROLL):
        for i in tl.static_range(UNROLL):
            is_token = start + i < count
            at = ((row + start + i).to(tl.int64) * U + half) * H + h
            score = tl.load(scores_ptr + at, mask=is_token & (h < H), other=0.0)
            value = tl.load(values_ptr + at, mask=is_token & (h < H), other=0.0)
            weight = tl.full(score.shape, 1.0, tl.float32)
            new_top, new_total, new_acc = join(top, total, acc, score, weight, value)
            top = tl.where(is_token, new_top, top)
            total = tl.where(is_token, new_total, total)
            acc = tl.where(is_token, new_acc, acc)
    return top, total, acc


@triton.jit
def join(top_a, total_a, acc_a, top_b, total_b, acc_b):
    """Of the tokens of both. A token's own has its score, a sum of one, its value."""
    top = tl.maximum(top_a, top_b)
    top = tl.where(top == -float("inf"), 0.0, top)  # both are empty
    decay_a = tl.exp(top_a - top)
    decay_b = tl.exp(top_b - top)
    return top, total_a * decay_a + total_b * decay_b, acc_a * decay_a + acc_b * decay_b


@triton.jit
def read_softmax(state_ptr, part, is_there, h, Q: tl.constexpr, H: tl.constexpr):
    """The part of a state; an empty softmax where there is none."""
    at = state_ptr + part * H + h
    mask = is_there & (h < H)
    top = tl.load(at, mask=mask, other=-float("inf"))
    total = tl.load(at + Q * H, mask=mask, other=0.0)
    return top, total, tl.load(at + 2 * Q * H, mask=mask, other=0.0)


@triton.jit
def write_softmax(state_ptr, part, top, total, acc, h, Q: tl.constexpr, H: tl.constexpr):
    at = state_ptr + part * H + h
    tl.store(at, top, mask=h < H)
    tl.store(at + Q * H, total, mask=h < H)
    tl.store(at + 2 * Q * H, acc, mask=h < H)

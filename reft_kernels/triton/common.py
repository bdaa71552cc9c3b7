"""Pieces that the forward and the backward kernel share.

Names follow the grammar of Triton kernels in the field: ``i_x`` an index, ``o_x`` offsets, ``m_x`` a mask, ``b_x`` a
block of values, ``BLOCK_X`` a tile size. A row's address is an int64 base; offsets inside a row, and inside the
weights of one set, are int32.
"""

import triton
import triton.language as tl

from reft_kernels.triton.interpreter import interpreted

NO_GROUP = tl.constexpr(2147483647)
# The interpreter keeps bfloat16 as storage only: its arithmetic on it is wrong.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def activate(s, ACTIVATION: tl.constexpr):
    """f(s)."""
    if ACTIVATION == "relu":
        # A comparison, not a maximum: NaN stays NaN.
        return tl.where(s <= 0, 0.0, s)
    elif ACTIVATION == "gelu":
        return 0.5 * s * (1 + tl.erf(s * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return s * sigmoid(s)
    elif ACTIVATION == "tanh":
        return tanh(s)
    else:
        return s


@triton.jit
def activation_slope(s, ACTIVATION: tl.constexpr):
    """f'(s)."""
    if ACTIVATION == "relu":
        return tl.where(s > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * s * s) * 0.3989422804014327
        return 0.5 * (1 + tl.erf(s * 0.7071067811865476)) + s * density
    elif ACTIVATION == "silu":
        b_sigmoid = sigmoid(s)
        return b_sigmoid * (1 + s * (1 - b_sigmoid))
    elif ACTIVATION == "tanh":
        b_tanh = tanh(s)
        return 1 - b_tanh * b_tanh
    else:
        return s * 0 + 1


@triton.jit
def sigmoid(s):
    """1 / (1 + exp(-s)), by the branch whose exponential cannot overflow."""
    e = tl.exp(-tl.abs(s))
    return tl.where(s >= 0, 1.0, e) / (1 + e)


@triton.jit
def tanh(s):
    """The hyperbolic tangent, by the exponential that cannot overflow."""
    e = tl.exp(-2 * tl.abs(s))
    b_tanh = (1 - e) / (1 + e)
    return tl.where(s < 0, -b_tanh, b_tanh)


@triton.jit
def keep_mask(seed, o_row, o_block, KEEP_THRESHOLD: tl.constexpr):
    """Which elements survive dropout; the stream of :mod:`reft_kernels.philox`.

    o_row are row numbers (int64) and o_block numbers of four columns; the result is four times as wide as their
    broadcast shape in its last dimension.
    """
    zero = (o_row + o_block) * 0
    c0 = (zero + o_block).to(tl.uint32)
    c1 = ((zero + o_row) & 0xFFFFFFFF).to(tl.uint32)
    c2 = (((zero + o_row) >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, zero.to(tl.uint32))
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return (words >> 1).to(tl.int32) >= KEEP_THRESHOLD


@triton.jit
def locate_rows(
    o_n, end, positions_ptr, group_ptr, P, S, G,
    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p,
    HAS_POSITIONS: tl.constexpr, HAS_GROUP: tl.constexpr,
):  # fmt: skip
    """Batch, slot, position (int64 all) and group (int32) of the slots o_n, and which slots below ``end`` are edited.

    A slot that is not edited has group -1.
    """
    m_edited = o_n < end
    i_b = (o_n // P).to(tl.int64)
    i_p = (o_n % P).to(tl.int64)
    i_s = i_p
    i_g = o_n * 0
    if HAS_POSITIONS:
        o_position = i_b * stride_positions_b + i_p * stride_positions_p
        i_s = tl.load(positions_ptr + o_position, mask=m_edited, other=-1).to(tl.int64)
        m_edited = m_edited & (i_s >= 0) & (i_s < S)
    if HAS_GROUP:
        o_group = i_b * stride_group_b + i_p * stride_group_p
        i_g64 = tl.load(group_ptr + o_group, mask=m_edited, other=-1).to(tl.int64)
        m_edited = m_edited & (i_g64 >= 0) & (i_g64 < G)
        i_g = i_g64.to(tl.int32)
    return i_b, i_p, i_s, tl.where(m_edited, i_g, -1), m_edited


@triton.jit
def next_group(i_g, i_last):
    """The lowest group above i_last among the slots' groups; NO_GROUP if there is none."""
    return tl.min(tl.where(i_g > i_last, i_g, NO_GROUP), axis=0)


@triton.jit
def operand(b_x):
    """A block as ``tl.dot`` takes it."""
    if INTERPRETED and b_x.dtype == tl.bfloat16:
        return b_x.to(tl.float32)
    return b_x


@triton.jit
def round_to(b_x, dtype: tl.constexpr):
    """The nearest values of a type, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # its conversion truncates
        bits = b_x.to(tl.int32, bitcast=True)
        b_near = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        b_x = tl.where((bits & 0x7F800000) == 0x7F800000, b_x, b_near)
    return b_x.to(dtype)


@triton.jit
def split_in_two(b_w):
    """float32 values as two bfloat16 blocks: w = high + low to 2^-17 of each value."""
    b_high = round_to(b_w, tl.bfloat16)
    b_low = round_to(b_w - b_high.to(tl.float32), tl.bfloat16)
    return operand(b_high), operand(b_low)


@triton.jit
def split_in_three(b_w):
    """float32 values as three bfloat16 blocks: w = high + middle + low, exactly. An infinity becomes NaN."""
    b_high = round_to(b_w, tl.bfloat16)
    b_rest = b_w - b_high.to(tl.float32)
    b_middle = round_to(b_rest, tl.bfloat16)
    b_low = round_to(b_rest - b_middle.to(tl.float32), tl.bfloat16)
    return operand(b_high), operand(b_middle), operand(b_low)


@triton.jit
def dot_down(b_x, b_w, b_acc, FLOAT32_DOT: tl.constexpr):
    """acc + x w^T on tensor cores, as good as in float32: x [N, D] as stored, w [R, D] in float32 or as stored."""
    if b_x.dtype == tl.bfloat16:
        if b_w.dtype == tl.bfloat16:
            return tl.dot(operand(b_x), tl.trans(operand(b_w)), b_acc)
        b_high, b_middle, b_low = split_in_three(b_w.to(tl.float32))
        b_acc = tl.dot(operand(b_x), tl.trans(b_low), b_acc)
        b_acc = tl.dot(operand(b_x), tl.trans(b_middle), b_acc)
        return tl.dot(operand(b_x), tl.trans(b_high), b_acc)
    b_wide = b_x.to(b_acc.dtype)
    b_right = tl.trans(b_w.to(b_acc.dtype))
    return tl.dot(b_wide, b_right, b_acc, input_precision=FLOAT32_DOT, out_dtype=b_acc.dtype)


@triton.jit
def dot_outer(b_u, b_x, b_acc, FLOAT32_DOT: tl.constexpr):
    """acc + u^T x on tensor cores, as good as in float32: u [N, R] in the accumulator's type, x [N, D] as stored."""
    if b_x.dtype == tl.bfloat16:
        b_high, b_middle, b_low = split_in_three(b_u)
        b_acc = tl.dot(tl.trans(b_low), operand(b_x), b_acc)
        b_acc = tl.dot(tl.trans(b_middle), operand(b_x), b_acc)
        return tl.dot(tl.trans(b_high), operand(b_x), b_acc)
    b_wide = b_x.to(b_acc.dtype)
    return tl.dot(tl.trans(b_u), b_wide, b_acc, input_precision=FLOAT32_DOT, out_dtype=b_acc.dtype)


@triton.jit
def dot_up(b_u, b_w, b_acc, HALF: tl.constexpr, FLOAT32_DOT: tl.constexpr):
    """acc + u w on tensor cores: u [N, R] in the accumulator's type, w [R, D] in it or as stored.

    Where the result is rounded to half precision (HALF) u and w count as two bfloat16 terms each, and the product of
    the low ones is left out: an error of 2^-16 of each product; else as good as in float32.
    """
    if HALF:
        u_high, u_low = split_in_two(b_u)
        if b_w.dtype == tl.bfloat16:
            b_acc = tl.dot(u_low, operand(b_w), b_acc)
            return tl.dot(u_high, operand(b_w), b_acc)
        w_high, w_low = split_in_two(b_w.to(tl.float32))
        b_acc = tl.dot(u_low, w_high, b_acc)
        b_acc = tl.dot(u_high, w_low, b_acc)
        return tl.dot(u_high, w_high, b_acc)
    return tl.dot(b_u, b_w.to(b_acc.dtype), b_acc, input_precision=FLOAT32_DOT, out_dtype=b_acc.dtype)


@triton.jit
def arrive(word_ptr):
    """Tells the grid that this program's stores are made; the result goes to :func:`wait`.

    The sense-reversing barrier: each program adds to the word so that one whole arrival flips its top bit, and
    waits for the flip. The lower bits return to zero by themselves, so the word never needs to be cleared.
    """
    n_programs = tl.num_programs(0)
    arrival = tl.where(tl.program_id(0) == 0, 2147483648 - (n_programs.to(tl.int64) - 1), 1).to(tl.int32)
    # NOTE: a release atomic does not wait for the other warps of its program; the barrier does.
    tl.debug_barrier()
    return tl.atomic_add(word_ptr, arrival, sem="release", scope="gpu")


@triton.jit
def wait(word_ptr, before):
    """Waits until every program of the grid has arrived, and sees what they stored before.

    All programs must be resident at once: launch cooperatively.
    """
    now = before
    while ((now ^ before) & -2147483648) == 0:
        now = tl.atomic_add(word_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()

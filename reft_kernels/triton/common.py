"""Pieces that the forward and the backward kernel share.

Names follow the grammar of Triton kernels in the field: ``i_x`` an index, ``o_x`` offsets, ``m_x`` a mask, ``b_x`` a
block of values, ``BLOCK_X`` a tile size. Row addresses are int64; offsets inside a row are int32.
"""

import triton
import triton.language as tl


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
    o_n, positions_ptr, group_ptr, N, P, S, G,
    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p,
    HAS_POSITIONS: tl.constexpr, HAS_GROUP: tl.constexpr,
):  # fmt: skip
    """Batch, slot, position and group of the slots o_n, and whether each is edited; all int64 but the last."""
    m_n = o_n < N
    i_b = o_n // P
    i_p = o_n % P
    i_s = i_p
    i_g = o_n * 0
    m_edited = m_n
    if HAS_POSITIONS:
        o_position = i_b * stride_positions_b + i_p * stride_positions_p
        i_s = tl.load(positions_ptr + o_position, mask=m_n, other=-1).to(tl.int64)
        m_edited = m_edited & (i_s >= 0) & (i_s < S)
    if HAS_GROUP:
        o_group = i_b * stride_group_b + i_p * stride_group_p
        i_g = tl.load(group_ptr + o_group, mask=m_n, other=-1).to(tl.int64)
        m_edited = m_edited & (i_g >= 0) & (i_g < G)
    return i_b, i_p, i_s, i_g, m_edited


@triton.jit
def grid_barrier(word_ptr):
    """Waits until every program of the grid is here, and makes their earlier stores visible.

    The sense-reversing barrier: each program adds to the word so that one whole arrival flips its top bit, and
    waits for the flip. The lower bits return to zero by themselves, so the word never needs to be cleared. All
    programs must be resident at once: launch cooperatively.
    """
    n_programs = tl.num_programs(0)
    arrival = tl.where(tl.program_id(0) == 0, 2147483648 - (n_programs.to(tl.int64) - 1), 1).to(tl.int32)
    # NOTE: a release atomic does not wait for the other warps of its program; the barrier does.
    tl.debug_barrier()
    before = tl.atomic_add(word_ptr, arrival, sem="release", scope="gpu")
    now = before
    while ((now ^ before) & -2147483648) == 0:
        now = tl.atomic_add(word_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()

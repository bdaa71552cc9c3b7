"""The forward edit: one launch, one program a row.

    y = D_p( h + scale * R^T delta ),   delta = f(W h + b) - gamma (R h + c)

A program reads its row twice: once for the r dot products, once (from cache) to add the edit. With a linear f the
dot products are those of A = W - gamma R, formed on the fly.
"""

import triton
import triton.language as tl

from reft_kernels.triton.common import activate, keep_mask, locate_rows


@triton.jit(do_not_specialize=["N", "P", "S", "G"])
def edit_forward_kernel(
    h_ptr,  # [B, S, d]
    y_ptr,  # [B, S, d], may be h
    delta_ptr,  # [N, r]
    s_ptr,  # [N, r], written if f is not linear
    before_ptr,  # [N, d], written if SAVE_ROWS
    R_ptr,  # [G, r, d]
    W_ptr,  # [G, r, d]
    b_ptr,  # [G, r]
    c_ptr,  # [G, r]
    positions_ptr,  # [B, P]
    group_ptr,  # [B, P]
    scale_ptr,  # [B, P]
    seed_ptr,  # [1]
    N, P, S, G, d,
    stride_h_b, stride_h_s, stride_y_b, stride_y_s,
    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, stride_scale_b, stride_scale_p,
    keep_gain,  # 1 / (1 - dropout)
    r: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUBTRACT: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP_THRESHOLD: tl.constexpr,
    SAVE_ROWS: tl.constexpr,
    COPY_OTHERS: tl.constexpr,  # rows that are not edited are copied from h to y
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The edit of one row a program; the formula stands at the top of this file."""
    i_n = tl.program_id(0).to(tl.int64)
    i_b, i_p, i_s, i_g, edited = locate_rows(
        i_n, positions_ptr, group_ptr, N, P, S, G,
        stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, HAS_POSITIONS, HAS_GROUP,
    )  # fmt: skip
    i_g = tl.where(edited, i_g, 0)
    i_s = tl.where(edited | (not HAS_POSITIONS), i_s, 0)
    h_row = h_ptr + i_b * stride_h_b + i_s * stride_h_s
    y_row = y_ptr + i_b * stride_y_b + i_s * stride_y_s
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < r
    weights = i_g * r * d + o_r[:, None].to(tl.int64) * d  # [BLOCK_R, 1]

    b_s = tl.zeros([BLOCK_R], dtype=ACCUMULATOR)
    b_q = tl.zeros([BLOCK_R], dtype=ACCUMULATOR)
    if HAS_W or SUBTRACT:
        for i_d in range(0, tl.where(edited, d, 0), BLOCK_D):
            o_d = i_d + tl.arange(0, BLOCK_D)
            m_d = o_d < d
            m_rd = m_r[:, None] & m_d[None, :]
            b_h = tl.load(h_row + o_d, mask=m_d, other=0).to(ACCUMULATOR)
            if HAS_W:
                b_W = tl.load(W_ptr + weights + o_d[None, :], mask=m_rd, other=0).to(ACCUMULATOR)
                if SUBTRACT and ACTIVATION == "linear":
                    b_W -= tl.load(R_ptr + weights + o_d[None, :], mask=m_rd, other=0).to(ACCUMULATOR)
                b_s += tl.sum(b_W * b_h[None, :], axis=1)
            if SUBTRACT and not (HAS_W and ACTIVATION == "linear"):
                b_R = tl.load(R_ptr + weights + o_d[None, :], mask=m_rd, other=0).to(ACCUMULATOR)
                b_q += tl.sum(b_R * b_h[None, :], axis=1)
    if HAS_B:
        b_s += tl.load(b_ptr + i_g * r + o_r, mask=m_r, other=0).to(ACCUMULATOR)
    if HAS_C:
        b_q += tl.load(c_ptr + i_g * r + o_r, mask=m_r, other=0).to(ACCUMULATOR)
    b_delta = activate(b_s, ACTIVATION) - b_q
    b_delta = tl.where(edited, b_delta, 0)
    tl.store(delta_ptr + i_n * r + o_r, b_delta, mask=m_r)
    if ACTIVATION != "linear":
        tl.store(s_ptr + i_n * r + o_r, tl.where(edited, b_s, 0), mask=m_r)
    if HAS_SCALE:
        b_delta *= tl.load(scale_ptr + i_b * stride_scale_b + i_p * stride_scale_p).to(ACCUMULATOR)
    if DROPOUT:
        seed = tl.load(seed_ptr)

    for i_d in range(0, d if COPY_OTHERS else tl.where(edited, d, 0), BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < d
        b_before = tl.load(h_row + o_d, mask=m_d, other=0)
        b_R = tl.load(R_ptr + weights + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0).to(ACCUMULATOR)
        b_y = b_before.to(ACCUMULATOR) + tl.sum(b_delta[:, None] * b_R, axis=0)
        if DROPOUT:
            o_block = i_d // 4 + tl.arange(0, BLOCK_D // 4)
            m_keep = keep_mask(seed, i_b * S + i_s, o_block, KEEP_THRESHOLD)
            b_y = tl.where(m_keep, b_y * keep_gain, 0)
        if SAVE_ROWS:
            tl.store(before_ptr + i_n * d + o_d, b_before, mask=m_d)
        b_after = b_y.to(b_before.dtype)
        if COPY_OTHERS:
            b_after = tl.where(edited, b_after, b_before)
        tl.store(y_row + o_d, b_after, mask=m_d)

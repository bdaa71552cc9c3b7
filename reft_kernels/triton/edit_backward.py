"""The backward edit: one cooperative launch.

    gd = scale * R g      gs = gd * f'(s)
    dh = g + W^T gs - gamma R^T gd
    dW = sum gs h^T       db = sum gs       dR = sum (scale delta) g^T - gamma sum gd h^T       dc = -gamma sum gd

Two reductions depend on one another: over the columns, for gd of each row, then over the rows, for the weights.
Phase 1 gives each program whole rows and leaves gd and gs [N, r] in a workspace; a grid barrier; phase 2 gives each
program a slab of columns of one weight set, over all rows in order. Nothing is added atomically, so the gradients
are the same bits at every run and for every grid.
"""

import triton
import triton.language as tl

from reft_kernels.triton.common import activation_slope, grid_barrier, keep_mask, locate_rows


@triton.jit(do_not_specialize=["N", "P", "S", "G"])
def edit_backward_kernel(
    grad_ptr,  # [B, S, d]; where NEED_H it is dh, a copy of the gradient, and its edited rows are overwritten
    x_ptr,  # h before the edit: [B, S, d], or its slots' rows [N, d] if X_IS_ROWS
    delta_ptr,  # [N, r]
    s_ptr,  # [N, r], read if f is not linear
    R_ptr,  # [G, r, d]
    W_ptr,  # [G, r, d]
    positions_ptr,  # [B, P]
    group_ptr,  # [B, P]
    scale_ptr,  # [B, P]
    seed_ptr,  # [1]
    gd_ptr,  # [N, r] workspace
    gs_ptr,  # [N, r] workspace, used if f is not linear
    dR_ptr,  # [G, r, d]
    dW_ptr,  # [G, r, d]
    db_ptr,  # [G, r]
    dc_ptr,  # [G, r]
    barrier_ptr,  # [1]
    N, P, S, G, d,
    stride_grad_b, stride_grad_s, stride_x_b, stride_x_s,
    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, stride_scale_b, stride_scale_p,
    keep_gain,
    r: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLAB_R: tl.constexpr,  # r padded for tl.dot
    SLAB_D: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SUBTRACT: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP_THRESHOLD: tl.constexpr,
    X_IS_ROWS: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_R: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_B: tl.constexpr,
    NEED_C: tl.constexpr,
    PHASE: tl.constexpr,  # 0: both; 1 or 2: that one alone, for the interpreter, which runs programs in turn
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The gradients of the edit; the formulas stand at the top of this file."""
    if DROPOUT:
        seed = tl.load(seed_ptr)

    if PHASE != 2:
        o_r = tl.arange(0, BLOCK_R)
        m_r = o_r < r
        for i_row in range(tl.program_id(0), N, tl.num_programs(0)):
            i_n = tl.full((), 0, tl.int64) + i_row
            i_b, i_p, i_s, i_g, edited = locate_rows(
                i_n, positions_ptr, group_ptr, N, P, S, G,
                stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, HAS_POSITIONS, HAS_GROUP,
            )  # fmt: skip
            i_g = tl.where(edited, i_g, 0)
            i_s = tl.where(edited, i_s, 0)
            grad_row = grad_ptr + i_b * stride_grad_b + i_s * stride_grad_s
            weights = i_g * r * d + o_r[:, None].to(tl.int64) * d
            b_gd = tl.zeros([BLOCK_R], dtype=ACCUMULATOR)
            for i_d in range(0, tl.where(edited, d, 0), BLOCK_D):
                o_d = i_d + tl.arange(0, BLOCK_D)
                m_d = o_d < d
                b_g = tl.load(grad_row + o_d, mask=m_d, other=0).to(ACCUMULATOR)
                if DROPOUT:
                    o_block = i_d // 4 + tl.arange(0, BLOCK_D // 4)
                    m_keep = keep_mask(seed, i_b * S + i_s, o_block, KEEP_THRESHOLD)
                    b_g = tl.where(m_keep, b_g * keep_gain, 0)
                b_R = tl.load(R_ptr + weights + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0)
                b_gd += tl.sum(b_R.to(ACCUMULATOR) * b_g[None, :], axis=1)
            if HAS_SCALE:
                b_gd *= tl.load(scale_ptr + i_b * stride_scale_b + i_p * stride_scale_p).to(ACCUMULATOR)
            b_gd = tl.where(edited, b_gd, 0)
            tl.store(gd_ptr + i_n * r + o_r, b_gd, mask=m_r)
            if ACTIVATION != "linear":
                b_s = tl.load(s_ptr + i_n * r + o_r, mask=m_r, other=0)
                b_gs = tl.where(edited, b_gd * activation_slope(b_s, ACTIVATION), 0)
                tl.store(gs_ptr + i_n * r + o_r, b_gs, mask=m_r)

    if PHASE == 0:
        grid_barrier(barrier_ptr)

    if PHASE != 1:
        n_slabs = tl.cdiv(d, SLAB_D)
        o_r = tl.arange(0, SLAB_R)
        m_r = o_r < r
        for i_item in range(tl.program_id(0), G * n_slabs, tl.num_programs(0)):
            i_own = tl.full((), 0, tl.int64) + i_item // n_slabs
            i_slab = i_item % n_slabs
            o_d = i_slab * SLAB_D + tl.arange(0, SLAB_D)
            m_d = o_d < d
            m_rd = m_r[:, None] & m_d[None, :]
            o_rd = i_own * r * d + o_r[:, None].to(tl.int64) * d + o_d[None, :]
            if NEED_H:
                # [SLAB_R, SLAB_D], for dh
                b_A = tl.zeros([SLAB_R, SLAB_D], dtype=ACCUMULATOR)
                if HAS_W:
                    b_A += tl.load(W_ptr + o_rd, mask=m_rd, other=0).to(ACCUMULATOR)
                if SUBTRACT:
                    b_R = tl.load(R_ptr + o_rd, mask=m_rd, other=0).to(ACCUMULATOR)
                    if ACTIVATION == "linear":
                        b_A -= b_R
            b_up = tl.zeros([SLAB_R, SLAB_D], dtype=ACCUMULATOR)  # sum (scale delta) g^T
            b_down = tl.zeros([SLAB_R, SLAB_D], dtype=ACCUMULATOR)  # sum gs h^T
            b_cross = tl.zeros([SLAB_R, SLAB_D], dtype=ACCUMULATOR)  # sum gd h^T
            b_sum_gs = tl.zeros([SLAB_R], dtype=ACCUMULATOR)
            b_sum_gd = tl.zeros([SLAB_R], dtype=ACCUMULATOR)

            for i_tile in range(0, N, BLOCK_N):
                o_n = (i_tile + tl.arange(0, BLOCK_N)).to(tl.int64)
                i_b, i_p, i_s, i_g, m_n = locate_rows(
                    o_n, positions_ptr, group_ptr, N, P, S, G,
                    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p,
                    HAS_POSITIONS, HAS_GROUP,
                )  # fmt: skip
                m_n = m_n & (i_g == i_own)
                m_nr = m_n[:, None] & m_r[None, :]
                m_nd = m_n[:, None] & m_d[None, :]
                o_nr = o_n[:, None] * r + o_r[None, :]
                b_gd = tl.load(gd_ptr + o_nr, mask=m_nr, other=0)  # [BLOCK_N, SLAB_R]
                b_gs = b_gd
                if ACTIVATION != "linear":
                    b_gs = tl.load(gs_ptr + o_nr, mask=m_nr, other=0)
                b_sum_gs += tl.sum(b_gs, axis=0)
                b_sum_gd += tl.sum(b_gd, axis=0)

                if NEED_H or NEED_R:
                    o_grad = (i_b * stride_grad_b + i_s * stride_grad_s)[:, None] + o_d[None, :]
                    b_g = tl.load(grad_ptr + o_grad, mask=m_nd, other=0).to(ACCUMULATOR)  # [BLOCK_N, SLAB_D]
                    if DROPOUT:
                        o_block = i_slab * (SLAB_D // 4) + tl.arange(0, SLAB_D // 4)
                        m_keep = keep_mask(seed, (i_b * S + i_s)[:, None], o_block[None, :], KEEP_THRESHOLD)
                        b_g = tl.where(m_keep, b_g * keep_gain, 0)
                if NEED_R:
                    b_delta = tl.load(delta_ptr + o_nr, mask=m_nr, other=0)
                    if HAS_SCALE:
                        o_scale = i_b * stride_scale_b + i_p * stride_scale_p
                        b_delta *= tl.load(scale_ptr + o_scale, mask=m_n, other=0).to(ACCUMULATOR)[:, None]
                    b_up += tl.dot(tl.trans(b_delta), b_g, input_precision="ieee", out_dtype=ACCUMULATOR)
                if NEED_W or (NEED_R and SUBTRACT):
                    if X_IS_ROWS:
                        o_x = o_n[:, None] * d + o_d[None, :]
                    else:
                        o_x = (i_b * stride_x_b + i_s * stride_x_s)[:, None] + o_d[None, :]
                    b_x = tl.load(x_ptr + o_x, mask=m_nd, other=0).to(ACCUMULATOR)
                    b_down += tl.dot(tl.trans(b_gs), b_x, input_precision="ieee", out_dtype=ACCUMULATOR)
                    if ACTIVATION != "linear" and NEED_R and SUBTRACT:
                        b_cross += tl.dot(tl.trans(b_gd), b_x, input_precision="ieee", out_dtype=ACCUMULATOR)
                if NEED_H:
                    b_dh = b_g + tl.dot(b_gs, b_A, input_precision="ieee", out_dtype=ACCUMULATOR)
                    if SUBTRACT and ACTIVATION != "linear":
                        b_dh -= tl.dot(b_gd, b_R, input_precision="ieee", out_dtype=ACCUMULATOR)
                    tl.store(grad_ptr + o_grad, b_dh.to(grad_ptr.dtype.element_ty), mask=m_nd)

            if NEED_R:
                b_dR = b_up
                if SUBTRACT:
                    if ACTIVATION == "linear":
                        b_dR -= b_down
                    else:
                        b_dR -= b_cross
                tl.store(dR_ptr + o_rd, b_dR.to(dR_ptr.dtype.element_ty), mask=m_rd)
            if NEED_W:
                tl.store(dW_ptr + o_rd, b_down.to(dW_ptr.dtype.element_ty), mask=m_rd)
            if i_slab == 0:
                if NEED_B:
                    tl.store(db_ptr + i_own * r + o_r, b_sum_gs.to(db_ptr.dtype.element_ty), mask=m_r)
                if NEED_C:
                    tl.store(dc_ptr + i_own * r + o_r, (-b_sum_gd).to(dc_ptr.dtype.element_ty), mask=m_r)

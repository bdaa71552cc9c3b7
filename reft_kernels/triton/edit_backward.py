"""The backward edit: one cooperative launch.

    gd = scale * R g      gs = gd * f'(s)
    dh = g + W^T gs - gamma R^T gd
    dW = sum gs h^T       db = sum gs       dR = sum (scale delta) g^T - gamma sum gd h^T       dc = -gamma sum gd

Two reductions depend on one another: over the columns, for gd of each row, then over the rows, for the weights.
Phase 1 gives each program whole rows and leaves gd and gs [N, r] in a workspace; a grid barrier; phase 2 gives each
program a slab of columns of one weight set, over all rows in order. Nothing is added atomically, so the gradients
are the same bits at every run and for every grid.

With many rows both phases go chunk by chunk, so that phase 2 finds in the cache what phase 1 has read: a program does
its part of phase 1 of the next chunk before phase 2 of this one, and seldom waits at the barrier between them.

Where the rows before the edit were not kept, they are h = y - scale R^T delta, rounded to the type of h: as long as
the edit has not changed a value's exponent, that undoes the rounding of y.
"""

import triton
import triton.language as tl

from reft_kernels.triton.common import (
    NO_GROUP,
    activation_slope,
    arrive,
    dot_down,
    dot_outer,
    dot_up,
    keep_mask,
    locate_rows,
    next_group,
    round_to,
    wait,
)


@triton.jit
def project_rows(
    start, end, grad_ptr, s_ptr, R_ptr, positions_ptr, group_ptr, scale_ptr, seed_ptr, gd_ptr, gs_ptr,
    P, S, G, stride_grad_b, stride_grad_s,
    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, stride_scale_b, stride_scale_p,
    keep_gain,
    d: tl.constexpr, r: tl.constexpr, METHOD: tl.constexpr, ROWS_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, HAS_GROUP: tl.constexpr, HAS_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr, KEEP_THRESHOLD: tl.constexpr, ACCUMULATOR: tl.constexpr, FLOAT32_DOT: tl.constexpr,
):  # fmt: skip
    """Phase 1: gd and gs of the slots start <= n < end that fall to this program, ROWS_N at a time."""
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < r
    for i_tile in range(start + tl.program_id(0) * ROWS_N, end, tl.num_programs(0) * ROWS_N):
        o_n = i_tile + tl.arange(0, ROWS_N)
        i_b, i_p, i_s, i_g, m_edited = locate_rows(
            o_n, end, positions_ptr, group_ptr, P, S, G,
            stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, HAS_POSITIONS, HAS_GROUP,
        )  # fmt: skip
        grad_rows = (grad_ptr + i_b * stride_grad_b + i_s * stride_grad_s)[:, None]
        o_u = o_n.to(tl.int64) * r
        b_gain = tl.full([ROWS_N], 1, dtype=ACCUMULATOR)
        if HAS_SCALE:
            o_scale = i_b * stride_scale_b + i_p * stride_scale_p
            b_gain = tl.load(scale_ptr + o_scale, mask=m_edited, other=0).to(ACCUMULATOR)
        if DROPOUT:
            b_gain *= keep_gain
            seed = tl.load(seed_ptr)
        i_own = next_group(i_g, -1)
        if METHOD == "rows":
            o_d = tl.arange(0, BLOCK_D)[None, :]
            m_d = o_d < d
            b_g = tl.load(grad_rows + o_d, mask=m_edited[:, None] & m_d, other=0).to(ACCUMULATOR)
            if DROPOUT:
                o_block = tl.arange(0, BLOCK_D // 4)[None, :]
                b_g = tl.where(keep_mask(seed, (i_b * S + i_s)[:, None], o_block, KEEP_THRESHOLD), b_g, 0)
            while i_own < NO_GROUP:
                m_own = i_g == i_own
                o_weights = i_own.to(tl.int64) * (r * d)
                for k in tl.range(0, r, num_stages=STAGES):
                    b_R = tl.load(R_ptr + o_weights + k * d + o_d, mask=m_d, other=0).to(ACCUMULATOR)  # [1, BLOCK_D]
                    b_gd = tl.sum(b_g * b_R, axis=1) * b_gain
                    tl.store(gd_ptr + o_u + k, b_gd, mask=m_own)
                    if ACTIVATION != "linear":
                        b_slope = activation_slope(tl.load(s_ptr + o_u + k, mask=m_own, other=0), ACTIVATION)
                        tl.store(gs_ptr + o_u + k, b_gd * b_slope, mask=m_own)
                i_own = next_group(i_g, i_own)
        if METHOD == "tiles":
            while i_own < NO_GROUP:
                m_own = i_g == i_own
                o_weights = i_own.to(tl.int64) * (r * d)
                b_gd = tl.zeros([ROWS_N, BLOCK_R], dtype=ACCUMULATOR)
                for i_d in tl.range(0, d, BLOCK_D, num_stages=STAGES):
                    o_d = i_d + tl.arange(0, BLOCK_D)
                    m_d = o_d < d
                    b_g = tl.load(grad_rows + o_d[None, :], mask=m_own[:, None] & m_d[None, :], other=0)
                    if DROPOUT:
                        o_block = i_d // 4 + tl.arange(0, BLOCK_D // 4)
                        m_keep = keep_mask(seed, (i_b * S + i_s)[:, None], o_block[None, :], KEEP_THRESHOLD)
                        b_g = tl.where(m_keep, b_g, 0)
                    o_rd = o_r[:, None] * d + o_d[None, :]
                    b_R = tl.load(R_ptr + o_weights + o_rd, mask=m_r[:, None] & m_d[None, :], other=0)
                    b_gd = dot_down(b_g, b_R, b_gd, FLOAT32_DOT)
                b_gd *= b_gain[:, None]
                o_nr = o_u[:, None] + o_r[None, :]
                m_nr = m_own[:, None] & m_r[None, :]
                tl.store(gd_ptr + o_nr, b_gd, mask=m_nr)
                if ACTIVATION != "linear":
                    b_slope = activation_slope(tl.load(s_ptr + o_nr, mask=m_nr, other=0), ACTIVATION)
                    tl.store(gs_ptr + o_nr, b_gd * b_slope, mask=m_nr)
                i_own = next_group(i_g, i_own)


@triton.jit(
    do_not_specialize=[
        "N", "P", "S", "G", "chunk",
        "stride_positions_b", "stride_positions_p", "stride_group_b", "stride_group_p",
        "stride_scale_b", "stride_scale_p",
    ],
    do_not_specialize_on_alignment=["positions_ptr", "group_ptr", "scale_ptr", "seed_ptr"],
)  # fmt: skip
def edit_backward_kernel(
    grad_ptr,  # [B, S, d]; where NEED_H its edited rows become those of dh
    x_ptr,  # h before the edit, [B, S, d]; its slots' rows [N, d] if X_IS_ROWS; y, after the edit, if REBUILD
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
    N, P, S, G,
    chunk,  # slots a chunk; at least N unless CHUNKED
    stride_grad_b, stride_grad_s, stride_x_b, stride_x_s,
    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, stride_scale_b, stride_scale_p,
    keep_gain,
    d: tl.constexpr,
    r: tl.constexpr,
    METHOD: tl.constexpr,  # of phase 1: rows or tiles, as in the forward
    ROWS_N: tl.constexpr,  # slots a program and step of phase 1
    BLOCK_D: tl.constexpr,  # columns a step of phase 1; all of them but with "tiles"
    BLOCK_N: tl.constexpr,  # slots a step of phase 2
    SLAB_D: tl.constexpr,  # columns a program of phase 2
    BLOCK_R: tl.constexpr,  # r padded for tl.dot
    STAGES: tl.constexpr,  # steps of phase 1 in flight
    SLAB_STAGES: tl.constexpr,  # steps of phase 2 in flight
    CHUNKED: tl.constexpr,  # more than one chunk; every program has at most one slab
    ACTIVATION: tl.constexpr,
    SUBTRACT: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_GROUP: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    KEEP_THRESHOLD: tl.constexpr,
    X_IS_ROWS: tl.constexpr,
    REBUILD: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_R: tl.constexpr,
    NEED_W: tl.constexpr,
    NEED_B: tl.constexpr,
    NEED_C: tl.constexpr,
    ADD_R: tl.constexpr,  # dR is added to what stands there
    ADD_W: tl.constexpr,
    ADD_B: tl.constexpr,
    ADD_C: tl.constexpr,
    PHASE: tl.constexpr,  # 0: both; 1 or 2: that one alone, for the interpreter, which runs programs in turn
    ACCUMULATOR: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,  # how tl.dot multiplies float32
):  # fmt: skip
    """The gradients of the edit; the formulas stand at the top of this file."""
    if PHASE != 2:
        project_rows(
            0, N if PHASE == 1 else tl.minimum(chunk, N),
            grad_ptr, s_ptr, R_ptr, positions_ptr, group_ptr, scale_ptr, seed_ptr, gd_ptr, gs_ptr,
            P, S, G, stride_grad_b, stride_grad_s,
            stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, stride_scale_b, stride_scale_p,
            keep_gain, d, r, METHOD, ROWS_N, BLOCK_D, BLOCK_R, STAGES, ACTIVATION,
            HAS_POSITIONS, HAS_GROUP, HAS_SCALE, DROPOUT, KEEP_THRESHOLD, ACCUMULATOR, FLOAT32_DOT,
        )  # fmt: skip
    if PHASE == 0:
        ticket = arrive(barrier_ptr)

    if PHASE != 1:
        N_SLABS: tl.constexpr = (d + SLAB_D - 1) // SLAB_D
        NEED_X: tl.constexpr = NEED_W or (NEED_R and SUBTRACT)
        NEED_CROSS: tl.constexpr = NEED_R and SUBTRACT and ACTIVATION != "linear"  # sum gd h^T, which is not dW
        HALF: tl.constexpr = grad_ptr.dtype.element_ty == tl.bfloat16 or grad_ptr.dtype.element_ty == tl.float16
        if DROPOUT:
            seed = tl.load(seed_ptr)
        n_items = G * N_SLABS
        o_r = tl.arange(0, BLOCK_R)
        m_r = o_r < r
        # A program without a slab has a turn too: it is needed at the barriers.
        for i_turn in range(tl.program_id(0), tl.maximum(n_items, tl.program_id(0) + 1), tl.num_programs(0)):
            i_item = tl.full((), 0, tl.int32) + i_turn
            i_own = i_item // N_SLABS
            i_slab = i_item % N_SLABS
            o_d = i_slab * SLAB_D + tl.arange(0, SLAB_D)
            m_d = o_d < tl.where(i_item < n_items, d, 0)
            m_rd = m_r[:, None] & m_d[None, :]
            o_weights = i_own.to(tl.int64) * (r * d)
            o_rd = o_r[:, None] * d + o_d[None, :]
            if NEED_H and HAS_W:
                b_A = tl.load(W_ptr + o_weights + o_rd, mask=m_rd, other=0)  # [BLOCK_R, SLAB_D], for dh
            if (NEED_H and SUBTRACT) or (REBUILD and NEED_X):
                b_R = tl.load(R_ptr + o_weights + o_rd, mask=m_rd, other=0)
            if NEED_H and HAS_W and SUBTRACT and ACTIVATION == "linear":
                b_A = b_A.to(ACCUMULATOR) - b_R.to(ACCUMULATOR)
            b_dR = tl.zeros([BLOCK_R, SLAB_D], dtype=ACCUMULATOR)  # without the part that is dW
            b_dW = tl.zeros([BLOCK_R, SLAB_D], dtype=ACCUMULATOR)
            b_sum_gs = tl.zeros([BLOCK_R], dtype=ACCUMULATOR)
            b_sum_gd = tl.zeros([BLOCK_R], dtype=ACCUMULATOR)

            for start in range(0, N, chunk):
                end = tl.minimum(start + chunk, N)
                if PHASE == 0:
                    if i_item == tl.program_id(0):
                        wait(barrier_ptr, ticket)
                        if CHUNKED:
                            if end < N:
                                project_rows(
                                    end, tl.minimum(end + chunk, N),
                                    grad_ptr, s_ptr, R_ptr, positions_ptr, group_ptr, scale_ptr, seed_ptr,
                                    gd_ptr, gs_ptr,
                                    P, S, G, stride_grad_b, stride_grad_s,
                                    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p,
                                    stride_scale_b, stride_scale_p,
                                    keep_gain, d, r, METHOD, ROWS_N, BLOCK_D, BLOCK_R, STAGES, ACTIVATION,
                                    HAS_POSITIONS, HAS_GROUP, HAS_SCALE, DROPOUT, KEEP_THRESHOLD,
                                    ACCUMULATOR, FLOAT32_DOT,
                                )  # fmt: skip
                                ticket = arrive(barrier_ptr)
                for i_tile in tl.range(start, tl.where(i_item < n_items, end, start), BLOCK_N, num_stages=SLAB_STAGES):
                    o_n = i_tile + tl.arange(0, BLOCK_N)
                    i_b, i_p, i_s, i_g, _ = locate_rows(
                        o_n, end, positions_ptr, group_ptr, P, S, G,
                        stride_positions_b, stride_positions_p, stride_group_b, stride_group_p,
                        HAS_POSITIONS, HAS_GROUP,
                    )  # fmt: skip
                    m_n = i_g == i_own
                    m_nr = m_n[:, None] & m_r[None, :]
                    m_nd = m_n[:, None] & m_d[None, :]
                    o_nr = o_n.to(tl.int64)[:, None] * r + o_r[None, :]
                    b_gd = tl.load(gd_ptr + o_nr, mask=m_nr, other=0)  # [BLOCK_N, BLOCK_R]
                    b_gs = b_gd
                    if ACTIVATION != "linear":
                        b_gs = tl.load(gs_ptr + o_nr, mask=m_nr, other=0)
                    b_sum_gs += tl.sum(b_gs, axis=0)
                    b_sum_gd += tl.sum(b_gd, axis=0)
                    if NEED_R or (REBUILD and NEED_X):
                        b_delta = tl.load(delta_ptr + o_nr, mask=m_nr, other=0)
                        if HAS_SCALE:
                            o_scale = i_b * stride_scale_b + i_p * stride_scale_p
                            b_delta *= tl.load(scale_ptr + o_scale, mask=m_n, other=0).to(ACCUMULATOR)[:, None]
                    if NEED_H or NEED_R:
                        grad_rows = (grad_ptr + i_b * stride_grad_b + i_s * stride_grad_s)[:, None]
                        b_g = tl.load(grad_rows + o_d[None, :], mask=m_nd, other=0)  # [BLOCK_N, SLAB_D]
                        if DROPOUT:
                            o_block = i_slab * (SLAB_D // 4) + tl.arange(0, SLAB_D // 4)
                            m_keep = keep_mask(seed, (i_b * S + i_s)[:, None], o_block[None, :], KEEP_THRESHOLD)
                            b_g = tl.where(m_keep, b_g, 0)
                    if NEED_R:
                        b_u = b_delta
                        if DROPOUT:
                            b_u *= keep_gain
                        b_dR = dot_outer(b_u, b_g, b_dR, FLOAT32_DOT)
                    if NEED_X:
                        if X_IS_ROWS:
                            x_rows = (x_ptr + o_n.to(tl.int64) * d)[:, None]
                        else:
                            x_rows = (x_ptr + i_b * stride_x_b + i_s * stride_x_s)[:, None]
                        b_x = tl.load(x_rows + o_d[None, :], mask=m_nd, other=0)
                        if REBUILD:
                            b_wide = dot_up(-b_delta, b_R, b_x.to(ACCUMULATOR), HALF, FLOAT32_DOT)
                            b_x = round_to(b_wide, x_ptr.dtype.element_ty)
                        if NEED_W or not NEED_CROSS:
                            b_dW = dot_outer(b_gs, b_x, b_dW, FLOAT32_DOT)
                        if NEED_CROSS:
                            b_dR = dot_outer(-b_gd, b_x, b_dR, FLOAT32_DOT)
                    if NEED_H:
                        b_dh = b_g.to(ACCUMULATOR)
                        if DROPOUT:
                            b_dh *= keep_gain
                        if HAS_W:
                            b_dh = dot_up(b_gs, b_A, b_dh, HALF, FLOAT32_DOT)
                        if SUBTRACT and not (HAS_W and ACTIVATION == "linear"):
                            b_dh = dot_up(-b_gd, b_R, b_dh, HALF, FLOAT32_DOT)
                        tl.store(grad_rows + o_d[None, :], round_to(b_dh, grad_ptr.dtype.element_ty), mask=m_nd)

            if NEED_R:
                if SUBTRACT and not NEED_CROSS:
                    b_dR -= b_dW
                if ADD_R:
                    b_dR += tl.load(dR_ptr + o_weights + o_rd, mask=m_rd, other=0).to(ACCUMULATOR)
                tl.store(dR_ptr + o_weights + o_rd, round_to(b_dR, dR_ptr.dtype.element_ty), mask=m_rd)
            if NEED_W:
                if ADD_W:
                    b_dW += tl.load(dW_ptr + o_weights + o_rd, mask=m_rd, other=0).to(ACCUMULATOR)
                tl.store(dW_ptr + o_weights + o_rd, round_to(b_dW, dW_ptr.dtype.element_ty), mask=m_rd)
            if i_slab == 0:
                m_b = o_r < tl.where(i_item < n_items, r, 0)
                if NEED_B:
                    if ADD_B:
                        b_sum_gs += tl.load(db_ptr + i_own * r + o_r, mask=m_b, other=0).to(ACCUMULATOR)
                    tl.store(db_ptr + i_own * r + o_r, round_to(b_sum_gs, db_ptr.dtype.element_ty), mask=m_b)
                if NEED_C:
                    b_dc = -b_sum_gd
                    if ADD_C:
                        b_dc += tl.load(dc_ptr + i_own * r + o_r, mask=m_b, other=0).to(ACCUMULATOR)
                    tl.store(dc_ptr + i_own * r + o_r, round_to(b_dc, dc_ptr.dtype.element_ty), mask=m_b)

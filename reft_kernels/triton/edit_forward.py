"""The forward edit: one launch.

    y = D_p( h + scale * R^T delta ),   delta = f(W h + b) - gamma (R h + c)

Three methods, each for its own sizes. With a linear f the products are those of A = W - gamma R, formed on the fly.

``rows``     A program holds the rows of BLOCK_N slots in registers and walks through those of R and W, which are
             fetched ahead of their use: h is read once. For small r, and for few slots.
``weights``  A program holds one whole weight set in registers and walks through slots, whose rows are fetched ahead
             of their use: h and the weights are read once. For small r d and many slots.
``tiles``    A program walks twice through the columns of BLOCK_N slots' rows, for W h and R h and then, backwards,
             for R^T delta: what was read last is still in cache. Tensor cores multiply. For everything else.
"""

import triton
import triton.language as tl

from reft_kernels.triton.common import (
    NO_GROUP,
    activate,
    dot_down,
    dot_up,
    keep_mask,
    locate_rows,
    next_group,
    round_to,
)


@triton.jit(
    do_not_specialize=[
        "N", "P", "S", "G",
        "stride_positions_b", "stride_positions_p", "stride_group_b", "stride_group_p",
        "stride_scale_b", "stride_scale_p",
    ],
    do_not_specialize_on_alignment=["positions_ptr", "group_ptr", "scale_ptr", "seed_ptr"],
)  # fmt: skip
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
    N, P, S, G,
    stride_h_b, stride_h_s, stride_y_b, stride_y_s,
    stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, stride_scale_b, stride_scale_p,
    keep_gain,  # 1 / (1 - dropout)
    d: tl.constexpr,
    r: tl.constexpr,
    METHOD: tl.constexpr,
    BLOCK_N: tl.constexpr,  # slots a program and step; 1 with "weights"
    BLOCK_D: tl.constexpr,  # columns a step; all of them but with "tiles"
    BLOCK_R: tl.constexpr,  # r padded: for tl.dot with "tiles"
    STAGES: tl.constexpr,  # what is fetched ahead: so many rows, or tiles of columns, are in flight
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
    FLOAT32_DOT: tl.constexpr,  # how tl.dot multiplies float32
):  # fmt: skip
    """The edit; the formula and the methods stand at the top of this file."""
    if DROPOUT:
        seed = tl.load(seed_ptr)
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < r

    if METHOD == "weights":
        o_d = tl.arange(0, BLOCK_D)
        m_d = o_d < d
        o_rd = o_r[:, None] * d + o_d[None, :]
        m_rd = m_r[:, None] & m_d[None, :]
        b_R = tl.load(R_ptr + o_rd, mask=m_rd, other=0).to(ACCUMULATOR)  # [BLOCK_R, BLOCK_D]
        if HAS_W:
            b_W = tl.load(W_ptr + o_rd, mask=m_rd, other=0).to(ACCUMULATOR)
            if SUBTRACT and ACTIVATION == "linear":
                b_W -= b_R
        b_b = tl.zeros([BLOCK_R], dtype=ACCUMULATOR)
        b_c = b_b
        if HAS_B:
            b_b = tl.load(b_ptr + o_r, mask=m_r, other=0).to(ACCUMULATOR)
        if HAS_C:
            b_c = tl.load(c_ptr + o_r, mask=m_r, other=0).to(ACCUMULATOR)
        for i_row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
            i_n = tl.full((), 0, tl.int32) + i_row
            i_b, i_p, i_s, i_g, edited = locate_rows(
                i_n, N, positions_ptr, group_ptr, P, S, G,
                stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, HAS_POSITIONS, HAS_GROUP,
            )  # fmt: skip
            m_h = o_d < tl.where(edited, d, 0)
            b_before = tl.load(h_ptr + i_b * stride_h_b + i_s * stride_h_s + o_d, mask=m_h, other=0)
            b_h = b_before.to(ACCUMULATOR)
            b_s, b_q = b_b, b_c
            if HAS_W:
                b_s += tl.sum(b_W * b_h[None, :], axis=1)
            if SUBTRACT and not (HAS_W and ACTIVATION == "linear"):
                b_q += tl.sum(b_R * b_h[None, :], axis=1)
            b_delta = activate(b_s, ACTIVATION) - b_q
            o_u = i_n.to(tl.int64) * r + o_r
            tl.store(delta_ptr + o_u, tl.where(edited, b_delta, 0), mask=m_r)
            if ACTIVATION != "linear":
                tl.store(s_ptr + o_u, tl.where(edited, b_s, 0), mask=m_r)
            if HAS_SCALE:
                o_scale = i_b * stride_scale_b + i_p * stride_scale_p
                b_delta *= tl.load(scale_ptr + o_scale, mask=edited, other=0).to(ACCUMULATOR)
            b_y = b_h + tl.sum(b_delta[:, None] * b_R, axis=0)
            if DROPOUT:
                m_keep = keep_mask(seed, i_b * S + i_s, tl.arange(0, BLOCK_D // 4), KEEP_THRESHOLD)
                b_y = tl.where(m_keep, b_y * keep_gain, 0)
            if SAVE_ROWS:
                tl.store(before_ptr + i_n.to(tl.int64) * d + o_d, b_before, mask=m_h)
            tl.store(y_ptr + i_b * stride_y_b + i_s * stride_y_s + o_d, round_to(b_y, b_before.dtype), mask=m_h)
        return

    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    i_b, i_p, i_s, i_g, m_edited = locate_rows(
        o_n, N, positions_ptr, group_ptr, P, S, G,
        stride_positions_b, stride_positions_p, stride_group_b, stride_group_p, HAS_POSITIONS, HAS_GROUP,
    )  # fmt: skip
    h_rows = (h_ptr + i_b * stride_h_b + i_s * stride_h_s)[:, None]
    y_rows = (y_ptr + i_b * stride_y_b + i_s * stride_y_s)[:, None]
    o_u = o_n.to(tl.int64) * r
    b_scale = tl.full([BLOCK_N], 1, dtype=ACCUMULATOR)
    if HAS_SCALE:
        o_scale = i_b * stride_scale_b + i_p * stride_scale_p
        b_scale = tl.load(scale_ptr + o_scale, mask=m_edited, other=0).to(ACCUMULATOR)
    i_own = next_group(i_g, -1)

    if HAS_POSITIONS or HAS_GROUP:
        m_others = (m_n & (i_g < 0))[:, None] & m_r[None, :]
        b_zero = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACCUMULATOR)
        tl.store(delta_ptr + o_u[:, None] + o_r[None, :], b_zero, mask=m_others)
        if ACTIVATION != "linear":
            tl.store(s_ptr + o_u[:, None] + o_r[None, :], b_zero, mask=m_others)

    if METHOD == "rows":
        o_d = tl.arange(0, BLOCK_D)[None, :]
        m_d = o_d < d
        m_h = m_d & (m_n if COPY_OTHERS else m_edited)[:, None]
        b_before = tl.load(h_rows + o_d, mask=m_h, other=0)  # [BLOCK_N, BLOCK_D]
        b_h = b_before.to(ACCUMULATOR)
        b_y = b_h
        while i_own < NO_GROUP:  # one turn, unless the slots' groups differ
            m_own = i_g == i_own
            o_weights = i_own.to(tl.int64) * (r * d)
            for k in tl.range(0, r, num_stages=STAGES):
                b_R = tl.load(R_ptr + o_weights + k * d + o_d, mask=m_d, other=0).to(ACCUMULATOR)  # [1, BLOCK_D]
                b_s = tl.zeros([BLOCK_N], dtype=ACCUMULATOR)
                b_q = b_s
                if HAS_W:
                    b_W = tl.load(W_ptr + o_weights + k * d + o_d, mask=m_d, other=0).to(ACCUMULATOR)
                    if SUBTRACT and ACTIVATION == "linear":
                        b_W -= b_R
                    b_s = tl.sum(b_h * b_W, axis=1)
                if SUBTRACT and not (HAS_W and ACTIVATION == "linear"):
                    b_q = tl.sum(b_h * b_R, axis=1)
                if HAS_B:
                    b_s += tl.load(b_ptr + i_own * r + k).to(ACCUMULATOR)
                if HAS_C:
                    b_q += tl.load(c_ptr + i_own * r + k).to(ACCUMULATOR)
                b_delta = activate(b_s, ACTIVATION) - b_q
                tl.store(delta_ptr + o_u + k, b_delta, mask=m_own)
                if ACTIVATION != "linear":
                    tl.store(s_ptr + o_u + k, b_s, mask=m_own)
                b_y = tl.where(m_own[:, None], b_y + (b_delta * b_scale)[:, None] * b_R, b_y)
            i_own = next_group(i_g, i_own)
        if DROPOUT:
            o_block = tl.arange(0, BLOCK_D // 4)[None, :]
            m_keep = keep_mask(seed, (i_b * S + i_s)[:, None], o_block, KEEP_THRESHOLD)
            b_y = tl.where(m_keep, b_y * keep_gain, 0)
        if SAVE_ROWS:
            tl.store((before_ptr + o_n.to(tl.int64) * d)[:, None] + o_d, b_before, mask=m_h)
        b_after = round_to(b_y, b_before.dtype)
        if COPY_OTHERS:
            b_after = tl.where(m_edited[:, None], b_after, b_before)
        tl.store(y_rows + o_d, b_after, mask=m_h)

    if METHOD == "tiles":
        N_TILES: tl.constexpr = (d + BLOCK_D - 1) // BLOCK_D
        HALF: tl.constexpr = h_ptr.dtype.element_ty == tl.bfloat16 or h_ptr.dtype.element_ty == tl.float16
        while i_own < NO_GROUP:  # one turn, unless the slots' groups differ
            m_own = i_g == i_own
            o_weights = i_own.to(tl.int64) * (r * d)
            b_s = tl.zeros([BLOCK_N, BLOCK_R], dtype=ACCUMULATOR)
            b_q = b_s
            if HAS_W or SUBTRACT:
                for i_tile in tl.range(0, N_TILES, num_stages=STAGES):
                    o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)
                    m_d = o_d < d
                    b_h = tl.load(h_rows + o_d[None, :], mask=m_own[:, None] & m_d[None, :], other=0)
                    o_rd = o_r[:, None] * d + o_d[None, :]
                    m_rd = m_r[:, None] & m_d[None, :]
                    if HAS_W:
                        b_W = tl.load(W_ptr + o_weights + o_rd, mask=m_rd, other=0)
                    if SUBTRACT:
                        b_R = tl.load(R_ptr + o_weights + o_rd, mask=m_rd, other=0)
                    if HAS_W and SUBTRACT and ACTIVATION == "linear":
                        b_A = b_W.to(ACCUMULATOR) - b_R.to(ACCUMULATOR)
                        b_s = dot_down(b_h, b_A, b_s, FLOAT32_DOT)
                    else:
                        if HAS_W:
                            b_s = dot_down(b_h, b_W, b_s, FLOAT32_DOT)
                        if SUBTRACT:
                            b_q = dot_down(b_h, b_R, b_q, FLOAT32_DOT)
            if HAS_B:
                b_s += tl.load(b_ptr + i_own * r + o_r, mask=m_r, other=0).to(ACCUMULATOR)[None, :]
            if HAS_C:
                b_q += tl.load(c_ptr + i_own * r + o_r, mask=m_r, other=0).to(ACCUMULATOR)[None, :]
            b_delta = activate(b_s, ACTIVATION) - b_q
            m_u = m_own[:, None] & m_r[None, :]
            tl.store(delta_ptr + o_u[:, None] + o_r[None, :], b_delta, mask=m_u)
            if ACTIVATION != "linear":
                tl.store(s_ptr + o_u[:, None] + o_r[None, :], b_s, mask=m_u)
            b_delta = tl.where(m_u, b_delta * b_scale[:, None], 0)

            for i_back in tl.range(0, N_TILES, num_stages=STAGES):
                i_tile = N_TILES - 1 - i_back
                o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)
                m_d = o_d < d
                m_h = m_own[:, None] & m_d[None, :]
                b_before = tl.load(h_rows + o_d[None, :], mask=m_h, other=0)
                o_rd = o_r[:, None] * d + o_d[None, :]
                b_R = tl.load(R_ptr + o_weights + o_rd, mask=m_r[:, None] & m_d[None, :], other=0)
                b_y = dot_up(b_delta, b_R, b_before.to(ACCUMULATOR), HALF, FLOAT32_DOT)
                if DROPOUT:
                    o_block = i_tile * (BLOCK_D // 4) + tl.arange(0, BLOCK_D // 4)
                    m_keep = keep_mask(seed, (i_b * S + i_s)[:, None], o_block[None, :], KEEP_THRESHOLD)
                    b_y = tl.where(m_keep, b_y * keep_gain, 0)
                if SAVE_ROWS:
                    before_rows = (before_ptr + o_n.to(tl.int64) * d)[:, None]
                    tl.store(before_rows + o_d[None, :], b_before, mask=m_h)
                tl.store(y_rows + o_d[None, :], round_to(b_y, b_before.dtype), mask=m_h)
            i_own = next_group(i_g, i_own)
        if COPY_OTHERS:
            for i_tile in range(N_TILES):
                o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)
                m_h = (m_n & (i_g < 0))[:, None] & (o_d < d)[None, :]
                tl.store(y_rows + o_d[None, :], tl.load(h_rows + o_d[None, :], mask=m_h, other=0), mask=m_h)

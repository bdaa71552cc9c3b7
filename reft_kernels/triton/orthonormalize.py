"""Householder parametrisations of many matrices R [r, d], and their backward: one cooperative launch each.

    R^T = S E D - S V (C D) - B K        C = T V_top^T        K = T_B (B_top^T S D - M C D)

T^-1 is the strict upper part of V^T V plus half its diagonal, T_B^-1 that of B^T B, and M = B^T S V. Backward, with
G = dL/dR^T [d, r]:

    L = T_B^T B^T G      dC = -(V^T S G - M^T L) D      N = -T^T (dC V_top) T^T      W = upper part of N, mirrored
    dV = S (B L - G) D C^T + V W + (dC^T T on top)      dX = dV below its diagonal

Three phases with two grid barriers: each slab's part of the sums over d; the small matrices, by one program for each
R; each slab of the result. Source of the compact form: Schreiber and Van Loan, 1989.
"""

import triton
import triton.language as tl

from reft_kernels.triton.matrices import gram, length, meet, owner, places, pointer, product, sum_into, times, wide

# Rows of the table.
X_POINTER = tl.constexpr(0)
REFLECTORS_POINTER = tl.constexpr(1)
SIGNS_POINTER = tl.constexpr(2)
D = tl.constexpr(3)
R = tl.constexpr(4)
FIRST_SLAB = tl.constexpr(5)
OUTPUT_OFFSET = tl.constexpr(6)
FACTORS_OFFSET = tl.constexpr(7)

# Squares of scratch memory, for each matrix.
FORWARD_SCRATCH = tl.constexpr(7)
BACKWARD_SCRATCH = tl.constexpr(10)


@triton.jit
def slab_of(
    table_ptr, i_item, n, SLAB_D: tl.constexpr, BLOCK_R: tl.constexpr, FULL: tl.constexpr, ALIGNED: tl.constexpr
):
    """The item's matrix, its d and r, and where its slab begins and ends."""
    i = owner(table_ptr + FIRST_SLAB * n, i_item, n)
    d = length(table_ptr + D * n + i, ALIGNED)
    r = BLOCK_R if FULL else tl.load(table_ptr + R * n + i).to(tl.int32)
    first = tl.load(table_ptr + FIRST_SLAB * n + i).to(tl.int32)
    start = (i_item - first) * SLAB_D
    return i, d, r, start, tl.minimum(start + SLAB_D, d)


@triton.jit
def load_tile(
    table_ptr, i, n, o_d, d, r, dtype: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Rows o_d of a matrix: X, V and B [BLOCK_D, BLOCK_R], and S [BLOCK_D, 1]."""
    o_r = tl.arange(0, BLOCK_R)
    m_dr = (o_d < d)[:, None] & (o_r < r)[None, :]
    o_dr = o_d[:, None] * r + o_r[None, :]
    X_ptr = pointer(table_ptr + X_POINTER * n + i, dtype, ALIGNED)
    B_ptr = pointer(table_ptr + REFLECTORS_POINTER * n + i, dtype, ALIGNED)
    signs_ptr = pointer(table_ptr + SIGNS_POINTER * n + i, dtype, False)
    b_X = tl.load(X_ptr + o_dr, mask=m_dr, other=0)
    b_B = tl.load(B_ptr + o_dr, mask=m_dr, other=0)
    b_S = tl.load(signs_ptr + o_d, mask=o_d < r, other=1)[:, None]
    return b_X, reflectors_of(b_X, o_d, o_r, r), b_B, b_S


@triton.jit
def reflectors_of(b_X, o_d, o_r, r):
    """V: what is below the diagonal of X, and ones on it."""
    b_unit = ((o_d[:, None] == o_r[None, :]) & (o_r < r)[None, :]).to(b_X.dtype)
    return tl.where(o_d[:, None] > o_r[None, :], b_X, b_unit)


@triton.jit
def load_top(table_ptr, i, n, r, dtype: tl.constexpr, BLOCK_R: tl.constexpr):
    """V_top and B_top^T S in float64 [BLOCK_R, BLOCK_R], and D [BLOCK_R]."""
    o_r = tl.arange(0, BLOCK_R)
    m_r = o_r < r
    m_rr = m_r[:, None] & m_r[None, :]
    X_ptr = pointer(table_ptr + X_POINTER * n + i, dtype, False)
    B_ptr = pointer(table_ptr + REFLECTORS_POINTER * n + i, dtype, False)
    signs_ptr = pointer(table_ptr + SIGNS_POINTER * n + i, dtype, False)
    b_X = tl.load(X_ptr + o_r[:, None] * r + o_r[None, :], mask=m_rr, other=0)
    b_B = tl.load(B_ptr + o_r[None, :] * r + o_r[:, None], mask=m_rr, other=0)
    b_S = tl.load(signs_ptr + o_r, mask=m_r, other=1)[None, :]
    b_diagonal = tl.load(X_ptr + o_r * r + o_r, mask=m_r, other=1)
    b_D = tl.where(b_diagonal < 0, -1, 1).to(tl.float64)
    return reflectors_of(b_X, o_r, o_r, r).to(tl.float64), (b_B * b_S).to(tl.float64), b_D


@triton.jit
def inverse_of(gram_ptr, r, BLOCK_R: tl.constexpr):
    """T of a Gram matrix: the inverse of its strict upper part plus half its diagonal, row by row from the last."""
    o_r = tl.arange(0, BLOCK_R)
    b_T = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
    for i_back in range(r):
        k = r - 1 - i_back
        b_above = tl.load(gram_ptr + k * BLOCK_R + o_r, mask=o_r > k, other=0)
        b_sum = tl.sum(b_above[:, None] * b_T, axis=0)
        b_row = ((o_r == k).to(tl.float64) - b_sum) / (tl.load(gram_ptr + k * (BLOCK_R + 1)) / 2)
        b_T = tl.where(o_r[:, None] == k, b_row[None, :], b_T)
    return b_T


@triton.jit(do_not_specialize=["n", "n_items"])
def orthonormalize_forward_kernel(
    table_ptr,  # int64 [8, n]
    R_ptr,  # of all matrices
    factors_ptr,  # float64, of each matrix T, C, T_B and M, [r, r] each
    partials_ptr,  # float64 [n_items, 3, BLOCK_R, BLOCK_R]: V^T V, B^T S V and B^T B of each slab
    scratch_ptr,  # float64 [n, FORWARD_SCRATCH, BLOCK_R, BLOCK_R]
    weights_ptr,  # [n, 2, BLOCK_R, BLOCK_R]: C D and K
    barrier_ptr,  # [1]
    n,  # matrices
    n_items,  # slabs of all
    BLOCK_R: tl.constexpr,  # the largest r, padded to a power of two
    BLOCK_D: tl.constexpr,  # columns of R a step
    SLAB_D: tl.constexpr,  # columns of R an item
    FULL: tl.constexpr,  # every r is BLOCK_R
    ALIGNED: tl.constexpr,  # every X and B is aligned to 16 bytes, every d a multiple of 4
    PHASE: tl.constexpr,  # 0: all; 1, 2 or 3: that one alone, for the interpreter, which runs programs in turn
    FLOAT32_DOT: tl.constexpr,  # how tl.dot multiplies float32
):
    """R of each matrix, and the factors of the backward; the formulas stand at the top of this file."""
    dtype: tl.constexpr = R_ptr.dtype.element_ty
    SQUARE: tl.constexpr = BLOCK_R * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    o_rr = places(BLOCK_R)
    ROWS: tl.constexpr = min(BLOCK_R, 16)
    APART: tl.constexpr = BLOCK_R > 16  # three sums at once would take too many registers

    if PHASE == 0 or PHASE == 1:
        for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            i, d, r, start, end = slab_of(table_ptr, i_item, n, SLAB_D, BLOCK_R, FULL, ALIGNED)
            own_partials = partials_ptr + wide(i_item) * (3 * SQUARE) + o_rr
            for part in tl.static_range(3 if APART else 1):
                b_VV = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
                b_M = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
                b_BB = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
                for i_d in tl.range(start, end, BLOCK_D, num_stages=1):
                    o_d = i_d + tl.arange(0, BLOCK_D)
                    _, b_V, b_B, b_S = load_tile(table_ptr, i, n, o_d, d, r, dtype, BLOCK_R, ALIGNED)
                    if part == 0:
                        b_VV += gram(b_V, b_V, FLOAT32_DOT)
                    if part == 1 or not APART:
                        b_M += gram(b_B, b_V * b_S, FLOAT32_DOT)
                    if part == 2 or not APART:
                        b_BB += gram(b_B, b_B, FLOAT32_DOT)
                if part == 0:
                    tl.store(own_partials, b_VV)
                if part == 1 or not APART:
                    tl.store(own_partials + SQUARE, b_M)
                if part == 2 or not APART:
                    tl.store(own_partials + 2 * SQUARE, b_BB)
    if PHASE == 0:
        meet(barrier_ptr)

    if PHASE == 0 or PHASE == 2:
        for i in range(tl.program_id(0), n, tl.num_programs(0)):
            first = tl.load(table_ptr + FIRST_SLAB * n + i).to(tl.int32)
            last = first + tl.cdiv(tl.load(table_ptr + D * n + i).to(tl.int32), SLAB_D)
            r = tl.load(table_ptr + R * n + i).to(tl.int32)
            own_factors = factors_ptr + tl.load(table_ptr + FACTORS_OFFSET * n + i)
            own_weights = weights_ptr + wide(i) * (2 * SQUARE) + o_rr
            T_ptr = scratch_ptr + wide(i) * (FORWARD_SCRATCH * SQUARE)
            C_ptr = T_ptr + SQUARE
            T_B_ptr = T_ptr + 2 * SQUARE
            M_ptr = T_ptr + 3 * SQUARE
            V_top_ptr = T_ptr + 4 * SQUARE
            VV_ptr = T_ptr + 5 * SQUARE
            BB_ptr = T_ptr + 6 * SQUARE
            b_V_top, _, _ = load_top(table_ptr, i, n, r, dtype, BLOCK_R)
            tl.store(V_top_ptr + o_rr, b_V_top)
            sum_into(VV_ptr, partials_ptr, first, last, 3 * SQUARE, BLOCK_R)
            sum_into(M_ptr, partials_ptr + SQUARE, first, last, 3 * SQUARE, BLOCK_R)
            sum_into(BB_ptr, partials_ptr + 2 * SQUARE, first, last, 3 * SQUARE, BLOCK_R)
            tl.debug_barrier()
            tl.store(T_ptr + o_rr, inverse_of(VV_ptr, r, BLOCK_R))
            tl.store(T_B_ptr + o_rr, inverse_of(BB_ptr, r, BLOCK_R))
            tl.debug_barrier()
            b_C = product(T_ptr, V_top_ptr, r, False, True, BLOCK_R)
            tl.store(C_ptr + o_rr, b_C)
            _, _, b_D = load_top(table_ptr, i, n, r, dtype, BLOCK_R)
            tl.store(own_weights, (b_C * b_D[None, :]).to(dtype))
            tl.debug_barrier()
            _, b_SB_top, b_D = load_top(table_ptr, i, n, r, dtype, BLOCK_R)
            rest_ptr = VV_ptr
            b_rest = (b_SB_top - product(M_ptr, C_ptr, r, False, False, BLOCK_R)) * b_D[None, :]
            tl.store(rest_ptr + o_rr, b_rest)
            for i_row in tl.range(0, r, ROWS, num_stages=1):
                o_row = i_row + tl.arange(0, ROWS)
                m_factor = (o_row < r)[:, None] & (o_r < r)[None, :]
                for k in tl.static_range(4):  # T, C, T_B, M
                    b_factor = tl.load(T_ptr + k * SQUARE + o_row[:, None] * BLOCK_R + o_r[None, :])
                    tl.store(own_factors + k * r * r + o_row[:, None] * r + o_r[None, :], b_factor, mask=m_factor)
            tl.debug_barrier()
            tl.store(own_weights + SQUARE, product(T_B_ptr, rest_ptr, r, False, False, BLOCK_R).to(dtype))
    if PHASE == 0:
        meet(barrier_ptr)

    if PHASE == 0 or PHASE == 3:
        for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            i, d, r, start, end = slab_of(table_ptr, i_item, n, SLAB_D, BLOCK_R, FULL, ALIGNED)
            own_weights = weights_ptr + wide(i) * (2 * SQUARE) + o_rr
            own_R = R_ptr + tl.multiple_of(tl.load(table_ptr + OUTPUT_OFFSET * n + i), 4)
            for i_d in tl.range(start, end, BLOCK_D, num_stages=1):
                o_d = i_d + tl.arange(0, BLOCK_D)
                b_X, b_V, b_B, b_S = load_tile(table_ptr, i, n, o_d, d, r, dtype, BLOCK_R, ALIGNED)
                b_SD = tl.where(o_d[:, None] == o_r[None, :], tl.where(b_X < 0, -b_S, b_S), 0)
                b_R = b_SD - times(b_V * b_S, tl.load(own_weights), FLOAT32_DOT)
                b_R -= times(b_B, tl.load(own_weights + SQUARE), FLOAT32_DOT)
                m_rd = (o_r < r)[:, None] & (o_d < d)[None, :]
                tl.store(own_R + o_r[:, None] * d + o_d[None, :], tl.trans(b_R), mask=m_rd)


@triton.jit(do_not_specialize=["n", "n_items"])
def orthonormalize_backward_kernel(
    table_ptr,  # int64 [8, n]
    grads_ptr,  # int64 [n]: pointers to dL/dR [r, d]
    dX_ptr,  # of all matrices
    factors_ptr,  # of the forward
    partials_ptr,  # float64 [n_items, 2, BLOCK_R, BLOCK_R]: V^T S G and B^T G of each slab
    scratch_ptr,  # float64 [n, BACKWARD_SCRATCH, BLOCK_R, BLOCK_R]
    weights_ptr,  # [n, 4, BLOCK_R, BLOCK_R]: L D C^T, -D C^T, W and dC^T T
    barrier_ptr,  # [1]
    n,
    n_items,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLAB_D: tl.constexpr,
    FULL: tl.constexpr,
    ALIGNED: tl.constexpr,  # of the gradients, too
    PHASE: tl.constexpr,
    FLOAT32_DOT: tl.constexpr,
):
    """dL/dX of each matrix; the formulas stand at the top of this file, the arguments at the forward's kernel."""
    dtype: tl.constexpr = dX_ptr.dtype.element_ty
    SQUARE: tl.constexpr = BLOCK_R * BLOCK_R
    o_r = tl.arange(0, BLOCK_R)
    o_rr = places(BLOCK_R)
    APART: tl.constexpr = BLOCK_R > 16

    if PHASE == 0 or PHASE == 1:
        for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            i, d, r, start, end = slab_of(table_ptr, i_item, n, SLAB_D, BLOCK_R, FULL, ALIGNED)
            grad_ptr = pointer(grads_ptr + i, dtype, ALIGNED)
            own_partials = partials_ptr + wide(i_item) * (2 * SQUARE) + o_rr
            for part in tl.static_range(2 if APART else 1):
                b_VG = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
                b_BG = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
                for i_d in tl.range(start, end, BLOCK_D, num_stages=1):
                    o_d = i_d + tl.arange(0, BLOCK_D)
                    _, b_V, b_B, b_S = load_tile(table_ptr, i, n, o_d, d, r, dtype, BLOCK_R, ALIGNED)
                    m_rd = (o_r < r)[:, None] & (o_d < d)[None, :]
                    b_G = tl.trans(tl.load(grad_ptr + o_r[:, None] * d + o_d[None, :], mask=m_rd, other=0))
                    if part == 0:
                        b_VG += gram(b_V * b_S, b_G, FLOAT32_DOT)
                    if part == 1 or not APART:
                        b_BG += gram(b_B, b_G, FLOAT32_DOT)
                if part == 0:
                    tl.store(own_partials, b_VG)
                if part == 1 or not APART:
                    tl.store(own_partials + SQUARE, b_BG)
    if PHASE == 0:
        meet(barrier_ptr)

    if PHASE == 0 or PHASE == 2:
        for i in range(tl.program_id(0), n, tl.num_programs(0)):
            first = tl.load(table_ptr + FIRST_SLAB * n + i).to(tl.int32)
            last = first + tl.cdiv(tl.load(table_ptr + D * n + i).to(tl.int32), SLAB_D)
            r = tl.load(table_ptr + R * n + i).to(tl.int32)
            own_factors = factors_ptr + tl.load(table_ptr + FACTORS_OFFSET * n + i)
            m_rr = (o_r < r)[:, None] & (o_r < r)[None, :]
            own_weights = weights_ptr + wide(i) * (4 * SQUARE) + o_rr
            T_ptr = scratch_ptr + wide(i) * (BACKWARD_SCRATCH * SQUARE)
            C_ptr = T_ptr + SQUARE
            T_B_ptr = T_ptr + 2 * SQUARE
            M_ptr = T_ptr + 3 * SQUARE
            V_top_ptr = T_ptr + 4 * SQUARE
            BG_ptr = T_ptr + 5 * SQUARE
            L_ptr = T_ptr + 6 * SQUARE
            LD_ptr = T_ptr + 7 * SQUARE
            dC_ptr = T_ptr + 8 * SQUARE
            VG_ptr = T_ptr + 9 * SQUARE
            for k in tl.static_range(4):  # T, C, T_B, M
                b_factor = tl.load(own_factors + k * r * r + o_r[:, None] * r + o_r[None, :], mask=m_rr, other=0)
                tl.store(T_ptr + k * SQUARE + o_rr, b_factor)
            b_V_top, _, b_D = load_top(table_ptr, i, n, r, dtype, BLOCK_R)
            tl.store(V_top_ptr + o_rr, b_V_top)
            sum_into(VG_ptr, partials_ptr, first, last, 2 * SQUARE, BLOCK_R)
            sum_into(BG_ptr, partials_ptr + SQUARE, first, last, 2 * SQUARE, BLOCK_R)
            tl.debug_barrier()
            b_L = product(T_B_ptr, BG_ptr, r, True, False, BLOCK_R)
            tl.store(L_ptr + o_rr, b_L)
            tl.store(LD_ptr + o_rr, b_L * b_D[None, :])
            b_DC = b_D[:, None] * tl.load(C_ptr + tl.trans(o_rr))
            tl.store(own_weights + SQUARE, (-b_DC).to(dtype))
            tl.debug_barrier()
            tl.store(own_weights, product(LD_ptr, C_ptr, r, False, True, BLOCK_R).to(dtype))
            b_VG = tl.load(VG_ptr + o_rr)
            b_dC = (product(M_ptr, L_ptr, r, True, False, BLOCK_R) - b_VG) * b_D[None, :]
            tl.store(dC_ptr + o_rr, b_dC)
            tl.debug_barrier()
            tl.store(own_weights + 3 * SQUARE, product(dC_ptr, T_ptr, r, True, False, BLOCK_R).to(dtype))
            dCV_ptr = BG_ptr
            tl.store(dCV_ptr + o_rr, product(dC_ptr, V_top_ptr, r, False, False, BLOCK_R))
            tl.debug_barrier()
            TdCV_ptr = L_ptr
            tl.store(TdCV_ptr + o_rr, product(T_ptr, dCV_ptr, r, True, False, BLOCK_R))
            tl.debug_barrier()
            b_N = -product(TdCV_ptr, T_ptr, r, False, True, BLOCK_R)
            b_upper = tl.where(o_r[:, None] < o_r[None, :], b_N, 0)
            b_W = tl.where(o_r[:, None] == o_r[None, :], b_N, b_upper + tl.trans(b_upper))
            tl.store(own_weights + 2 * SQUARE, b_W.to(dtype))
    if PHASE == 0:
        meet(barrier_ptr)

    if PHASE == 0 or PHASE == 3:
        for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            i, d, r, start, end = slab_of(table_ptr, i_item, n, SLAB_D, BLOCK_R, FULL, ALIGNED)
            grad_ptr = pointer(grads_ptr + i, dtype, ALIGNED)
            weights = weights_ptr + wide(i) * (4 * SQUARE)
            own_dX = dX_ptr + tl.multiple_of(tl.load(table_ptr + OUTPUT_OFFSET * n + i), 4)
            for i_d in tl.range(start, end, BLOCK_D, num_stages=1):
                o_d = i_d + tl.arange(0, BLOCK_D)
                _, b_V, b_B, b_S = load_tile(table_ptr, i, n, o_d, d, r, dtype, BLOCK_R, ALIGNED)
                m_rd = (o_r < r)[:, None] & (o_d < d)[None, :]
                b_G = tl.trans(tl.load(grad_ptr + o_r[:, None] * d + o_d[None, :], mask=m_rd, other=0))
                b_dV = times(b_B, tl.load(weights + o_rr), FLOAT32_DOT)
                b_dV += times(b_G, tl.load(weights + SQUARE + o_rr), FLOAT32_DOT)
                b_dV = b_dV * b_S + times(b_V, tl.load(weights + 2 * SQUARE + o_rr), FLOAT32_DOT)
                o_top = 3 * SQUARE + o_d[:, None] * BLOCK_R + o_r[None, :]
                b_dV += tl.load(weights + o_top, mask=(o_d < BLOCK_R)[:, None], other=0)
                m_dr = (o_d < d)[:, None] & (o_r < r)[None, :]
                b_dX = tl.where(o_d[:, None] > o_r[None, :], b_dV, 0)
                tl.store(own_dX + o_d[:, None] * r + o_r[None, :], b_dX, mask=m_dr)

"""AdamW of many tensors in one cooperative launch or two, with matrices [r, d] whose rows stay orthonormal among them.

    g <- clip / grad_scale * gradient      (negative where the objective is maximized)
    g <- g - sym(g R^T) R                  (of R, if RIEMANNIAN)
    m <- b1 m + (1 - b1) g      v <- b2 v + (1 - b2) g^2
    P = (1 - lr decay) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    w <- P, or (P P^T)^(-1/2) P where rows stay orthonormal (there without decay)

Phases with grid barriers between them: 1, sums over the gradients; 2, the step, and P P^T of each slab; 3, what counts
the steps, and 4, the inverse roots, by one program for each R; 5, R. High ranks go through 4 and 5 twice: one pass
leaves their rows a few 1e-7 from orthonormal. The highest have one more launch for 4 and 5, for want of registers.

The root is found by the coupled Newton-Schulz iteration (Higham, 2008, 6.35), in float64.
"""

import triton
import triton.language as tl

from reft_kernels.triton.matrices import (
    gram,
    length,
    meet,
    owner,
    places,
    pointer,
    product_columns,
    sum_into,
    times,
    wide,
)

# Rows of the table.
PARAMETER_POINTER = tl.constexpr(0)
EXP_AVG_POINTER = tl.constexpr(1)
EXP_AVG_SQ_POINTER = tl.constexpr(2)
STEP_POINTER = tl.constexpr(3)
R = tl.constexpr(4)  # rows, of a matrix whose rows stay orthonormal; 0 of all other tensors
D = tl.constexpr(5)  # columns; of all other tensors their elements
FIRST_SLAB = tl.constexpr(6)
ORTHONORMAL = tl.constexpr(7)  # number among those whose rows stay orthonormal
FIRST_ORTHONORMAL_SLAB = tl.constexpr(8)  # number among the slabs of those
WEIGHT_DECAY = tl.constexpr(9)  # the bits of a float64

# Squares of scratch memory, for each matrix.
SCRATCH = tl.constexpr(5)

MAX_ITERATIONS = tl.constexpr(30)
# Where Z Y is this near to the identity, one more step leaves it within rounding.
NEAR = tl.constexpr(1e-8)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def slab_of(
    table_ptr, i_item, n, SLAB: tl.constexpr, SLAB_D: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The item's tensor, its rows and columns, and where its slab begins and ends: columns, or elements."""
    i = owner(table_ptr + FIRST_SLAB * n, i_item, n)
    r = tl.load(table_ptr + R * n + i).to(tl.int32)
    d = length(table_ptr + D * n + i, ALIGNED)
    slab = tl.where(r > 0, SLAB_D, SLAB)
    start = (i_item - tl.load(table_ptr + FIRST_SLAB * n + i).to(tl.int32)) * slab
    return i, r, d, start, tl.minimum(start + slab, d)


@triton.jit
def tile_of(start, r, d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of a tile [BLOCK_R, BLOCK_D], and which of them there are: of columns, or of elements in order."""
    o_r = tl.arange(0, BLOCK_R)[:, None]
    o_d = start + tl.arange(0, BLOCK_D)[None, :]
    o_elements = o_r * BLOCK_D + o_d
    orthonormal = r > 0
    o_tile = tl.where(orthonormal, o_r * d + o_d, o_elements)
    m_tile = tl.where(orthonormal, o_d, o_elements) < d
    return o_tile, m_tile & (o_r < tl.where(orthonormal, r, BLOCK_R))


@triton.jit
def real(bits):
    """The float64 of these bits: arguments that are floating-point numbers come as float32."""
    return wide(bits).to(tl.float64, bitcast=True)


@triton.jit
def sum_of(values_ptr, first, last):
    """The sum of float64 values first <= i < last, always in the same order."""
    b_sum = tl.zeros([128], dtype=tl.float64)
    for start in range(first, last, 128):
        o_i = start + tl.arange(0, 128)
        b_sum += tl.load(values_ptr + o_i, mask=o_i < last, other=0)
    return tl.sum(b_sum, axis=0)


@triton.jit
def eye(i_column, r, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of the identity [r, r], padded with zeros, in float64."""
    o_r = tl.arange(0, BLOCK_R)[:, None]
    o_c = i_column + tl.arange(0, COLUMNS)[None, :]
    return ((o_r == o_c) & (o_r < r)).to(tl.float64)


@triton.jit
def store_inverse_root(root_ptr, scratch_ptr, r, BLOCK_R: tl.constexpr):
    """G^(-1/2) - I of the Gram matrix G in the first square of scratch memory, which is written over."""
    SQUARE: tl.constexpr = BLOCK_R * BLOCK_R
    COLUMNS: tl.constexpr = min(BLOCK_R, 16)  # a step
    o_rc = tl.arange(0, BLOCK_R)[:, None] * BLOCK_R + tl.arange(0, COLUMNS)[None, :]
    b_sums = tl.zeros([BLOCK_R], dtype=tl.float64)
    for i_c in tl.range(0, BLOCK_R, COLUMNS, num_stages=1):
        b_sums += tl.sum(tl.abs(tl.load(scratch_ptr + i_c + o_rc)), axis=1)
    scale = tl.max(b_sums, axis=0)  # an upper bound of the eigenvalues
    tl.debug_barrier()
    for i_c in tl.range(0, BLOCK_R, COLUMNS, num_stages=1):
        tl.store(scratch_ptr + i_c + o_rc, tl.load(scratch_ptr + i_c + o_rc) / scale)
        tl.store(scratch_ptr + SQUARE + i_c + o_rc, eye(i_c, r, BLOCK_R, COLUMNS))
    step_ptr = scratch_ptr + 4 * SQUARE
    i = 0
    more = scale > 0
    while more:
        Y_ptr = scratch_ptr + (i % 2) * (2 * SQUARE)
        Z_ptr = Y_ptr + SQUARE
        next_ptr = scratch_ptr + (1 - i % 2) * (2 * SQUARE)
        tl.debug_barrier()
        off = tl.full((), 0, dtype=tl.float64)
        for i_c in tl.range(0, BLOCK_R, COLUMNS, num_stages=1):
            b_off = eye(i_c, r, BLOCK_R, COLUMNS)
            b_off -= product_columns(Z_ptr, Y_ptr + i_c, r, False, False, BLOCK_R, COLUMNS)
            off = tl.maximum(off, tl.max(tl.max(tl.abs(b_off), axis=1), axis=0))
            tl.store(step_ptr + i_c + o_rc, eye(i_c, r, BLOCK_R, COLUMNS) + b_off / 2)
        tl.debug_barrier()
        for i_c in tl.range(0, BLOCK_R, COLUMNS, num_stages=1):
            b_Y = product_columns(Y_ptr, step_ptr + i_c, r, False, False, BLOCK_R, COLUMNS)
            tl.store(next_ptr + i_c + o_rc, b_Y)
            b_Z = product_columns(step_ptr, Z_ptr + i_c, r, False, False, BLOCK_R, COLUMNS)
            tl.store(next_ptr + SQUARE + i_c + o_rc, b_Z)
        i += 1
        more = (off > NEAR) & (i < MAX_ITERATIONS)
    tl.debug_barrier()
    Z_ptr = scratch_ptr + (i % 2) * (2 * SQUARE) + SQUARE
    for i_c in tl.range(0, BLOCK_R, COLUMNS, num_stages=1):
        b_root = tl.load(Z_ptr + i_c + o_rc) / tl.sqrt(scale) - eye(i_c, r, BLOCK_R, COLUMNS)
        tl.store(root_ptr + i_c + o_rc, b_root.to(root_ptr.dtype.element_ty))


@triton.jit
def store_roots(table_ptr, goes_ptr, grams_ptr, scratch_ptr, roots_ptr, n, SLAB_D: tl.constexpr, BLOCK_R: tl.constexpr):
    """Phase 4: the inverse root of each Gram matrix, less the identity."""
    SQUARE: tl.constexpr = BLOCK_R * BLOCK_R
    for i in range(tl.program_id(0), n, tl.num_programs(0)):
        r = tl.load(table_ptr + R * n + i).to(tl.int32)
        if (r > 0) & (tl.load(goes_ptr + i) != 0):
            own = tl.load(table_ptr + ORTHONORMAL * n + i)
            first = tl.load(table_ptr + FIRST_ORTHONORMAL_SLAB * n + i).to(tl.int32)
            last = first + tl.cdiv(tl.load(table_ptr + D * n + i).to(tl.int32), SLAB_D)
            own_scratch = scratch_ptr + own * (SCRATCH * SQUARE)
            sum_into(own_scratch, grams_ptr, first, last, SQUARE, BLOCK_R)
            tl.debug_barrier()
            store_inverse_root(roots_ptr + own * SQUARE, own_scratch, r, BLOCK_R)


@triton.jit
def retract(
    table_ptr, goes_ptr, grams_ptr, roots_ptr, n, n_items, again,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SLAB: tl.constexpr, SLAB_D: tl.constexpr,
    ALIGNED: tl.constexpr, FLOAT32_DOT: tl.constexpr,
):  # fmt: skip
    """Phase 5: R = P + (root - I) P; if ``again`` its Gram matrix, too, slab by slab."""
    dtype: tl.constexpr = roots_ptr.dtype.element_ty
    SQUARE: tl.constexpr = BLOCK_R * BLOCK_R
    o_rr = places(BLOCK_R)
    for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        i, r, d, start, end = slab_of(table_ptr, i_item, n, SLAB, SLAB_D, ALIGNED)
        if (r > 0) & (tl.load(goes_ptr + i) != 0):
            parameter_ptr = pointer(table_ptr + PARAMETER_POINTER * n + i, dtype, ALIGNED)
            b_root = tl.load(roots_ptr + tl.load(table_ptr + ORTHONORMAL * n + i) * SQUARE + o_rr)
            for i_d in tl.range(start, end, BLOCK_D, num_stages=1):
                o_tile, m_tile = tile_of(i_d, r, d, BLOCK_R, BLOCK_D)
                b_P = tl.trans(tl.load(parameter_ptr + o_tile, mask=m_tile, other=0))
                b_P += times(b_P, b_root, FLOAT32_DOT)
                tl.store(parameter_ptr + o_tile, tl.trans(b_P), mask=m_tile)
            if again:
                tl.debug_barrier()
                b_gram = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
                for i_d in tl.range(start, end, BLOCK_D, num_stages=1):
                    o_tile, m_tile = tile_of(i_d, r, d, BLOCK_R, BLOCK_D)
                    b_P = tl.trans(tl.load(parameter_ptr + o_tile, mask=m_tile, other=0))
                    b_gram += gram(b_P, b_P, FLOAT32_DOT)
                slab = tl.load(table_ptr + FIRST_ORTHONORMAL_SLAB * n + i) + start // SLAB_D
                tl.store(grams_ptr + slab * SQUARE + o_rr, b_gram)


@triton.jit(
    do_not_specialize=["n", "n_items", "lr", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "max_norm"],
    do_not_specialize_on_alignment=["lr_ptr", "grad_scale_ptr", "found_inf_ptr"],
)
def stiefel_adamw_kernel(
    table_ptr,  # int64 [10, n]
    gradients_ptr,  # int64 [n]: pointers
    squares_ptr,  # float64 [n_items]: of the gradients, summed over each slab
    tangents_ptr,  # float64 [slabs of matrices, BLOCK_R, BLOCK_R]: g R^T of each slab
    grams_ptr,  # float64 [slabs of matrices, BLOCK_R, BLOCK_R]: P P^T of each slab
    scratch_ptr,  # float64 [matrices, SCRATCH, BLOCK_R, BLOCK_R]
    roots_ptr,  # [matrices, BLOCK_R, BLOCK_R], of the parameters' type: (P P^T)^(-1/2) - I
    goes_ptr,  # int32 [n]: whether a tensor is changed
    norm_ptr,  # float64 []: of all gradients, written if CLIP
    lr_ptr,  # [], or None
    grad_scale_ptr,  # float32 [], or None
    found_inf_ptr,  # float32 [], or None
    barrier_ptr,  # [1]
    n,  # tensors
    n_items,  # slabs of all
    lr: tl.int64,  # the bits of a float64, as all that follow; not read where lr_ptr is there
    beta1: tl.int64, beta2: tl.int64, log_beta1: tl.int64, log_beta2: tl.int64, eps: tl.int64, max_norm: tl.int64,
    BLOCK_R: tl.constexpr,  # the largest r, padded to a power of two
    BLOCK_D: tl.constexpr,  # columns a step
    SLAB: tl.constexpr,  # elements an item, of tensors that are not constrained
    SLAB_D: tl.constexpr,  # columns an item, of matrices
    ALIGNED: tl.constexpr,  # every pointer is aligned to 16 bytes, every d a multiple of 4
    ANY_ORTHONORMAL: tl.constexpr,
    CLIP: tl.constexpr,
    RIEMANNIAN: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    PASSES: tl.constexpr,  # of the retraction
    FIRST_PHASE: tl.constexpr,  # from 1
    LAST_PHASE: tl.constexpr,  # to 5; each alone in the interpreter, which runs programs in turn
    FLOAT32_DOT: tl.constexpr,  # how tl.dot multiplies float32
):  # fmt: skip
    """One step; the formulas stand at the top of this file.

    Where found_inf is not zero, or the norm is not finite, nothing changes; where the gradient of a matrix with
    orthonormal rows is not finite, that matrix stays as it was, with its moments and its step.
    """
    dtype: tl.constexpr = roots_ptr.dtype.element_ty
    SQUARE: tl.constexpr = BLOCK_R * BLOCK_R
    TILE: tl.constexpr = BLOCK_R * BLOCK_D
    o_rr = places(BLOCK_R)
    gain = tl.full((), 1, dtype=tl.float64)
    if grad_scale_ptr is not None:
        gain = 1 / tl.load(grad_scale_ptr).to(tl.float64)

    if CLIP or ANY_ORTHONORMAL:
        if FIRST_PHASE == 1:
            for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
                i, r, d, start, end = slab_of(table_ptr, i_item, n, SLAB, SLAB_D, ALIGNED)
                gradient_ptr = pointer(gradients_ptr + i, dtype, ALIGNED)
                parameter_ptr = pointer(table_ptr + PARAMETER_POINTER * n + i, dtype, ALIGNED)
                b_squares = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float64)
                b_tangent = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
                for i_tile in tl.range(start, end, tl.where(r > 0, BLOCK_D, TILE), num_stages=1):
                    o_tile, m_tile = tile_of(i_tile, r, d, BLOCK_R, BLOCK_D)
                    b_g = tl.load(gradient_ptr + o_tile, mask=m_tile, other=0) * gain.to(dtype)
                    b_wide = b_g.to(tl.float64)
                    b_squares += b_wide * b_wide
                    if RIEMANNIAN:
                        if r > 0:
                            b_R = tl.load(parameter_ptr + o_tile, mask=m_tile, other=0)
                            b_tangent += gram(tl.trans(b_g), tl.trans(b_R), FLOAT32_DOT)
                tl.store(squares_ptr + i_item, tl.sum(tl.sum(b_squares, axis=1), axis=0))
                if RIEMANNIAN:
                    if r > 0:
                        slab = tl.load(table_ptr + FIRST_ORTHONORMAL_SLAB * n + i) + start // SLAB_D
                        tl.store(tangents_ptr + slab * SQUARE + o_rr, b_tangent)
        if FIRST_PHASE == 1 and LAST_PHASE > 1:
            meet(barrier_ptr)

    if FIRST_PHASE <= 2 and LAST_PHASE >= 2:
        rate = real(lr)
        if lr_ptr is not None:
            rate = tl.load(lr_ptr).to(tl.float64)
        b1 = real(beta1)
        b2 = real(beta2)
        all_go = tl.full((), 1, dtype=tl.int1)
        if found_inf_ptr is not None:
            all_go = tl.load(found_inf_ptr) == 0
        clip = tl.full((), 1, dtype=tl.float64)
        if CLIP:
            norm = tl.sqrt(sum_of(squares_ptr, 0, n_items))
            all_go = all_go & (norm < INFINITY)
            bound = real(max_norm)
            clip = tl.minimum(bound / (norm + 1e-6), 1.0)
            if tl.program_id(0) == 0:
                tl.store(norm_ptr, norm)
        if MAXIMIZE:
            clip = -clip
        for i_item in range(tl.program_id(0), n_items, tl.num_programs(0)):
            i, r, d, start, end = slab_of(table_ptr, i_item, n, SLAB, SLAB_D, ALIGNED)
            parameter_ptr = pointer(table_ptr + PARAMETER_POINTER * n + i, dtype, ALIGNED)
            gradient_ptr = pointer(gradients_ptr + i, dtype, ALIGNED)
            exp_avg_ptr = pointer(table_ptr + EXP_AVG_POINTER * n + i, dtype, ALIGNED)
            exp_avg_sq_ptr = pointer(table_ptr + EXP_AVG_SQ_POINTER * n + i, dtype, ALIGNED)
            t = tl.load(pointer(table_ptr + STEP_POINTER * n + i, tl.float32, False)).to(tl.float64) + 1
            correction1 = 1 - tl.exp(t * real(log_beta1))
            correction2 = 1 - tl.exp(t * real(log_beta2))
            decay = real(tl.load(table_ptr + WEIGHT_DECAY * n + i))
            kept = tl.where(r > 0, 1.0, 1 - rate * decay).to(dtype)
            goes = all_go
            if ANY_ORTHONORMAL:
                first_slab = tl.load(table_ptr + FIRST_SLAB * n + i).to(tl.int32)
                last_slab = first_slab + tl.cdiv(d, SLAB_D)
                if r > 0:
                    goes = goes & (sum_of(squares_ptr, first_slab, last_slab) < INFINITY)
            b_sym = tl.zeros([BLOCK_R, BLOCK_R], dtype=dtype)
            if RIEMANNIAN:
                if r > 0:
                    first = tl.load(table_ptr + FIRST_ORTHONORMAL_SLAB * n + i).to(tl.int32)
                    tangent_ptr = grams_ptr + wide(first + start // SLAB_D) * SQUARE  # in the place of the slab's P P^T
                    sum_into(tangent_ptr, tangents_ptr, first, first + tl.cdiv(d, SLAB_D), SQUARE, BLOCK_R)
                    tl.debug_barrier()
                    b_twice = tl.load(tangent_ptr + o_rr) + tl.load(tangent_ptr + tl.trans(o_rr))
                    b_sym = (b_twice * (clip / 2)).to(dtype)
                    tl.debug_barrier()
            b_gram = tl.zeros([BLOCK_R, BLOCK_R], dtype=tl.float64)
            if goes:
                for i_tile in tl.range(start, end, tl.where(r > 0, BLOCK_D, TILE), num_stages=1):
                    o_tile, m_tile = tile_of(i_tile, r, d, BLOCK_R, BLOCK_D)
                    b_w = tl.load(parameter_ptr + o_tile, mask=m_tile, other=0)
                    b_g = tl.load(gradient_ptr + o_tile, mask=m_tile, other=0) * gain.to(dtype) * clip.to(dtype)
                    if RIEMANNIAN:
                        if r > 0:
                            b_g -= tl.trans(times(tl.trans(b_w), b_sym, FLOAT32_DOT))
                    b_m = tl.load(exp_avg_ptr + o_tile, mask=m_tile, other=0)
                    b_v = tl.load(exp_avg_sq_ptr + o_tile, mask=m_tile, other=0)
                    # torch.lerp: the form that is exact where it ends
                    b_m = tl.where(b1 > 0.5, b_m + (1 - b1).to(dtype) * (b_g - b_m), b_g - b1.to(dtype) * (b_g - b_m))
                    b_v = b2.to(dtype) * b_v + (1 - b2).to(dtype) * b_g * b_g
                    b_scale = tl.sqrt(b_v) / tl.sqrt(correction2).to(dtype) + real(eps).to(dtype)
                    b_w = kept * b_w - (rate / correction1).to(dtype) * (b_m / b_scale)
                    tl.store(exp_avg_ptr + o_tile, b_m, mask=m_tile)
                    tl.store(exp_avg_sq_ptr + o_tile, b_v, mask=m_tile)
                    tl.store(parameter_ptr + o_tile, b_w, mask=m_tile)
                    if ANY_ORTHONORMAL:
                        if r > 0:
                            b_P = tl.trans(tl.where(m_tile, b_w, 0))
                            b_gram += gram(b_P, b_P, FLOAT32_DOT)
            if ANY_ORTHONORMAL:
                if r > 0:
                    slab = tl.load(table_ptr + FIRST_ORTHONORMAL_SLAB * n + i) + start // SLAB_D
                    tl.store(grams_ptr + slab * SQUARE + o_rr, b_gram)
            if start == 0:
                tl.store(goes_ptr + i, goes.to(tl.int32))
    if FIRST_PHASE <= 2 and LAST_PHASE > 2:
        meet(barrier_ptr)

    if FIRST_PHASE <= 3 and LAST_PHASE >= 3:
        for i in range(tl.program_id(0), n, tl.num_programs(0)):
            step_ptr = pointer(table_ptr + STEP_POINTER * n + i, tl.float32, False)
            tl.store(step_ptr, tl.load(step_ptr) + tl.load(goes_ptr + i))
    if ANY_ORTHONORMAL and LAST_PHASE > 3:
        for i_pass in range(PASSES if FIRST_PHASE < LAST_PHASE else 1):
            if FIRST_PHASE <= 4:
                store_roots(table_ptr, goes_ptr, grams_ptr, scratch_ptr, roots_ptr, n, SLAB_D, BLOCK_R)
            if FIRST_PHASE < LAST_PHASE:
                meet(barrier_ptr)
            if LAST_PHASE == 5:
                retract(
                    table_ptr, goes_ptr, grams_ptr, roots_ptr, n, n_items, i_pass + 1 < PASSES,
                    BLOCK_R, BLOCK_D, SLAB, SLAB_D, ALIGNED, FLOAT32_DOT,
                )  # fmt: skip
            if FIRST_PHASE < LAST_PHASE:
                if i_pass + 1 < PASSES:
                    meet(barrier_ptr)

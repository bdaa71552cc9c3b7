"""Pieces that the kernels over several matrices share: a table of matrices, slabs of them, and small square ones.

A table is int64 [fields, n], one column a matrix (pointers, sizes, offsets). A matrix is cut into slabs of columns of
its long side, and an item of work is one slab of one matrix. Sums over a slab's tiles are kept in float64; sums over
slabs are added in order, whoever took which slab, hence the same bits whatever the size of the grid.

Small square matrices lie in scratch memory, float64, padded with zeros to [BLOCK_R, BLOCK_R].
"""

import triton
import triton.language as tl

from reft_kernels.triton.common import arrive, wait


@triton.jit
def meet(barrier_ptr):
    """Waits until every program of the grid is here, and sees what they stored before."""
    wait(barrier_ptr, arrive(barrier_ptr))


@triton.jit
def wide(i):
    """An index as int64."""
    return tl.full((), 0, dtype=tl.int64) + i


@triton.jit
def owner(firsts_ptr, i_item, n):
    """Which of n matrices, whose first items stand in order at firsts_ptr, has the item."""
    found = 0
    for start in range(0, n, 128):
        o_n = start + tl.arange(0, 128)
        first = tl.load(firsts_ptr + o_n, mask=o_n < n, other=9223372036854775807)
        found += tl.sum((first <= i_item).to(tl.int32), axis=0)
    return found - 1


@triton.jit
def pointer(table_ptr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that stands in a table; to 16 bytes if ALIGNED."""
    found = tl.load(table_ptr).to(tl.pointer_type(dtype))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def length(table_ptr, ALIGNED: tl.constexpr):
    """The size that stands in a table; a multiple of 4 if ALIGNED."""
    found = tl.load(table_ptr).to(tl.int32)
    if ALIGNED:
        found = tl.multiple_of(found, 4)
    return found


@triton.jit
def gram(b_left, b_right, FLOAT32_DOT: tl.constexpr):
    """left^T right of tiles [D, R], their products added up in their own type, in float64."""
    if b_left.shape[1] >= 32:  # smaller ones would leave most warps with the same products
        b_sum = tl.dot(tl.trans(b_left), b_right, input_precision=FLOAT32_DOT, out_dtype=b_left.dtype)
    else:
        b_sum = tl.sum(b_left[:, :, None] * b_right[:, None, :], axis=0)
    return b_sum.to(tl.float64)


@triton.jit
def times(b_tile, b_weights, FLOAT32_DOT: tl.constexpr):
    """A tile [D, R] times weights [R, R]."""
    if b_tile.shape[1] >= 16:
        return tl.dot(b_tile, b_weights, input_precision=FLOAT32_DOT, out_dtype=b_tile.dtype)
    else:
        return tl.sum(b_tile[:, :, None] * b_weights[None, :, :], axis=1)


@triton.jit
def places(BLOCK_R: tl.constexpr):
    """Offsets within a square [BLOCK_R, BLOCK_R]."""
    o_r = tl.arange(0, BLOCK_R)
    return o_r[:, None] * BLOCK_R + o_r[None, :]


@triton.jit
def sum_into(square_ptr, partials_ptr, first, last, STRIDE: tl.constexpr, BLOCK_R: tl.constexpr):
    """The sum over the slabs first <= i < last, in order, of squares that lie STRIDE elements apart; a few rows a step.

    Other threads of the program see it after a ``tl.debug_barrier()``.
    """
    ROWS: tl.constexpr = min(BLOCK_R, 16)
    o_rows = tl.arange(0, ROWS)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    for i_row in tl.range(0, BLOCK_R, ROWS, num_stages=1):
        b_sum = tl.zeros([ROWS, BLOCK_R], dtype=tl.float64)
        for i in tl.range(first, last, num_stages=1):
            b_sum += tl.load(partials_ptr + wide(i) * STRIDE + i_row * BLOCK_R + o_rows)
        tl.store(square_ptr + i_row * BLOCK_R + o_rows, b_sum)


@triton.jit
def product(left_ptr, right_ptr, r, LEFT_T: tl.constexpr, RIGHT_T: tl.constexpr, BLOCK_R: tl.constexpr):
    """left right of two squares of scratch memory that are zero from r on, transposed where LEFT_T or RIGHT_T.

    What other threads of the program stored there is seen after a ``tl.debug_barrier()``.
    """
    return product_columns(left_ptr, right_ptr, r, LEFT_T, RIGHT_T, BLOCK_R, BLOCK_R)


@triton.jit
def product_columns(
    left_ptr, right_ptr, r, LEFT_T: tl.constexpr, RIGHT_T: tl.constexpr, BLOCK_R: tl.constexpr, COLUMNS: tl.constexpr
):
    """The first COLUMNS columns of :func:`product`."""
    o_r = tl.arange(0, BLOCK_R)
    o_c = tl.arange(0, COLUMNS)
    left_row: tl.constexpr = 1 if LEFT_T else BLOCK_R
    left_column: tl.constexpr = BLOCK_R if LEFT_T else 1
    right_row: tl.constexpr = 1 if RIGHT_T else BLOCK_R
    right_column: tl.constexpr = BLOCK_R if RIGHT_T else 1
    if BLOCK_R >= 16:
        b_sum = tl.zeros([BLOCK_R, COLUMNS], dtype=tl.float64)
        for start in tl.range(0, r, 16, num_stages=1):
            o_k = start + tl.arange(0, 16)
            b_left = tl.load(left_ptr + o_r[:, None] * left_row + o_k[None, :] * left_column)
            b_right = tl.load(right_ptr + o_k[:, None] * right_row + o_c[None, :] * right_column)
            b_sum = tl.dot(b_left, b_right, b_sum, out_dtype=tl.float64)
        return b_sum
    else:
        b_left = tl.load(left_ptr + o_r[:, None] * left_row + o_r[None, :] * left_column)
        b_right = tl.load(right_ptr + o_r[:, None] * right_row + o_c[None, :] * right_column)
        return tl.sum(b_left[:, :, None] * b_right[None, :, :], axis=1)

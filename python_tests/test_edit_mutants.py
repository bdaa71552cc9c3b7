"""The tests can fail: each line broken below is caught by a small matrix of edits.

A copy of the package with one broken line runs :func:`check_backend` in a process of its own; the unbroken copy must
pass it. A mutant whose line is no longer in the source fails too: change the list with the kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FORWARD, BACKWARD, COMMON, EAGER = (
    "triton/edit_forward.py", "triton/edit_backward.py", "triton/common.py", "backends/eager.py",
)  # fmt: skip
LAUNCHER, TENSORS = "backends/triton.py", "backends/tensors.py"

# file, the line or a part of it, what stands there instead; the first occurrence is replaced, or the one that follows
# the first part of a text in two parts
MUTANTS: list[tuple[str, str | tuple[str, str], str]] = [
    # the forward kernel: weights in registers
    (FORWARD, "o_rd = o_r[:, None] * d + o_d[None, :]", "o_rd = o_r[:, None] * BLOCK_D + o_d[None, :]"),
    (FORWARD, "b_W -= b_R", "pass"),
    (FORWARD, "b_b = tl.load(b_ptr + o_r, mask=m_r, other=0).to(ACCUMULATOR)", "pass"),
    (FORWARD, "b_c = tl.load(c_ptr + o_r, mask=m_r, other=0).to(ACCUMULATOR)", "pass"),
    (FORWARD, "tl.range(tl.program_id(0), N, tl.num_programs(0),",
     "tl.range(tl.program_id(0), N, 2 * tl.num_programs(0),"),
    (FORWARD, "m_h = o_d < tl.where(edited, d, 0)", "m_h = o_d < d"),
    (FORWARD, "b_s += tl.sum(b_W * b_h[None, :], axis=1)", "b_s = tl.sum(b_W * b_h[None, :], axis=1)"),
    (FORWARD, "b_q += tl.sum(b_R * b_h[None, :], axis=1)", "b_q -= tl.sum(b_R * b_h[None, :], axis=1)"),
    (FORWARD, "tl.store(delta_ptr + o_u, tl.where(edited, b_delta, 0), mask=m_r)",
     "tl.store(delta_ptr + o_u, b_delta, mask=m_r)"),
    (FORWARD, "tl.store(s_ptr + o_u, tl.where(edited, b_s, 0), mask=m_r)", "tl.store(s_ptr + o_u, b_s, mask=m_r)"),
    (FORWARD, "b_delta *= tl.load(scale_ptr + o_scale, mask=edited",
     "b_delta += 0 * tl.load(scale_ptr + o_scale, mask=edited"),
    (FORWARD, "keep_mask(seed, i_b * S + i_s, tl.arange", "keep_mask(seed, i_b * S + i_p, tl.arange"),
    (FORWARD, "tl.store(before_ptr + i_n.to(tl.int64) * d + o_d, b_before, mask=m_h)",
     "tl.store(before_ptr + i_n.to(tl.int64) * d + o_d, b_y.to(b_before.dtype), mask=m_h)"),
    # the forward kernel: what rows and tiles share
    (FORWARD, "h_rows = (h_ptr + i_b * stride_h_b + i_s * stride_h_s)", "h_rows = (h_ptr + i_s * stride_h_s)"),
    (FORWARD, "y_rows = (y_ptr + i_b * stride_y_b + i_s * stride_y_s)",
     "y_rows = (y_ptr + i_b * stride_y_b + i_p * stride_y_s)"),
    (FORWARD, "o_scale = i_b * stride_scale_b + i_p * stride_scale_p\n        b_scale",
     "o_scale = o_n\n        b_scale"),
    (FORWARD, "if HAS_POSITIONS or HAS_GROUP:\n        m_others", "if HAS_POSITIONS:\n        m_others"),
    (FORWARD, "m_others = (m_n & (i_g < 0))", "m_others = (m_n & (i_g < -1))"),
    (FORWARD, "tl.store(s_ptr + o_u[:, None] + o_r[None, :], b_zero, mask=m_others)", "pass"),
    # rows
    (FORWARD, "m_h = m_d & (m_n if COPY_OTHERS else m_edited)[:, None]", "m_h = m_d & m_edited[:, None]"),
    (FORWARD, ('METHOD == "rows"', "m_own = i_g == i_own"), "m_own = i_g >= i_own"),
    (FORWARD, ('METHOD == "rows"', "o_weights = i_own.to(tl.int64) * (r * d)"), "o_weights = i_own.to(tl.int64) * 0"),
    (FORWARD, ('METHOD == "rows"', "b_W -= b_R"), "pass"),
    (FORWARD, "b_s = tl.sum(b_h * b_W, axis=1)", "b_s += tl.sum(b_W, axis=1)"),
    (FORWARD, "b_q = tl.sum(b_h * b_R, axis=1)", "pass"),
    (FORWARD, 'if SUBTRACT and not (HAS_W and ACTIVATION == "linear"):\n                    b_q = tl',
     'if SUBTRACT:\n                    b_q = tl'),
    (FORWARD, "b_s += tl.load(b_ptr + i_own * r + k)", "b_s += tl.load(b_ptr + k)"),
    (FORWARD, "b_q += tl.load(c_ptr + i_own * r + k)", "b_q -= tl.load(c_ptr + i_own * r + k)"),
    (FORWARD, ('METHOD == "rows"', "activate(b_s, ACTIVATION) - b_q"), "activate(b_s - b_q, ACTIVATION)"),
    (FORWARD, "tl.store(delta_ptr + o_u + k, b_delta, mask=m_own)", "tl.store(delta_ptr + o_u + k, b_delta, mask=m_n)"),
    (FORWARD, "tl.store(s_ptr + o_u + k, b_s, mask=m_own)", "tl.store(s_ptr + o_u + k, b_delta, mask=m_own)"),
    (FORWARD, "b_y + (b_delta * b_scale)[:, None] * b_R, b_y)", "b_y + b_delta[:, None] * b_R, b_y)"),
    (FORWARD, "b_y = tl.where(m_own[:, None], b_y + (b_delta * b_scale)[:, None] * b_R, b_y)",
     "b_y += tl.where(m_own, b_delta * b_scale, 0)[:, None] * b_R"),
    (FORWARD, ('METHOD == "rows"', "i_own = next_group(i_g, i_own)"), "i_own = tl.full((), NO_GROUP, tl.int32)"),
    (FORWARD, ('METHOD == "rows"', "b_y * keep_gain, 0)"), "b_y, 0)"),
    (FORWARD, ('METHOD == "rows"', "(i_b * S + i_s)[:, None]"), "i_s[:, None]"),
    (FORWARD, "tl.store((before_ptr + o_n.to(tl.int64) * d)[:, None] + o_d, b_before, mask=m_h)",
     "tl.store((before_ptr + i_s * d)[:, None] + o_d, b_before, mask=m_h)"),
    (FORWARD, "b_after = tl.where(m_edited[:, None], b_after, b_before)", "pass"),
    # tiles
    (FORWARD, "N_TILES: tl.constexpr = (d + BLOCK_D - 1) // BLOCK_D", "N_TILES: tl.constexpr = d // BLOCK_D"),
    (FORWARD, ('METHOD == "tiles"', "m_own = i_g == i_own"), "m_own = i_g >= 0"),
    (FORWARD, ('METHOD == "tiles"', "o_weights = i_own.to(tl.int64) * (r * d)"), "o_weights = i_own.to(tl.int64) * d"),
    (FORWARD, ('METHOD == "tiles"', "o_d = i_tile * BLOCK_D + tl.arange(0, BLOCK_D)"), "o_d = tl.arange(0, BLOCK_D)"),
    (FORWARD, "b_A = b_W.to(ACCUMULATOR) - b_R.to(ACCUMULATOR)", "b_A = b_W.to(ACCUMULATOR)"),
    (FORWARD, "b_s = dot_down(b_h, b_W, b_s, FLOAT32_DOT)", "b_s = dot_down(b_h, b_W, b_q, FLOAT32_DOT)"),
    (FORWARD, "b_q = dot_down(b_h, b_R, b_q, FLOAT32_DOT)", "pass"),
    (FORWARD, "b_s += tl.load(b_ptr + i_own * r + o_r,", "b_s += tl.load(b_ptr + o_r,"),
    (FORWARD, "b_q += tl.load(c_ptr + i_own * r + o_r,", "b_q -= tl.load(c_ptr + i_own * r + o_r,"),
    (FORWARD, ('METHOD == "tiles"', "activate(b_s, ACTIVATION) - b_q"), "activate(b_s, ACTIVATION) + b_q"),
    (FORWARD, "b_delta = tl.where(m_u, b_delta * b_scale[:, None], 0)", "b_delta = tl.where(m_u, b_delta, 0)"),
    (FORWARD, "i_tile = N_TILES - 1 - i_back", "i_tile = N_TILES - 1"),
    (FORWARD, "b_y = dot_up(b_delta, b_R, b_before.to(ACCUMULATOR),",
     "b_y = dot_up(b_delta, b_R, tl.zeros([BLOCK_N, BLOCK_D], dtype=ACCUMULATOR),"),
    (FORWARD, "o_block = i_tile * (BLOCK_D // 4)", "o_block = i_back * (BLOCK_D // 4)"),
    (FORWARD, ('METHOD == "tiles"', "b_y * keep_gain, 0)"), "b_y, 0)"),
    (FORWARD, ('METHOD == "tiles"', "i_own = next_group(i_g, i_own)"), "i_own = next_group(i_g, i_own + 1)"),
    (FORWARD, "for i_tile in range(N_TILES):", "for i_tile in range(1, N_TILES):"),
    (FORWARD, "m_h = (m_n & (i_g < 0))[:, None] & (o_d < d)[None, :]", "m_h = m_n[:, None] & (o_d < d)[None, :]"),
    # the backward kernel: phase 1
    (BACKWARD, "range(start + tl.program_id(0) * ROWS_N, end, tl.num_programs(0) * ROWS_N)",
     "range(start + tl.program_id(0) * ROWS_N, end, (tl.num_programs(0) + 1) * ROWS_N)"),
    (BACKWARD, "grad_rows = (grad_ptr + i_b * stride_grad_b + i_s * stride_grad_s)",
     "grad_rows = (grad_ptr + i_b * stride_grad_b + i_p * stride_grad_s)"),
    (BACKWARD, "b_gain = tl.load(scale_ptr + o_scale, mask=m_edited, other=0).to(ACCUMULATOR)", "pass"),
    (BACKWARD, "b_gain *= keep_gain", "pass"),
    (BACKWARD, "b_g = tl.where(keep_mask(seed, (i_b * S + i_s)[:, None], o_block, KEEP_THRESHOLD), b_g, 0)", "pass"),
    (BACKWARD, ('METHOD == "rows"', "m_own = i_g == i_own"), "m_own = (i_g >= 0) & (i_g <= i_own)"),
    (BACKWARD, ('METHOD == "rows"', "o_weights = i_own.to(tl.int64) * (r * d)"), "o_weights = i_own.to(tl.int64) * 0"),
    (BACKWARD, "b_gd = tl.sum(b_g * b_R, axis=1) * b_gain", "b_gd = tl.sum(b_g * b_R, axis=1)"),
    (BACKWARD, "tl.store(gd_ptr + o_u + k, b_gd, mask=m_own)",
     "tl.store(gd_ptr + o_n * BLOCK_R + k, b_gd, mask=m_own)"),
    (BACKWARD, "tl.store(gs_ptr + o_u + k, b_gd * b_slope, mask=m_own)",
     "tl.store(gs_ptr + o_u + k, b_gd, mask=m_own)"),
    (BACKWARD, ('METHOD == "rows"', "i_own = next_group(i_g, i_own)"), "i_own = tl.full((), NO_GROUP, tl.int32)"),
    (BACKWARD, ('METHOD == "tiles"', "m_own = i_g == i_own"), "m_own = i_g >= 0"),
    (BACKWARD, ('METHOD == "tiles"', "o_weights = i_own.to(tl.int64) * (r * d)"), "o_weights = i_own.to(tl.int64) * 0"),
    (BACKWARD, "tl.range(0, d, BLOCK_D, num_stages=STAGES)", "tl.range(0, BLOCK_D, BLOCK_D, num_stages=STAGES)"),
    (BACKWARD, "o_block = i_d // 4 +", "o_block = 0 * i_d +"),
    (BACKWARD, ('METHOD == "tiles"', "b_g = tl.where(m_keep, b_g, 0)"), "pass"),
    (BACKWARD, "b_gd = dot_down(b_g, b_R, b_gd, FLOAT32_DOT)", "b_gd = dot_down(b_g, b_R, b_gd * 0, FLOAT32_DOT)"),
    (BACKWARD, "b_gd *= b_gain[:, None]", "pass"),
    (BACKWARD, "tl.store(gs_ptr + o_nr, b_gd * b_slope, mask=m_nr)", "tl.store(gs_ptr + o_nr, b_slope, mask=m_nr)"),
    (BACKWARD, ('METHOD == "tiles"', "i_own = next_group(i_g, i_own)"), "i_own = next_group(i_g, i_own + 1)"),
    # phase 2
    (BACKWARD, "N_SLABS: tl.constexpr = (d + SLAB_D - 1) // SLAB_D",
     "N_SLABS: tl.constexpr = (d + SLAB_D - 2) // SLAB_D"),
    (BACKWARD, 'NEED_CROSS: tl.constexpr = NEED_R and SUBTRACT and ACTIVATION != "linear"',
     'NEED_CROSS: tl.constexpr = NEED_R and SUBTRACT and ACTIVATION == "relu"'),
    (BACKWARD, "i_own = i_item // N_SLABS", "i_own = i_item // (N_SLABS + 1)"),
    (BACKWARD, "i_slab = i_item % N_SLABS", "i_slab = i_item % (N_SLABS + 1)"),
    (BACKWARD, "n_items = G * N_SLABS", "n_items = N_SLABS"),
    (BACKWARD, "m_d = o_d < tl.where(i_item < n_items, d, 0)",
     "m_d = o_d < tl.where(i_item < n_items, SLAB_D * N_SLABS, 0)"),
    (BACKWARD, ("N_SLABS", "o_weights = i_own.to(tl.int64) * (r * d)"), "o_weights = i_own.to(tl.int64) * 0"),
    (BACKWARD, "b_A = b_A.to(ACCUMULATOR) - b_R.to(ACCUMULATOR)", "b_A = b_A.to(ACCUMULATOR)"),
    (BACKWARD, "end = tl.minimum(start + chunk, N)", "end = tl.minimum(start + chunk - 1, N)"),
    (BACKWARD, "for start in range(0, N, chunk):", "for start in range(0, N - chunk, chunk):"),
    (BACKWARD, "tl.range(start, tl.where(i_item < n_items, end, start), BLOCK_N,",
     "tl.range(start, tl.where(i_item < n_items, start + 1, start), BLOCK_N,"),
    (BACKWARD, "o_n, end, positions_ptr, group_ptr, P, S, G,\n                        stride",
     "o_n, N, positions_ptr, group_ptr, P, S, G,\n                        stride"),
    (BACKWARD, "m_n = i_g == i_own", "m_n = i_g >= 0"),
    (BACKWARD, "b_gs = tl.load(gs_ptr + o_nr, mask=m_nr, other=0)", "pass"),
    (BACKWARD, "b_sum_gs += tl.sum(b_gs, axis=0)", "b_sum_gs = tl.sum(b_gs, axis=0)"),
    (BACKWARD, "b_sum_gd += tl.sum(b_gd, axis=0)", "b_sum_gd += tl.sum(b_gs, axis=0)"),
    (BACKWARD, "b_delta *= tl.load(scale_ptr", "b_delta += 0 * tl.load(scale_ptr"),
    (BACKWARD, ("N_SLABS", "grad_rows = (grad_ptr + i_b * stride_grad_b + i_s * stride_grad_s)"),
     "grad_rows = (grad_ptr + i_b * stride_grad_b + i_p * stride_grad_s)"),
    (BACKWARD, "o_block = i_slab * (SLAB_D // 4) +", "o_block = 0 * i_slab +"),
    (BACKWARD, ("N_SLABS", "b_g = tl.where(m_keep, b_g, 0)"), "pass"),
    (BACKWARD, "b_dR = dot_outer(b_u, b_g, b_dR, FLOAT32_DOT)", "b_dR = dot_outer(b_u, b_g, b_dR * 0, FLOAT32_DOT)"),
    (BACKWARD, "b_u *= keep_gain", "pass"),
    (BACKWARD, "if NEED_W or not NEED_CROSS:", "if NEED_W and NEED_CROSS:"),
    (BACKWARD, "x_rows = (x_ptr + o_n.to(tl.int64) * d)", "x_rows = (x_ptr + i_s * d)"),
    (BACKWARD, "x_rows = (x_ptr + i_b * stride_x_b + i_s * stride_x_s)",
     "x_rows = (x_ptr + i_b * stride_x_b + i_p * stride_x_s)"),
    (BACKWARD, "b_dW = dot_outer(b_gs, b_x, b_dW, FLOAT32_DOT)", "b_dW = dot_outer(b_gd, b_x, b_dW, FLOAT32_DOT)"),
    (BACKWARD, "b_dR = dot_outer(-b_gd, b_x, b_dR, FLOAT32_DOT)", "b_dR = dot_outer(b_gd, b_x, b_dR, FLOAT32_DOT)"),
    (BACKWARD, "b_dh *= keep_gain", "pass"),
    (BACKWARD, "b_dh = dot_up(b_gs, b_A, b_dh, HALF, FLOAT32_DOT)", "pass"),
    (BACKWARD, 'if SUBTRACT and not (HAS_W and ACTIVATION == "linear"):\n                            b_dh',
     "if SUBTRACT:\n                            b_dh"),
    (BACKWARD, "b_dh = dot_up(-b_gd, b_R, b_dh, HALF, FLOAT32_DOT)",
     "b_dh = dot_up(b_gd, b_R, b_dh, HALF, FLOAT32_DOT)"),
    (BACKWARD, "tl.store(grad_rows + o_d[None, :], round_to(b_dh, grad_ptr.dtype.element_ty), mask=m_nd)", "pass"),
    (BACKWARD, "b_wide = dot_up(-b_delta, b_R, b_x.to(ACCUMULATOR), HALF, FLOAT32_DOT)",
     "b_wide = b_x.to(ACCUMULATOR)"),
    (BACKWARD, "b_wide = dot_up(-b_delta, b_R,", "b_wide = dot_up(b_delta, b_R,"),
    (BACKWARD, "b_x = round_to(b_wide, x_ptr.dtype.element_ty)", "b_x = b_wide"),
    (BACKWARD, "b_dR -= b_dW", "pass"),
    (BACKWARD, "if SUBTRACT and not NEED_CROSS:", "if SUBTRACT:"),
    (BACKWARD, "b_dR += tl.load(dR_ptr", "b_dR = tl.load(dR_ptr"),
    (BACKWARD, "b_dW += tl.load(dW_ptr", "b_dW -= tl.load(dW_ptr"),
    (BACKWARD, "b_sum_gs += tl.load(db_ptr", "b_sum_gs = 0 * tl.load(db_ptr"),
    (BACKWARD, "b_dc += tl.load(dc_ptr", "b_dc -= tl.load(dc_ptr"),
    (BACKWARD, "if i_slab == 0:", "if i_slab == 1:"),
    (BACKWARD, "m_b = o_r < tl.where(i_item < n_items, r, 0)", "m_b = o_r < tl.where(i_item < n_items, 1, 0)"),
    (BACKWARD, "b_dc = -b_sum_gd", "b_dc = b_sum_gd"),
    (BACKWARD, "if ADD_R:", "if ADD_W:"),
    (BACKWARD, "if ADD_B:", "if False:"),
    # what both share
    (COMMON, "return tl.where(s <= 0, 0.0, s)", "return tl.where(s <= 1, 0.0, s)"),
    (COMMON, "return 0.5 * s * (1 + tl.erf(s * 0.7071067811865476))", "return 0.5 * s * (1 + tl.erf(s * 0.7))"),
    (COMMON, "return tl.where(s > 0, 1.0, 0.0)", "return tl.where(s > 0, 1.0, 0.01)"),
    (COMMON, "+ s * density", "+ density"),
    (COMMON, "b_sigmoid * (1 + s * (1 - b_sigmoid))", "b_sigmoid * (1 - b_sigmoid)"),
    (COMMON, "return 1 - b_tanh * b_tanh", "return 1 - b_tanh"),
    (COMMON, "e = tl.exp(-tl.abs(s))", "e = tl.exp(-s)"),
    (COMMON, "e = tl.exp(-2 * tl.abs(s))", "e = tl.exp(2 * s)"),
    (COMMON, "tl.interleave(tl.interleave(w0, w2)", "tl.interleave(tl.interleave(w1, w2)"),
    (COMMON, "c2 = (((zero + o_row) >> 32) & 0xFFFFFFFF)", "c2 = (((zero + o_row) >> 1) & 0xFFFFFFFF)"),
    (COMMON, ">= KEEP_THRESHOLD", "< KEEP_THRESHOLD"),
    (COMMON, "m_edited = m_edited & (i_s >= 0) & (i_s < S)", "m_edited = m_edited & (i_s < S)"),
    (COMMON, "m_edited = m_edited & (i_s >= 0) & (i_s < S)", "m_edited = m_edited & (i_s >= 0)"),
    (COMMON, "m_edited = m_edited & (i_g64 >= 0) & (i_g64 < G)", "m_edited = m_edited & (i_g64 < G)"),
    (COMMON, "m_edited = m_edited & (i_g64 >= 0) & (i_g64 < G)", "m_edited = m_edited & (i_g64 >= 0)"),
    (COMMON, "i_p = (o_n % P)", "i_p = (o_n % (P + 1))"),
    (COMMON, "i_b = (o_n // P)", "i_b = (o_n // (P + 1))"),
    (COMMON, "o_position = i_b * stride_positions_b + i_p * stride_positions_p", "o_position = o_n"),
    (COMMON, "o_group = i_b * stride_group_b + i_p * stride_group_p", "o_group = o_n"),
    (COMMON, "tl.where(m_edited, i_g, -1)", "i_g"),
    (COMMON, "m_edited = o_n < end", "m_edited = o_n <= end"),
    (COMMON, "tl.min(tl.where(i_g > i_last, i_g, NO_GROUP), axis=0)",
     "tl.max(tl.where(i_g > i_last, i_g, NO_GROUP), axis=0)"),
    (COMMON, "b_rest = b_w - b_high.to(tl.float32)", "b_rest = b_w * 0"),
    (COMMON, "b_low = round_to(b_rest - b_middle.to(tl.float32), tl.bfloat16)", "b_low = b_middle"),
    (COMMON, "b_low = round_to(b_w - b_high.to(tl.float32), tl.bfloat16)", "b_low = b_high"),
    (COMMON, "b_acc = tl.dot(operand(b_x), tl.trans(b_low), b_acc)", "pass"),
    (COMMON, "b_acc = tl.dot(operand(b_x), tl.trans(b_middle), b_acc)", "pass"),
    (COMMON, "b_acc = tl.dot(tl.trans(b_low), operand(b_x), b_acc)", "pass"),
    (COMMON, "b_acc = tl.dot(tl.trans(b_middle), operand(b_x), b_acc)", "pass"),
    (COMMON, "b_acc = tl.dot(u_high, w_low, b_acc)", "b_acc = tl.dot(u_low, w_low, b_acc)"),
    (COMMON, "b_acc = tl.dot(u_low, w_high, b_acc)", "pass"),
    # the launcher
    (LAUNCHER, "COPY_OTHERS=p.positions is None and p.group is not None and not inplace", "COPY_OTHERS=False"),
    (LAUNCHER, "elif needs.h and not inplace:", "elif False:"),
    (LAUNCHER, "ADD_W=places[1] is not None", "ADD_W=places[0] is None"),
    (LAUNCHER, "NEED_B=db is not None", "NEED_B=needs.h"),
    (LAUNCHER, "NEED_W=dW is not None", "NEED_W=needs.R and W is not None"),
    (LAUNCHER, "HAS_C=p.c is not None and p.subtract", "HAS_C=False"),
    (TENSORS, "y = h.clone(memory_format=torch.contiguous_format)", "y = torch.empty_like(h)"),
    (TENSORS, "found.append(place)", "found.append(torch.empty_like(place))"),
    (LAUNCHER, "gs = gd if linear else torch.empty_like(gd)", "gs = gd"),
    # the eager backend
    (EAGER, "sign=-1).to(p.h.dtype).to(dtype)", "sign=-1)"),
    (EAGER, "delta = delta - _down(x, R,", "delta = delta + _down(x, R,"),
    (EAGER, "delta = activate(s, p.activation)", "delta = s"),
    (EAGER, "None if p.c is None else p.c.to(dtype), slots, r)", "None, slots, r)"),
    (EAGER, "delta = delta.masked_fill(slots.idle, 0)", "pass"),
    (EAGER, "s = s.masked_fill(slots.idle, 0) if s.numel() else s", "pass"),
    (EAGER, "(before.clone() if slots.row is None else before) if save_rows", "before if save_rows"),
    (EAGER, "scaled = _scaled(delta, p, slots)\n    whole", "scaled = delta\n    whole"),
    (EAGER, "whole = slots.row is None and slots.idle is None", "whole = slots.row is None"),
    (EAGER, "if inplace and whole and p.dropout == 0 and x is before", "if inplace and whole and x is before"),
    (EAGER, "after = after.mul_(_keep_factor(p, slots, p.h.shape, dtype))", "pass"),
    (EAGER, "g = g * _keep_factor(p, slots, grad.shape, dtype)", "pass"),
    (EAGER, "g = g.masked_fill(slots.idle, 0)", "pass"),
    (EAGER, "gd = _scaled(_down(g, R, None, slots, R.shape[1]), p, slots)",
     "gd = _down(g, R, None, slots, R.shape[1])"),
    (EAGER, "gd * activation_slope(s, p.activation)", "gd"),
    (EAGER, ("wanted_W =", "scaled = _scaled(delta, p, slots)"), "scaled = delta"),
    (EAGER, "x = (p.h if p.h.dim() == 2 else _read(p.h, slots)).to(dtype)",
     "x = p.h.reshape(-1, p.h.shape[-1])[: len(gd)].to(dtype)"),
    (EAGER, "x = _add_up(x, scaled, R, slots, sign=-1)", "x = _add_up(x, scaled, R, slots)"),
    (EAGER, "x = x.masked_fill(slots.idle, 0)", "pass"),
    (EAGER, "dW = _outer(gs, x, slots)", "dW = _outer(gd, x, slots)"),
    (EAGER, "if dW is not None and p.activation == \"linear\" else _outer(gd, x, slots)",
     "if dW is not None else _outer(gd, x, slots)"),
    (EAGER, "dR = _outer(scaled, g, slots, minus=cross)", "dR = _outer(scaled, g, slots)"),
    (EAGER, "db = _sum_by_group(gs, slots)", "db = _sum_by_group(gd, slots)"),
    (EAGER, "dc = -_sum_by_group(gd, slots)", "dc = _sum_by_group(gd, slots)"),
    (EAGER, "after = _add_up(after, gd, weight, slots)", "after = _add_up(after, gd, weight, slots, sign=-1)"),
    (EAGER, "after = _add_up(after, gs, p.W.to(dtype), slots)", "after = _add_up(after, gd, p.W.to(dtype), slots)"),
    (EAGER, "after = _add_up(after, gd, R, slots, sign=-1)", "pass"),
    (EAGER, "copy=after is g and not inplace)", "copy=False)"),
    (EAGER, "start = torch.arange(0, shape[0] * length, length,", "start = torch.arange(0, shape[0],"),
    (EAGER, "idle = inside != p.positions if", "idle = inside > p.positions if"),
    (EAGER, "unknown = p.group.clamp(0, p.R.shape[0] - 1) != p.group",
     "unknown = p.group.clamp(0, p.R.shape[0]) != p.group"),
    (EAGER, "unknown if idle is None else idle | unknown", "unknown if idle is None else idle"),
    (EAGER, "others = [group != g for", "others = [group < g for"),
    (EAGER, "h.stride(0) == length * h.stride(1)", "h.stride(0) >= length * h.stride(1)"),
    (EAGER, "rows = before.where(slots.idle, rows)", "pass"),
    (EAGER, "y = h if inplace else h.clone(memory_format=torch.contiguous_format)", "y = h"),
    (EAGER, "row = row.index_select(0, source)", "pass"),
    (EAGER, "rows = rows.index_select(0, source)", "pass"),
    (EAGER, "torch.arange(shape[0] * shape[1], device=p.R.device) if slots.row is None else slots.row",
     "torch.arange(shape[0] * shape[1], device=p.R.device)[: 1 if slots.row is None else len(slots.row)]"),
    (EAGER, ".to(dtype) / (1 - p.dropout)", ".to(dtype)"),
    (EAGER, "weight = -R if weight is None else weight - R", "weight = R if weight is None else weight - R"),
    (EAGER, "weight = -R if weight is None else weight - R", "weight = -R"),
    (EAGER, "else bias - p.c.to(dtype)", "else bias + p.c.to(dtype)"),
    (EAGER, "scale.masked_fill(slots.idle, 0))", "scale)"),
    (EAGER, "zip(slots.others[1:], others, strict=True)", "zip(slots.others, others, strict=False)"),
    (EAGER, "left.masked_fill(o, 0).T @ right.masked_fill(o, 0)", "left.masked_fill(o, 0).T @ right"),
    (EAGER, "left.T @ right if minus is None else torch.addmm(minus[0], left.T, right, beta=-1)", "left.T @ right"),
    (EAGER, "parts if minus is None else parts.sub_(minus)", "parts if minus is None else parts.add_(minus)"),
    (EAGER, "rows.masked_fill(o, 0).sum(0)", "rows.sum(0)"),
    (EAGER, "return rows.sum(0, keepdim=True)", "return rows[:1]"),
    (EAGER, "if place is None else place.add_(value)", "if place is None else place.copy_(value)"),
]  # fmt: skip


def check_backend(name: str, first: str = "") -> None:
    """Edits of every feature along every path, against the float64 oracle; those by the method ``first`` come first."""
    import importlib
    import math
    from dataclasses import replace

    import torch
    from test_edit_kernels import (
        ALL,
        ALONE,
        Launch,
        check,
        check_forward,
        forced,
        hostile_gradient,
        problem_of,
        rebuilt_error,
        widened,
    )

    from reft_kernels.testing import EditCase, assert_bitwise_equal, lay_out, poison_empty, random_edit

    backend: Any = importlib.import_module(f"reft_kernels.backends.{name}")
    rows = Launch(forward_n=4, rows_n=4, slab_d=16)
    tiles = Launch("tiles", 4, 16, "tiles", 4, 16, slab_d=16)
    weights = replace(rows, forward="weights")
    full = EditCase(
        "noreft_with_c", "gelu", positions="padded", groups=3, scale="rows",
        shape=(3, 5), slots=4, d=33, r=3, layout="slice", index="strided",
    )  # fmt: skip
    linear = replace(full, activation="linear")
    every = {"positions": "none", "groups": 0, "index": "int64"}  # every row, of one set
    single = replace(full, groups=0)
    cases: list[tuple[EditCase, Launch, dict[str, Any]]] = [
        (full, rows, {}),
        (linear, rows, {"mode": "rows", "into": torch.float32}),
        (full, tiles, {"mode": "rebuild", "into": torch.float32}),
        (linear, replace(tiles, chunk=5), {"inplace": True}),
        (replace(full, dtype="mixed"), tiles, {}),
        (replace(linear, dtype="mixed"), tiles, {"mode": "rebuild"}),
        (replace(full, activation="silu", layout="transposed"), rows, {"mode": "rebuild"}),
        (replace(single, dropout=0.3), weights, {}),
        (replace(single, activation="linear", dropout=0.3), weights, {"into": torch.bfloat16}),
        (replace(single, activation="tanh", dtype="mixed"), tiles, {"mode": "rebuild"}),
        (replace(full, positions="none", dropout=0.3, index="int64"), rows, {}),
        (replace(linear, positions="none", dropout=0.3, index="int64"), tiles, {}),
        (replace(linear, positions="none", index="int64"), rows, {"inplace_forward": True, "mode": "rows"}),
        (replace(linear, **every, dropout=0.3, layout="contiguous"), rows, {"inplace_forward": True, "mode": "rows"}),
        (replace(linear, **every, layout="contiguous"), rows, {"inplace_forward": True, "mode": "rows"}),
        (replace(linear, positions="none", index="int64", shape=(1, 40), d=5), tiles, {"inplace_forward": True}),
        (replace(linear, **every, method="lobireft", layout="contiguous"), rows, {}),
        (replace(full, **every, activation="relu", method="consreft", shape=(2, 20), d=17), tiles, {}),
        (replace(full, **every, method="consreft", shape=(23,), d=17), replace(rows, chunk=7), {}),
        (replace(linear, method="consreft", layout="rows"), rows, {"grad_layout": "rows"}),
        (replace(full, method="lobireft", scale="number"), rows, {}),
        (replace(full, method="direft", scale="none"), tiles, {}),
        (replace(linear, method="nodireft"), tiles, {}),
    ]  # fmt: skip
    order = sorted(range(len(cases)), key=lambda i: first not in (cases[i][1].forward, cases[i][1].phase1))
    for number in order:
        case, path, how = cases[number]
        torch.manual_seed(number)
        o = random_edit(case, seed=number)
        if isinstance(o.scale, torch.Tensor):  # what it holds at slots without an edit is not read
            scale = o.scale
            for index in (o.positions, o.group):
                scale = scale if index is None else scale.masked_fill(index < 0, math.nan)
            o = replace(o, scale=lay_out(scale, "columns"))
        check(o, path, backend=backend, **how)

    # Large values of s, where an exponential could overflow.
    for activation in ("silu", "tanh", "gelu"):
        o = random_edit(
            replace(full, activation=activation, method="nodireft", positions="none", index="int64"), seed=50
        )
        o.b.copy_(torch.tensor([200.0, -200.0, 1.0]))
        check(o, rows, backend=backend)

    # Entries out of range count as -1.
    o = random_edit(full, seed=51)
    grad = hostile_gradient(o, "contiguous")
    p = problem_of(o)
    positions, group = torch.tensor([[5, -7, 5, 100]]), torch.tensor([[3, 3, 3, 100]])
    strange = p._replace(
        positions=p.positions.where(p.positions >= 0, positions), group=p.group.where(p.group >= 0, group)
    )
    for path in (rows, tiles):
        results = []
        for operands in (p, strange):
            with forced(path), poison_empty():
                y, delta, s, _ = backend.edit_forward(operands, False, save_rows=False)
                results.append((y, delta, s, *backend.edit_backward(grad, operands, delta, s, ALL)))
        for got, expected in zip(*results, strict=True):
            assert_bitwise_equal(got, expected)

    # One gradient alone, and some places to add to.
    for activation in ("linear", "gelu"):
        o = random_edit(replace(full, activation=activation), seed=52)
        p = problem_of(o)
        grad = hostile_gradient(o, "contiguous")
        _, delta, s, _ = check_forward(o, rows, backend=backend)
        places = [torch.randn(t.shape) for t in (p.R, p.W, p.b, p.c)]
        with forced(rows), poison_empty():
            together = backend.edit_backward(grad, p, delta, s, ALL)
            for needs in ALONE:
                for got, expected, needed in zip(
                    backend.edit_backward(grad, p, delta, s, needs), together, needs, strict=True
                ):
                    assert (got is not None) == needed
                    if needed:
                        torch.testing.assert_close(got, expected, equal_nan=True)
            for some in ((0, 2), (1, 3)):
                into = tuple(t.clone() if i in some else None for i, t in enumerate(places))
                found = backend.edit_backward(grad, p, delta, s, ALL, into=into)[1:]
                for i, (got, expected) in enumerate(zip(found, together[1:], strict=True)):
                    torch.testing.assert_close(got, expected + places[i] if i in some else expected)

    # What is not finite in one weight set stays there.
    o = random_edit(EditCase("noreft_with_c", "linear", groups=2, shape=(6,), d=12, r=2), seed=53)
    o = replace(o, h=torch.randn(6, 12), group=torch.tensor([0, 1, 0, 1, 1, 0]))
    for path in (rows, tiles):
        results = []
        for value in (1.0, math.nan):
            o.R[1] = value
            with forced(path), poison_empty():
                y, delta, s, _ = backend.edit_forward(problem_of(o), False, save_rows=False)
                results.append([y[0, o.group == 0]])
                o.h[o.group == 1] = value
                found = backend.edit_backward(torch.ones(1, 6, 12), problem_of(o), delta.nan_to_num(), s, ALL)
                results[-1] += [found[0][0, o.group == 0], *(t[0] for t in found[1:])]
        for got, expected in zip(results[1], results[0], strict=True):
            assert_bitwise_equal(got, expected)

    for path in (rows, tiles):
        assert rebuilt_error(path, backend) < 1e-5

    # What is rounded to half precision is as good as rounded once.
    o = random_edit(EditCase("nodireft", dtype="mixed16", shape=(9,), d=40, r=4), seed=54)
    o = replace(o, h=o.h * 0.01, R=o.R * 5)
    p = problem_of(o)
    with forced(tiles), poison_empty():
        y, *_ = backend.edit_forward(p, False, save_rows=False)
    exact, *_ = backend.edit_forward(widened(p, torch.float64), False, save_rows=False)
    assert float((y.double() - exact).norm() / exact.norm()) < 4e-4


# Imports torch and Triton once and forks a process for each mutant's copy of the package. A broken mask or offset may
# write anywhere: a mutant that dies of it, or hangs on a broken heap until its alarm, is caught too.
RUNNER = """
import importlib, os, signal, sys
import torch, triton, numpy
torch.set_num_threads(1)
for line in sys.stdin:
    folder, module, function, *arguments = line.split()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(ALARM)
        status = 1
        try:
            sys.path[:0] = [folder, TESTS]
            getattr(importlib.import_module(module), function)(*arguments)
            import reft_kernels
            assert reft_kernels.__file__.startswith(folder)
            status = 0
        except BaseException as error:
            print(folder, "caught", type(error).__name__, str(error).split("\\n")[0][:200], flush=True)
        os._exit(status)
    _, status = os.waitpid(child, 0)
    print(folder, "passed" if status == 0 else "failed", flush=True)
"""


def _place(source: str, old: str | tuple[str, str]) -> int:
    after, part = ("", old) if isinstance(old, str) else old
    start = source.find(after)
    place = source.find(part, start + len(after)) if start >= 0 else -1
    assert place >= 0, f"not in the source any more: {old}"
    return place


def mutate(folder: Path, file: str, old: str | tuple[str, str], new: str) -> None:
    path = folder / "reft_kernels" / file
    source = path.read_text()
    place = _place(source, old)
    end = place + len(old if isinstance(old, str) else old[1])
    path.write_text(source[:place] + new + source[end:])


def nearest_method(file: str, old: str | tuple[str, str], new: str) -> str:
    """The kernels' method that a mutant's line belongs to, so that most mutants go no further than one edit."""
    source = (ROOT / "reft_kernels" / file).read_text()
    marks = re.split(r'METHOD == "(\w+)"', source[: _place(source, old)])
    return "tiles" if file == COMMON and "dot" in new + str(old) else marks[-2] if len(marks) > 1 else "rows"


def survivors(
    tmp_path: Path, mutants: Sequence[tuple[str, str | tuple[str, str], str]], check: str, alarm: int = 120
) -> list[str]:
    """Those of the mutants that a check does not notice; fails if it does not pass the unbroken package.

    Args:
        tmp_path: an empty folder.
        mutants: as in MUTANTS.
        check: module and function of this folder, and words for its arguments; METHOD stands for that of the mutant.
        alarm: seconds that each may take.
    """
    folders = []
    checks = [check, *(check.replace("METHOD", nearest_method(*mutant)) for mutant in mutants)]
    for number in range(len(mutants) + 1):
        folder = tmp_path / str(number)
        shutil.copytree(
            ROOT / "reft_kernels",
            folder / "reft_kernels",
            ignore=shutil.ignore_patterns("__pycache__", "training", "cli"),
        )
        if number:
            mutate(folder, *mutants[number - 1])
        folders.append(folder)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", RUNNER.replace("TESTS", repr(str(ROOT / "python_tests"))).replace("ALARM", str(alarm))],
        input="".join(f"{folder} {one}\n" for folder, one in zip(folders, checks, strict=True)),
        env=environment, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    verdicts = dict(line.split()[:2] for line in done.stdout.splitlines() if line.split()[1] in ("passed", "failed"))
    print(done.stdout)  # shown where a test fails
    assert len(verdicts) == len(folders), done.stderr
    assert verdicts[str(folders[0])] == "passed", f"the unbroken package fails:\n{done.stdout}"
    return [
        f"{file}: {old!r} -> {new!r}"
        for folder, (file, old, new) in zip(folders[1:], mutants, strict=True)
        if verdicts[str(folder)] == "passed"
    ]


PARTS = 6  # of Triton's, which run at once


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "part"), [("eager", 0), *(("triton", part) for part in range(PARTS))])
def test_every_mutant_is_caught(tmp_path: Path, backend: str, part: int) -> None:
    chosen = [m for m in MUTANTS if (m[0] == EAGER) == (backend == "eager")]
    if backend == "triton":
        chosen = chosen[part::PARTS]
    left = survivors(tmp_path, chosen, f"test_edit_mutants check_backend {backend} METHOD")
    assert not left, "these broken lines are not noticed:\n" + "\n".join(left)

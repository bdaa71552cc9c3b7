"""Launch configurations for devices and shapes without a measured table: pure functions of the edit and its size.

What they weigh: for few slots, how many programs there are and how long one takes; for many, how often the weights
are read again from the L2 cache, as each program reads all of them; and the registers, of which none may spill.
"""

from __future__ import annotations

import torch

from reft_kernels.problem import EditProblem
from reft_kernels.triton.config_tables import BackwardConfig, Config, ForwardConfig

# The largest r, and d, for which rows are held in registers and CUDA cores multiply; above, tensor cores do.
MAX_ROWS_RANK = 8
MAX_ROWS_D = 16384
# Elements of h that 8 warps hold in registers beside their work, and of R and of W each.
HELD_ROWS = 16384
HELD_WEIGHTS = 16384
# From here on the reading of weights counts most, below the number of programs.
MANY_SLOTS = 2048


def forward_config(p: EditProblem, slots: int, warpgroups: bool) -> ForwardConfig:
    """The forward's configuration for ``slots`` = N slots.

    ``warpgroups``: the device multiplies tiles of 64 rows by a group of four warps (compute capability 9 and 10).
    """
    groups, r, d = p.R.shape
    wide = max(4, power_of_two(d))
    if slots >= MANY_SLOTS and p.group is None and power_of_two(r) * wide <= HELD_WEIGHTS:
        return ForwardConfig("weights", BLOCK_N=1, BLOCK_D=wide, STAGES=4 if wide <= 4096 else 2, num_warps=8)
    few = slots < MANY_SLOTS and r <= MAX_ROWS_RANK
    if d <= MAX_ROWS_D and (few or slots <= 128 or (slots <= 256 and groups > 2)):
        # Few slots make few tiles, and in a batch of many adapters neighbours share no weights.
        block = 1 if groups > 2 else min(4, HELD_ROWS // wide, power_of_two(-(-slots // 128)))
        warps = 4 if block * wide <= 4096 else 8
        return ForwardConfig("rows", block, wide, STAGES=2 if wide <= 8192 else 1, num_warps=warps)
    burdens = _burdens(p)
    if slots <= 2 * MANY_SLOTS or (burdens >= 2 and r > 32):
        block, columns = 16, 64
    elif burdens == 0 and r > 16 and warpgroups:
        block, columns = 64, 64
    else:
        block, columns = 32, 128 if r <= 16 else 64 if r <= 32 else 32
    columns = min(32 if burdens else columns, max(16, wide))
    return ForwardConfig("tiles", block, columns, STAGES=2, num_warps=8 if block * columns >= 2048 else 4)


def backward_config(p: EditProblem, slots: int, resident: int, warpgroups: bool) -> BackwardConfig:
    """The backward's configuration for ``slots`` = N slots, on a device where ``resident`` programs run at once.

    ``warpgroups`` as in :func:`forward_config`.
    """
    groups, r, d = p.R.shape
    wide = max(4, power_of_two(d))
    burdens = _burdens(p) + (r > 16)
    if burdens == 0 and warpgroups:
        block, stages = 64, 2
    else:
        # With fewer rows than columns the warps share out the columns, and none repeats another's products.
        block, stages = 16, max(1, 3 - burdens)
    # One slab a program where that is possible: then many slots can go chunk by chunk.
    slab = 64 if burdens == 0 and -(-d // 32) * groups > resident else 32
    slab = 16 if r > 32 and not warpgroups else slab
    if d <= MAX_ROWS_D and r <= MAX_ROWS_RANK and slots < MANY_SLOTS:
        method, rows, columns, fetched = "rows", min(4, HELD_ROWS // wide), wide, 2 if wide <= 8192 else 1
        warps = 8
    else:
        method, rows, columns, fetched = "tiles", 16, min(128 >> min(burdens, 2), max(16, wide)), 2
        warps = 8 if burdens < 2 and slab > 16 else 4
    return BackwardConfig(method, rows, columns, block, slab, SLAB_STAGES=stages, STAGES=fetched, num_warps=warps)


def _burdens(p: EditProblem) -> int:
    """How many things make an edit's tiles need more registers: three-term products, f and dropout."""
    return (p.h.dtype != torch.bfloat16) + (p.activation != "linear") + (p.dropout > 0)


def padded_rank(config: Config, r: int) -> int:
    """r padded to the blocks that a kernel makes of it: ``tl.dot`` takes no fewer than 16."""
    dots = isinstance(config, BackwardConfig) or config.METHOD == "tiles"
    return max(16, power_of_two(r)) if dots else power_of_two(r)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()

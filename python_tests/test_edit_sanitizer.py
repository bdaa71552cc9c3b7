"""Every address that the kernels touch is one of an operand's elements, and no two programs of a launch race for one.

For each launch the operands move into an arena, each into a region of its own with wide empty margins, and every load
and store of the interpreter is looked up there: it must fall on an element of the tensor whose region it falls into
(not only into its storage: what lies between the rows of a slice is out of bounds), and may store only where the kernel
has something to deliver. Programs that a GPU runs at once are taken in turn by the interpreter, so each element also
remembers who has touched it: one that a program stores to, no other program of the launch may touch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from test_edit_mutants import BACKWARD, COMMON, FORWARD, survivors
from torch import Tensor
from triton.runtime import interpreter

REGION = 32 * 2**20
DELIVERED = {
    "edit_forward_kernel": {"y_ptr", "delta_ptr", "s_ptr", "before_ptr"},
    "edit_backward_kernel": {"grad_ptr", "gd_ptr", "gs_ptr", "dR_ptr", "dW_ptr", "db_ptr", "dc_ptr"},
}
NOBODY, SEVERAL = -1, -2


class Region:
    """The memory of one storage in the arena, byte by byte: what may be read and written, and who has."""

    def __init__(self, arena: Tensor, number: int, storage: Any) -> None:
        self.names: list[str] = []
        self.storage = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.start = number * REGION + REGION // 2
        size = self.storage.numel()
        assert size < REGION // 4
        self.memory = arena[self.start : self.start + size]
        self.memory.copy_(self.storage)
        self.readable, self.writable = (torch.zeros(size, dtype=torch.bool) for _ in range(2))
        self.reader, self.writer = (np.full(size, NOBODY, dtype=np.int32) for _ in range(2))

    def moved(self, name: str, tensor: Tensor, arena: Tensor, delivered: bool) -> Tensor:
        """The tensor in the arena; its elements may now be read, and written if the kernel delivers them there."""
        self.names.append(name)
        size = tensor.element_size()
        for allowed in (self.readable, self.writable) if delivered else (self.readable,):
            elements = allowed[: allowed.numel() // size * size].view(-1, size)
            elements.as_strided(
                (*tensor.shape, size), (*(s * size for s in tensor.stride()), 1), tensor.storage_offset() * size
            ).fill_(True)
        assert self.start % size == 0
        offset = self.start // size + tensor.storage_offset()
        return torch.empty(0, dtype=tensor.dtype).set_(arena.untyped_storage(), offset, tensor.shape, tensor.stride())


class Arena:
    """The operands of one launch."""

    def __init__(self, kernel: str, operands: Mapping[str, Tensor]) -> None:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in operands.values() if t.numel()}
        self.memory = torch.empty(max(1, len(storages)) * REGION, dtype=torch.uint8)
        self.regions = [Region(self.memory, number, storage) for number, storage in enumerate(storages.values())]
        of_storage = dict(zip(storages, self.regions, strict=True))
        self.moved = {
            name: of_storage[t.untyped_storage().data_ptr()].moved(name, t, self.memory, name in DELIVERED[kernel])
            for name, t in operands.items()
            if t.numel()
        }

    def return_home(self) -> None:
        """What the launch has stored goes where the operands were."""
        for region in self.regions:
            region.storage.copy_(region.memory)

    def check(self, action: str, pointers: Any, mask: Any) -> None:
        """Fails if an address may not be touched.

        Raises:
            IndexError: it is no element of an operand, or none that may be written.
            RuntimeError: another program of this launch writes it, or this one writes what another has touched.
        """
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        program = interpreter.interpreter_builder.grid_idx[0]
        places = addresses - self.memory.data_ptr()
        numbers = places // REGION
        for number in np.unique(numbers):
            offsets = places[numbers == number]
            if not 0 <= number < len(self.regions):
                raise IndexError(f"program {program} {action}s far from every operand")
            region = self.regions[number]
            offsets = offsets - region.start
            allowed = (region.writable if action == "store" else region.readable).numpy()
            inside = (offsets >= 0) & (offsets + width <= len(allowed))
            if not inside.all():
                raise IndexError(f"program {program} {action}s outside {region.names}, byte {offsets[~inside][0]}")
            touched = (offsets[:, None] + np.arange(width)).reshape(-1)
            if not allowed[touched].all():
                raise IndexError(f"program {program} {action}s between the elements of {region.names}")
            for others in (region.writer, region.reader) if action == "store" else (region.writer,):
                if not np.isin(others[touched], (NOBODY, program)).all():
                    raise RuntimeError(f"program {program} {action}s what another one touches, in {region.names}")
            if action == "store":
                region.writer[touched] = program
            else:
                known = region.reader[touched]
                region.reader[touched] = np.where((known == NOBODY) | (known == program), program, SEVERAL)


@contextmanager
def sanitized() -> Iterator[list[str]]:
    """Within the context every access of an interpreted kernel is checked; yields the names of those launched."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, execute = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launched: list[str] = []
    running: list[Arena] = []

    def __call__(self: Any, *positional: Any, **named: Any) -> Any:
        arguments = dict(zip(self.arg_names, positional, strict=False)) | named
        operands = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        arena = Arena(self.fn.__name__, operands)
        launched.append(self.fn.__name__)
        running.append(arena)
        try:
            execute(self, **{**arguments, **arena.moved})
        finally:
            running.pop()
        arena.return_home()

    def create_masked_load(self: Any, pointers: Any, mask: Any, *others: Any) -> Any:
        running[-1].check("load", pointers, mask)
        return load(self, pointers, mask, *others)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        running[-1].check("store", pointers, mask)
        return store(self, pointers, value, mask, *others)

    checked = {"create_masked_load": create_masked_load, "create_masked_store": create_masked_store}
    with mock.patch.multiple(builder, **checked), mock.patch.object(executor, "__call__", __call__):
        yield launched


def cases() -> list[tuple[Any, Any, dict[str, Any]]]:
    """Small edits along every path of the kernels."""
    from test_edit_kernels import FACTORS, matrix

    return matrix(
        6,
        {
            **FACTORS,
            "method": ("noreft_with_c", "consreft", "lobireft"),
            "activation": ("linear", "silu"),
            "dtype": ("float32", "mixed"),
            "layout": ("slice", "rows", "transposed"),
            "size": (((2, 5), 12, 4), ((1, 19), 33, 3), ((3, 4), 1, 1), ((2, 2), 21, 17)),
            "forward_n": (1, 4, 16),
            "forward_d": (16,),
            "rows_n": (1, 4, 16),
            "phase1_d": (16,),
            "slab_d": (16, 32),
            "programs": (1, 3, 40),
            "chunk": (None, 5, 16),
            "grad_layout": ("slice", "rows", "transposed"),
            "into": (None, torch.float32),
        },
    )


def check_memory() -> None:
    """All cases, under the sanitizer."""
    from test_edit_kernels import check

    from reft_kernels.testing import random_edit

    launched: set[str] = set()
    with sanitized() as names:
        for number, (case, path, how) in enumerate(cases()):
            torch.manual_seed(number)
            check(random_edit(case, seed=number), path, **how)
        launched |= set(names)
    assert launched == set(DELIVERED)


@pytest.mark.parametrize("number", range(len(cases())))
def test_no_access_out_of_bounds_and_no_race(number: int) -> None:
    from test_edit_kernels import check

    from reft_kernels.testing import random_edit

    case, path, how = cases()[number]
    print(case, path, how)  # shown where the test fails
    with sanitized() as launched:
        check(random_edit(case, seed=number), path, **how)
    assert set(launched) <= set(DELIVERED)


# Lines that read or write too much, most of them without a consequence for any result.
MUTANTS = [
    (FORWARD, ('METHOD == "weights"', "m_rd = m_r[:, None] & m_d[None, :]"),
     "m_rd = m_r[:, None] & (o_d[None, :] >= 0)"),
    (FORWARD, ('METHOD == "weights"', "m_h = o_d < tl.where(edited, d, 0)"), "m_h = o_d < tl.where(edited, d + 1, 0)"),
    (FORWARD, "tl.range(tl.program_id(0), N, tl.num_programs(0),", "tl.range(0, N,"),
    (FORWARD, "m_n = o_n < N", "m_n = o_n <= N"),
    (FORWARD, ("o_n = tl.program_id(0)", "tl.load(scale_ptr + o_scale, mask=m_edited,"),
     "tl.load(scale_ptr + o_scale, mask=o_n >= 0,"),
    (FORWARD, ('METHOD == "rows"', "k * d + o_d, mask=m_d,"), "k * d + o_d, mask=o_d >= 0,"),
    (FORWARD, ('METHOD == "rows"', "m_h = m_d & "), "m_h = (o_d < d + 1) & "),
    (FORWARD, ('METHOD == "tiles"', "m_rd = m_r[:, None] & m_d[None, :]"), "m_rd = m_r[:, None] & (o_d[None, :] >= 0)"),
    (FORWARD, ('METHOD == "tiles"', "mask=m_r[:, None] & m_d[None, :]"), "mask=(o_r >= 0)[:, None] & m_d[None, :]"),
    (FORWARD, ('METHOD == "tiles"', "m_u = m_own[:, None] & m_r[None, :]"),
     "m_u = m_own[:, None] & (o_r >= 0)[None, :]"),
    (COMMON, "i_s = tl.load(positions_ptr + o_position, mask=m_edited,",
     "i_s = tl.load(positions_ptr + o_position, mask=o_n >= 0,"),
    (COMMON, "i_g64 = tl.load(group_ptr + o_group, mask=m_edited,",
     "i_g64 = tl.load(group_ptr + o_group, mask=o_n >= 0,"),
    (BACKWARD, "end, tl.num_programs(0) * ROWS_N)", "end, ROWS_N)"),
    (BACKWARD, ('METHOD == "rows"', "mask=m_edited[:, None] & m_d, other=0)"),
     "mask=m_edited[:, None] & (o_d >= 0), other=0)"),
    (BACKWARD, ('METHOD == "rows"', "k * d + o_d, mask=m_d,"), "k * d + o_d, mask=o_d >= 0,"),
    (BACKWARD, "tl.load(s_ptr + o_u + k, mask=m_own,", "tl.load(s_ptr + o_u + k, mask=o_n >= 0,"),
    (BACKWARD, ('METHOD == "tiles"', "mask=m_r[:, None] & m_d[None, :]"), "mask=(o_r >= 0)[:, None] & m_d[None, :]"),
    (BACKWARD, ("N_SLABS", "b_A = tl.load(W_ptr + o_weights + o_rd, mask=m_rd,"),
     "b_A = tl.load(W_ptr + o_weights + o_rd, mask=m_r[:, None],"),
    (BACKWARD, "b_gd = tl.load(gd_ptr + o_nr, mask=m_nr,", "b_gd = tl.load(gd_ptr + o_nr, mask=m_n[:, None],"),
    (BACKWARD, "b_delta = tl.load(delta_ptr + o_nr, mask=m_nr,",
     "b_delta = tl.load(delta_ptr + o_nr, mask=m_n[:, None],"),
    (BACKWARD, "b_x = tl.load(x_rows + o_d[None, :], mask=m_nd,",
     "b_x = tl.load(x_rows + o_d[None, :], mask=m_n[:, None],"),
    (BACKWARD, ("N_SLABS", "b_g = tl.load(grad_rows + o_d[None, :], mask=m_nd,"),
     "b_g = tl.load(grad_rows + o_d[None, :], mask=m_n[:, None],"),
    (BACKWARD, "if i_slab == 0:", "if i_slab >= 0:"),
    (BACKWARD, "m_b = o_r < tl.where(i_item < n_items, r, 0)", "m_b = o_r < tl.where(i_item < n_items, r + 1, 0)"),
]  # fmt: skip


@pytest.mark.slow
def test_every_mutant_is_caught(tmp_path: Path) -> None:
    left = survivors(tmp_path, MUTANTS, "test_edit_sanitizer check_memory")
    assert not left, "these broken lines are not noticed:\n" + "\n".join(left)

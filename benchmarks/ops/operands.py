"""What an edit works on: sets of operands that share no row, to rotate among."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops.workloads import Workload


@dataclass(frozen=True)
class Operands:
    """One set. h and grad are shared with other sets, of which none names the same rows."""

    h: Tensor  # [B, S, d]
    grad: Tensor  # [B, S, d]
    R: Tensor  # [r, d], or [G, r, d]
    W: Tensor  # as R
    b: Tensor  # [r], or [G, r]
    positions: Tensor | None  # int64 [B, P]
    group: Tensor | None  # int64 [B, P], or [B, S]
    rows: Tensor  # int64 [N], of h.view(-1, d)


def make_sets(workload: Workload, count: int, device: torch.device, seed: int = 0) -> list[Operands]:
    """Draws ``count`` sets. R has orthonormal rows and W rows of length one: repeated edits in place stay bounded."""
    w = workload
    rng = torch.Generator(device).manual_seed(seed)
    h_dtype, p_dtype = getattr(torch, w.h), getattr(torch, w.params)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=rng, device=device, dtype=dtype)

    lead = (w.G,) if w.G > 1 else ()
    R0 = torch.linalg.qr(normal(*lead, w.d, w.r)).Q.mT.contiguous()
    W0 = normal(*lead, w.r, w.d) * w.d**-0.5
    batch = torch.arange(w.B, device=device)[:, None]
    per_buffer = w.S // w.P if w.P else 1
    sets: list[Operands] = []
    for i in range(count):
        if i % per_buffer == 0:
            h, grad = (normal(w.B, w.S, w.d, dtype=h_dtype) for _ in range(2))
            order = torch.rand(w.B, w.S, generator=rng, device=device).argsort(dim=1)  # a permutation in each row
        slot = i % per_buffer
        positions = order[:, slot * w.P : (slot + 1) * w.P].contiguous() if w.P else None
        slots = order.shape if positions is None else positions.shape
        sets.append(
            Operands(
                h=h,
                grad=grad,
                R=R0.roll(i, -1).to(p_dtype),  # columns in another order: still orthonormal, memory of its own
                W=W0.roll(i, -1).to(p_dtype),
                b=normal(*lead, w.r).to(p_dtype),
                positions=positions,
                group=_groups(w, slots, rng, device),
                rows=(batch * w.S + (torch.arange(w.S, device=device) if positions is None else positions)).reshape(-1),
            )
        )
    return sets


def _groups(w: Workload, slots: torch.Size, rng: torch.Generator, device: torch.device) -> Tensor | None:
    """Two groups are the prefix and the suffix of every row; more are adapters, one a batch row."""
    if w.G == 1:
        return None
    if w.G == 2:
        half = torch.arange(slots[1], device=device) >= slots[1] // 2
        return half.long().expand(slots).contiguous()
    return torch.randint(w.G, (slots[0], 1), generator=rng, device=device).expand(slots).contiguous()

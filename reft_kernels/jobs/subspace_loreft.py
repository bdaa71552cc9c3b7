"""LoReFT of which each example trains a part (paper, appendix G.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.interventions import LoreftIntervention


class SubspaceLoreftIntervention(LoreftIntervention):
    """y = h + Rᵀ m ∘ (f(W h + b) − R h), where m is 1 in the dimensions that an example names and 0 in the others.

    Without subspaces all dimensions edit, as LoreftIntervention's do (in one fused edit). Arguments are
    LoreftIntervention's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        """h [B, P, d] to the same; `subspaces` is one list of dimensions an example, [B, k], or None for all."""
        if subspaces is None:
            return super().forward(base, source, subspaces)
        weight: Tensor = self.rotate_layer.weight  # [d, r]
        named = torch.as_tensor(subspaces, device=weight.device)
        mask = torch.zeros(len(named), weight.shape[1], dtype=weight.dtype, device=weight.device)
        mask = mask.scatter(1, named, 1.0).unsqueeze(1)
        h = base.to(weight.dtype)
        parts: Any = self
        edited: Tensor = h + mask * (parts.act_fn(parts.learned_source(h)) - h @ weight) @ weight.T
        dropped: Tensor = parts.dropout(edited.to(base.dtype))
        return dropped

"""LoReFT of which each example trains a part (paper, appendix G.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.functional import edit
from reft_kernels.interventions import LoreftIntervention


class SubspaceLoreftIntervention(LoreftIntervention):
    """y = h + Rᵀ m ∘ (f(W h + b) − R h), where m is 1 in the dimensions that an example names and 0 in the others.

    Without subspaces all dimensions edit, as LoreftIntervention's do (in one fused edit). Arguments are
    LoreftIntervention's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        """h [B, P, d] to the same; `subspaces` is one list of different dimensions an example, [B, k], or None for all.

        One edit of rank k, where each example has a weight group of its own: the rows of its dimensions.
        """
        if subspaces is None:
            return super().forward(base, source, subspaces)
        if not self.is_fused:
            return self._masked_edit(base, subspaces)
        weights = self.edit_weights()
        named = torch.as_tensor(subspaces, device=weights.R.device)  # [B, k]
        examples = torch.arange(len(named), device=base.device).unsqueeze(1).expand(base.shape[:2])  # [B, P]
        R, W, b = (None if w is None else w[named] for w in (weights.R, weights.W, weights.b))
        assert R is not None
        return edit(base, R, W, b, group=examples, activation=weights.activation, dropout=weights.dropout)

    def _masked_edit(self, h: Tensor, subspaces: Any) -> Tensor:
        """The same by the parts' own calls, for any f."""
        parts: Any = self
        weight: Tensor = parts.rotate_layer.weight  # [d, r]
        named = torch.as_tensor(subspaces, device=weight.device)
        mask = torch.zeros(len(named), weight.shape[1], dtype=weight.dtype, device=weight.device)
        mask = mask.scatter(1, named, 1.0).unsqueeze(1)
        wide = h.to(weight.dtype)
        edited: Tensor = wide + mask * (parts.act_fn(parts.learned_source(wide)) - wide @ weight) @ weight.T
        dropped: Tensor = parts.dropout(edited.to(h.dtype))
        return dropped

"""RED, the edit that the paper compares itself with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RedIntervention(nn.Module):
    """y = s ∘ h + b at every token (RED, arXiv:2402.15179; paper, section 3.3), starting from the identity.

    Args:
        embed_dim: d. s [d] and b [d] are float32, whatever the dtype of h.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.s = nn.Parameter(torch.ones(embed_dim))
        self.b = nn.Parameter(torch.zeros(embed_dim))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, as a checkpoint keeps them."""
        return {"embed_dim": self.embed_dim}

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None) -> Tensor:
        """h [..., d] to [..., d]."""
        return (self.s * base.to(self.s.dtype) + self.b).to(base.dtype)

"""The LoReFT edit as pyreft 0.1.0 on pyvene 0.1.8 computes it, written anew: the peer in timings.

What it does per intervened layer and forward, as they do:

- R [d, r] is a `torch.nn.utils.parametrizations.orthogonal` weight, evaluated at each of its three accesses;
- W, b are an `nn.Linear` in `dtype`, R is fp32 whatever `dtype` is; the difference is taken in the wider of
  the two and the result cast back;
- the layer's output is cloned whole, the rows to edit are gathered with an index made from Python lists at
  each call, and the edited rows are written back in place by advanced indexing.

What it leaves out: pyvene's walk over all modules to strip hooks (twice per forward), its registration of
closures at each forward and its checks. Its times are therefore a lower bound of pyreft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class RotateLayer(nn.Module):
    """x [.., d] -> x R [.., r]; the weight is read twice, the first time for its dtype alone."""

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d, r))
        nn.init.orthogonal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype) @ self.weight


class PeerLoreft(nn.Module):
    """y = h + (W h + b - h R) Rᵀ for rows h [.., d], with R [d, r] orthonormal columns."""

    def __init__(self, d: int, r: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.rotate_layer = nn.utils.parametrizations.orthogonal(RotateLayer(d, r))
        self.learned_source = nn.Linear(d, r, dtype=dtype)

    def forward(self, base: Tensor) -> Tensor:
        rotated = self.rotate_layer(base)
        edited = base + (self.learned_source(base) - rotated) @ self.rotate_layer.weight.T
        result: Tensor = edited.to(base.dtype)
        return result


class Peer(nn.Module):
    """One `PeerLoreft` on the output of each of `layers` of a transformers decoder, by forward hooks.

    `positions`, a list [B][P] of token positions, says which rows the next forwards edit; None edits nothing.
    One-token forwards (the steps of a cached generation) are left alone.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[int],
        rank: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        width = model.config.hidden_size
        blocks = model.model.layers
        self.edits = nn.ModuleList([PeerLoreft(width, rank, dtype) for _ in layers])
        self.positions: list[list[int]] | None = None
        self._handles = [
            blocks[layer].register_forward_hook(self._hook(edit))
            for layer, edit in zip(layers, self.edits, strict=True)
        ]

    def remove(self) -> None:
        """Takes the hooks off the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, edit: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden: Tensor = output[0] if isinstance(output, tuple) else output
            if self.positions is not None and hidden.shape[1] > 1:
                write_back(hidden, edit(gather(hidden, self.positions)), self.positions)

        return hook


def gather(hidden: Tensor, positions: list[list[int]]) -> Tensor:
    """Rows [B, P, d] of hidden [B, S, d], taken from a clone of all of it."""
    index = torch.tensor(positions, device=hidden.device)
    return torch.gather(hidden.clone(), 1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))


def write_back(hidden: Tensor, rows: Tensor, positions: list[list[int]]) -> None:
    """hidden[b, positions[b]] = rows[b], in place."""
    index = torch.tensor(positions, device=hidden.device)
    batch = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(-1)
    hidden[batch, index] = rows

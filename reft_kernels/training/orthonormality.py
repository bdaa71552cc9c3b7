"""How far the rows of every R are from orthonormal, in the Trainer's logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reft_kernels.model import ReftModel
from reft_kernels.orthogonal import shared_rows
from reft_kernels.rotate_layer import orthonormal_parts
from reft_kernels.training.log_values import LogValues
from reft_kernels.training.sharding import whole_outside_of_blocks

NAME = "orthonormality_error"


@torch.no_grad()
def orthonormality_error(reft_model: ReftModel) -> Tensor | None:
    """The largest entry of |R R^T - I| over the interventions whose R is to have orthonormal rows.

    Returns a float64 scalar on the device of the first R, for which nothing has been waited; None where there is no
    such R. It is as large as it may get where `orthogonality="none"` leaves R free.
    """
    modules = list(reft_model.interventions.values())
    worst: list[Tensor] = []
    with shared_rows(orthonormal_parts(modules)):
        for module in modules:
            weight = getattr(getattr(module, "rotate_layer", None), "weight", None)
            if not isinstance(weight, Tensor) or weight.dim() != 2:
                continue
            R = weight.detach().T  # [r, d]
            wide = R if R.device.type == "mps" else R.double()
            eye = torch.eye(wide.shape[0], dtype=wide.dtype, device=wide.device)
            worst.append((wide @ wide.T - eye).abs().max())
    if not worst:
        return None
    return torch.stack([error.to(worst[0].device, non_blocking=True) for error in worst]).max()


class Orthonormality(LogValues):
    """A callback of ReftTrainer that logs `orthonormality_error`, max |R R^T - I| over all R, in training logs.

    It is computed when a log is made and at no other step. A model without an R that is to have orthonormal rows has
    no such entry.
    """

    def log_values(self, args: Any, state: Any, model: Any) -> dict[str, float]:
        """See the class."""
        with whole_outside_of_blocks(model):
            error = orthonormality_error(model)
        return {} if error is None else {NAME: float(error)}

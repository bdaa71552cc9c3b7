"""LoReFT in the dimensions that each example names: the paper's formula example by example, and its gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import reft_kernels.jobs.subspace_loreft
from reft_kernels.jobs.subspace_loreft import SubspaceLoreftIntervention

BATCH, POSITIONS, D, R = 4, 3, 24, 6
SUBSPACES = [[0, 1], [2, 5], [5, 2], [3, 4]]


def made(**options: Any) -> SubspaceLoreftIntervention:
    torch.manual_seed(0)
    wanted = {"embed_dim": D, "low_rank_dimension": R, "dtype": torch.float64} | options
    intervention = SubspaceLoreftIntervention(**wanted).double()
    nn.init.normal_(intervention.learned_source.bias)
    return intervention


def by_the_formula(one: Any, h: Tensor, subspaces: list[list[int]]) -> Tensor:
    R, W, b = one.rotate_layer.weight.T, one.learned_source.weight, one.learned_source.bias
    rows = []
    for example, named in zip(h, subspaces, strict=True):
        delta = one.act_fn(example @ W[named].T + b[named]) - example @ R[named].T
        rows.append(example + delta @ R[named])
    return torch.stack(rows)


@pytest.mark.parametrize("act_fn", [None, "relu", "gelu", "silu", "tanh", "mish"])
@pytest.mark.parametrize("orthogonality", ["householder", "polar", "none"])
def test_each_example_is_edited_in_its_dimensions(act_fn: str | None, orthogonality: str) -> None:
    intervention = made(act_fn=act_fn, orthogonality=orthogonality)
    h = torch.randn(BATCH, POSITIONS, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(BATCH, POSITIONS, D, dtype=torch.float64)
    inputs = [h, *intervention.parameters()]
    found, wanted = intervention(h, None, SUBSPACES), by_the_formula(intervention, h, SUBSPACES)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs), torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_it_is_one_fused_edit() -> None:
    intervention = made()
    h = torch.randn(BATCH, POSITIONS, D, dtype=torch.float64)
    with mock.patch.object(
        reft_kernels.jobs.subspace_loreft, "edit", wraps=reft_kernels.jobs.subspace_loreft.edit
    ) as edit:
        intervention(h, None, torch.tensor(SUBSPACES))
    assert edit.call_count == 1
    assert edit.call_args.args[1].shape == (BATCH, 2, D)


def test_all_dimensions_are_loreft() -> None:
    intervention = made()
    h = torch.randn(BATCH, POSITIONS, D, dtype=torch.float64)
    everything = [list(range(R))] * BATCH
    torch.testing.assert_close(intervention(h, None, everything), intervention(h))


@pytest.mark.parametrize("act_fn", [None, "mish"])
def test_dropout_is_of_training_alone(act_fn: str | None) -> None:
    intervention = made(dropout=0.5, act_fn=act_fn)
    h = torch.randn(BATCH, POSITIONS, D, dtype=torch.float64)
    share = (intervention(h, None, SUBSPACES) == 0).double().mean()
    assert 0.3 < share < 0.7
    intervention.eval()
    torch.testing.assert_close(intervention(h, None, SUBSPACES), by_the_formula(intervention, h, SUBSPACES))


def test_half_precision_hidden_states() -> None:
    intervention = made(dtype=torch.float32).float()
    h = torch.randn(BATCH, POSITIONS, D)
    found = intervention(h.bfloat16(), None, SUBSPACES)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), by_the_formula(intervention, h.bfloat16().float(), SUBSPACES),
                               rtol=1e-2, atol=1e-2)  # fmt: skip

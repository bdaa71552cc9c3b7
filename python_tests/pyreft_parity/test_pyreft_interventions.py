"""Each intervention class against the stock class of the same name: outputs, gradients, training, dropout."""

from __future__ import annotations

from typing import Any

import pyreft
import pytest
import torch
from peer import (
    ACT_FNS,
    CLASSES,
    CONSTRAINED,
    WITH_PROJ,
    WITH_W,
    assert_as_exact_as,
    assert_equal_within,
    forward_backward,
    largest,
    leaves,
    oracle,
    ours_like,
    pair,
    settings,
    stock,
    stock_gradient_of_rotation,
    weights,
)
from torch import Tensor, nn

import reft_kernels
from reft_kernels import functional

# (embed_dim, rank, leading shape): pyvene gives [B, P, d]; 37 and 3 are multiples of no tile.
SHAPES = ((64, 4, (3, 7)), (37, 3, (2, 5)), (576, 8, (4, 14)), (48, 1, (5, 3)), (48, 4, (1, 1)))

# Relative to the largest entry (of all gradients: a small one, say that of a single bias, is a sum of large
# terms). Both sides sum in fp32, in different orders.
FP32_FORWARD = 2e-6
FP32_BACKWARD = 4e-6


def variants() -> list[Any]:
    """Every class with each option that the stock class has."""
    listed = []
    for name in CLASSES:
        for act_fn in ACT_FNS if name in WITH_W else (None,):
            for add_bias in (False, True) if name in WITH_PROJ else (None,):
                options: dict[str, Any] = {} if act_fn is None else {"act_fn": act_fn}
                options |= {} if add_bias is None else {"add_bias": add_bias}
                words = [name.removesuffix("Intervention"), act_fn or "linear"]
                listed.append(pytest.param(name, options, id="-".join([*words, *["bias"] * bool(add_bias)])))
    return listed


def inputs(shape: tuple[int, ...], d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """base and upstream gradient."""
    return torch.randn(*shape, d).to(dtype), torch.randn(*shape, d).to(dtype)


def gradient_of_rotation(ours: nn.Module, base: Tensor, upstream: Tensor) -> Tensor:
    """dL/dR [r, d] of our edit with the operands that `ours` gives it."""
    edit = ours.edit_weights()
    R = edit.R.detach().clone().requires_grad_()
    options = {"c": edit.c, "subtract": edit.subtract, "activation": edit.activation}
    (gradient,) = torch.autograd.grad(functional.edit(base, R, edit.W, edit.b, **options), R, upstream)
    return gradient


@pytest.mark.parametrize(("d", "r", "shape"), SHAPES)
@pytest.mark.parametrize(("name", "options"), variants())
def test_output_and_gradients_in_fp32(
    name: str, options: dict[str, Any], d: int, r: int, shape: tuple[int, ...]
) -> None:
    theirs, ours = pair(name, d, r, **options)
    base, upstream = inputs(shape, d)
    before = base.clone()
    expected, expected_gradients = forward_backward(theirs, base, upstream)
    actual, actual_gradients = forward_backward(ours, base, upstream)
    assert torch.equal(base, before)
    if shape[0] > 1:  # a single row may meet a relu that is off
        assert largest(expected - base) > 1e-4
    assert_equal_within(actual, expected, FP32_FORWARD, "output")
    assert actual_gradients.keys() == expected_gradients.keys()
    scale = largest(*expected_gradients.values())
    for leaf, gradient in expected_gradients.items():
        assert_equal_within(actual_gradients[leaf], gradient, FP32_BACKWARD, f"gradient of {leaf}", scale)


@pytest.mark.parametrize(("d", "r", "shape"), SHAPES)
@pytest.mark.parametrize("name", CONSTRAINED)
def test_gradient_of_the_rotation(name: str, d: int, r: int, shape: tuple[int, ...]) -> None:
    """dL/dR before any parametrisation of R."""
    theirs, ours = pair(name, d, r)
    base, upstream = inputs(shape, d)
    expected = stock_gradient_of_rotation(theirs, base, upstream)
    actual = gradient_of_rotation(ours, base, upstream)
    assert_equal_within(actual, expected, FP32_BACKWARD, "dL/dR", largest(expected, upstream))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", CONSTRAINED)
def test_sgd_moves_the_rotation_alike(name: str, trained: bool, momentum: float) -> None:
    """The same R after each SGD step, though the two sides complete R to a d x d base differently.

    A completion B of R is free up to an orthogonal map O of the last d - r coordinates: B diag(I, O). The
    gradient of X then turns by O^T, so does X under any linear optimiser, and R = B Q(X) stays what it was.
    Adam is not linear: two stock interventions with one R and two random completions part after one step of
    it, so there is nothing to match.

    Both sides start from X = -I, where R is the first r columns of the base.
    """
    d, r = 48, 4
    theirs = stock(name, d, r, moved=trained)
    if trained:
        rotation = theirs.rotate_layer.weight.detach().clone()
        theirs.rotate_layer.weight = rotation  # torch bases the parametrisation on an assigned value
        assert_equal_within(theirs.rotate_layer.weight.detach(), rotation, 1e-6, "stock's own assignment")
    ours = ours_like(theirs)
    base, target = inputs((4, 6), d)
    start = weights(theirs)["rotate_layer.weight"]
    optimizers = [torch.optim.SGD(side.parameters(), lr=0.2, momentum=momentum) for side in (theirs, ours)]
    for step in range(6):
        losses = []
        for side, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            loss = (side(base) - target).square().sum() / 24
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert_equal_within(losses[1], losses[0], 1e-5, f"loss of step {step}")
        R, expected = (weights(side)["rotate_layer.weight"] for side in (ours, theirs))
        assert_equal_within(R, expected, 5e-5, f"R after step {step}")
    assert float((expected - start).norm()) > 0.3
    assert_equal_within(R.T @ R, torch.eye(r), 1e-5, "R^T R")
    assert_equal_within(ours(base).detach(), theirs(base).detach(), 1e-4, "output")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("name", "options"), variants())
def test_half_precision_is_as_exact(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """base, W and b in half precision beside an fp32 R, pyreft's default mix: no further from the fp64
    result than stock is, up to a factor.
    """
    d, r, shape = 192, 8, (8, 16)
    theirs, ours = pair(name, d, r, dtype=dtype, **options)
    base, upstream = inputs(shape, d, dtype)
    exact, exact_gradients = oracle(theirs, base, upstream, options.get("act_fn"))
    expected, expected_gradients = forward_backward(theirs, base, upstream)
    actual, actual_gradients = forward_backward(ours, base, upstream)
    assert_as_exact_as(actual, expected, exact, "output", factor=2)
    for leaf, gradient in expected_gradients.items():
        what, judge = f"gradient of {leaf}", exact_gradients[leaf]
        assert_as_exact_as(actual_gradients[leaf], gradient, judge, what, factor=3)


@pytest.mark.parametrize("name", CONSTRAINED)
def test_half_precision_gradient_of_the_rotation(name: str) -> None:
    theirs, ours = pair(name, 192, 8, dtype=torch.bfloat16)
    base, upstream = inputs((8, 16), 192, torch.bfloat16)
    expected = stock_gradient_of_rotation(theirs, base, upstream)
    actual = gradient_of_rotation(ours, base, upstream)
    exact = oracle(theirs, base, upstream, None)[1]["rotation"]
    assert_as_exact_as(actual, expected, exact, "dL/dR", factor=3)


@pytest.mark.parametrize("name", CLASSES)
def test_dtypes_of_the_bf16_mix(name: str) -> None:
    """W and b take `dtype`; R of the constrained classes and the vector of ConsReFT and LobiReFT stay fp32."""
    theirs, ours = pair(name, 32, 4, dtype=torch.bfloat16)
    expected = {key: value.dtype for key, value in weights(theirs).items()}
    assert (torch.bfloat16 in expected.values()) == (name in WITH_W)
    assert (torch.float32 in expected.values()) == (name in CONSTRAINED)
    assert {key: value.dtype for key, value in weights(ours).items()} == expected


def test_direft_casts_an_fp32_base() -> None:
    """The one stock class that takes an fp32 base with bf16 weights. It rounds the base; we need not."""
    theirs, ours = pair("DireftIntervention", 96, 4, dtype=torch.bfloat16, act_fn="gelu")
    base, upstream = inputs((4, 8), 96)
    exact, exact_gradients = oracle(theirs, base, upstream, "gelu")
    expected, expected_gradients = forward_backward(theirs, base, upstream)
    actual, actual_gradients = forward_backward(ours, base, upstream)
    assert_as_exact_as(actual, expected, exact, "output", factor=2)
    for leaf, gradient in expected_gradients.items():
        what, judge = f"gradient of {leaf}", exact_gradients[leaf]
        assert_as_exact_as(actual_gradients[leaf], gradient, judge, what, factor=3)


@pytest.mark.filterwarnings("ignore:.*no effect of dropout")
@pytest.mark.parametrize("name", CLASSES)
def test_dropout_falls_on_the_whole_edited_state(name: str) -> None:
    """Every entry is 0 or the edited entry / (1 - p): base and edit are dropped together.

    ConsReFT has no dropout; stock ignores the keyword.
    """
    p = 0.25
    theirs = stock(name, 64, 4)
    edited = theirs(base := torch.randn(16, 8, 64)).detach()
    dropping = ours_like(theirs, dropout=p)
    assert_equal_within(dropping.eval()(base).detach(), edited, FP32_FORWARD, "output in evaluation mode")
    dropping.train()
    output = dropping(base).detach()
    stock_output = stock(name, 64, 4, dropout=p).train()(base)
    kept, kept_by_stock = output != 0, stock_output != 0
    if name == "ConsreftIntervention":
        assert kept_by_stock.all()
        assert_equal_within(output, edited, FP32_FORWARD, "output")
        return
    for fraction in (kept_by_stock.double().mean(), kept.double().mean()):
        # 8,192 draws: five standard deviations of the mean are 0.024.
        assert float(fraction) == pytest.approx(1 - p, abs=0.024)
    assert_equal_within(output[kept], edited[kept] / (1 - p), FP32_FORWARD, "kept entries")


@pytest.mark.filterwarnings("ignore:.*no effect of act_fn")
@pytest.mark.parametrize("name", ["ConsreftIntervention", "LobireftIntervention"])
def test_classes_without_an_activation_ignore_the_keyword(name: str) -> None:
    theirs = stock(name, 32, 4, act_fn="relu")
    ours = ours_like(theirs, act_fn="relu")
    base = torch.randn(2, 5, 32)
    assert_equal_within(ours(base).detach(), theirs(base).detach(), FP32_FORWARD, "output")


@pytest.mark.parametrize("name", CLASSES)
def test_fresh_interventions_are_drawn_alike(name: str) -> None:
    """Parameters of stock's shapes, count and initial spread: a recipe's learning rate means the same."""
    d, r = 512, 8
    options = settings(name, d, r, **({"add_bias": True} if name == "NoreftIntervention" else {}))
    theirs, ours = (getattr(package, name)(**options) for package in (pyreft, reft_kernels))
    counts = [sum(p.numel() for p in side.parameters() if p.requires_grad) for side in (theirs, ours)]
    assert counts[1] == counts[0]
    expected, actual = weights(theirs), weights(ours)
    assert {key: value.shape for key, value in actual.items()} == {key: value.shape for key, value in expected.items()}
    for key, value in expected.items():
        if value.numel() == d * r:
            # 4,096 draws: either spread is known to about 1 %, the mean to 0.016 standard deviations.
            assert float(actual[key].std()) == pytest.approx(float(value.std()), rel=0.05), key
            assert abs(float(actual[key].mean())) < 0.1 * float(value.std()), key
        elif name in WITH_W:  # the bias of nn.Linear, uniform in +-1/sqrt(d)
            assert 0 < float(actual[key].abs().max()) <= d**-0.5, key
        else:  # torch.rand
            assert 0 <= float(actual[key].min()) < float(actual[key].max()) < 1, key


@pytest.mark.parametrize(("d", "r"), [(64, 4), (576, 8), (1024, 8)])
@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "moved"])
def test_rotation_is_as_orthonormal(d: int, r: int, moved: bool) -> None:
    """|R^T R - I|, summed in fp64: ours is no further from orthonormal than stock's."""
    errors = []
    for side in (stock("LoreftIntervention", d, r), reft_kernels.LoreftIntervention(embed_dim=d, low_rank_dimension=r)):
        if moved:
            with torch.no_grad():
                for parameter in side.rotate_layer.parameters():
                    parameter.add_(torch.randn(d, r).tril(-1), alpha=0.1)
        R = side.rotate_layer.weight.detach().double()
        errors.append(float((R.T @ R - torch.eye(r)).abs().max()))
    assert errors[1] <= 2 * errors[0] + 2**-22, f"{errors[1]:.2e}, stock {errors[0]:.2e}"


@pytest.mark.parametrize("name", CLASSES)
def test_the_oracle_is_what_stock_computes(name: str) -> None:
    """The fp64 reference against stock in fp32: checks the judge of the half-precision tests."""
    theirs = stock(name, 64, 4)
    base, upstream = inputs((3, 7), 64)
    exact, exact_gradients = oracle(theirs, base, upstream, None)
    actual, gradients = forward_backward(theirs, base, upstream)
    if name in CONSTRAINED:
        gradients["rotation"] = stock_gradient_of_rotation(theirs, base, upstream)
    assert gradients.keys() == exact_gradients.keys()
    assert_equal_within(actual.double(), exact, FP32_FORWARD, "output")
    scale = largest(*gradients.values())
    for leaf, gradient in gradients.items():
        judge = exact_gradients[leaf]
        assert_equal_within(gradient.double(), judge, FP32_BACKWARD, f"gradient of {leaf}", scale)
    assert leaves(theirs).keys() < gradients.keys()

"""The two sides of every comparison: stock pyreft's modules and ours, with the same weights.

Stock pyreft is used as published; weights go from it to ours through public attributes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyreft
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import reft_kernels
from reft_kernels import reference

CLASSES = (
    "LoreftIntervention",
    "NoreftIntervention",
    "ConsreftIntervention",
    "LobireftIntervention",
    "DireftIntervention",
    "NodireftIntervention",
)
CONSTRAINED = ("LoreftIntervention", "ConsreftIntervention", "LobireftIntervention", "DireftIntervention")
WITH_W = ("LoreftIntervention", "NoreftIntervention", "DireftIntervention", "NodireftIntervention")
WITH_PROJ = ("NoreftIntervention", "NodireftIntervention")
SUBTRACTING = ("LoreftIntervention", "NoreftIntervention", "ConsreftIntervention")
ACT_FNS = (None, "relu", "gelu", "silu", "tanh")


def settings(name: str, d: int, r: int, dtype: torch.dtype = torch.float32, **others: Any) -> dict[str, Any]:
    """Constructor keywords for both sides; `add_bias`, which pyreft demands of two classes, is False."""
    if name in WITH_PROJ:
        others.setdefault("add_bias", False)
    return {"embed_dim": d, "low_rank_dimension": r, "dtype": dtype, **others}


def stock(name: str, d: int, r: int, *, moved: bool = True, **others: Any) -> nn.Module:
    """A stock intervention. `moved`: its R is away from the initial value, as after some training."""
    module: nn.Module = getattr(pyreft, name)(**settings(name, d, r, **others))
    if moved and name in CONSTRAINED:
        original = module.rotate_layer.parametrizations.weight.original
        with torch.no_grad():
            # The strict lower triangle alone: the diagonal holds signs, the rest has no effect.
            original.add_(torch.randn_like(original).tril(-1), alpha=0.3)
    return module


def ours_like(theirs: nn.Module, **others: Any) -> nn.Module:
    """Our intervention of the same class with the weights of `theirs`; `others` are constructor keywords."""
    name = type(theirs).__name__
    ours: nn.Module = getattr(reft_kernels, name)(**settings(name, int(theirs.embed_dim), rank_of(theirs), **others))
    copy_weights(theirs, ours)
    return ours


def rank_of(theirs: nn.Module) -> int:
    if hasattr(theirs, "proj_layer"):
        return int(theirs.proj_layer.weight.shape[0])
    return int(theirs.rotate_layer.weight.shape[1])


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    if hasattr(theirs, "rotate_layer"):
        ours.rotate_layer.weight = theirs.rotate_layer.weight.detach().clone()
    for name in ("learned_source", "proj_layer"):
        source = getattr(theirs, name, None)
        if isinstance(source, nn.Linear):
            target = getattr(ours, name)
            target.weight.copy_(source.weight)
            if f"{name}.bias" in leaves(theirs):
                target.bias.copy_(source.bias)
        elif source is not None:
            getattr(ours, name).copy_(source)


def pair(name: str, d: int, r: int, *, moved: bool = True, **others: Any) -> tuple[nn.Module, nn.Module]:
    """(stock, ours) with equal weights."""
    theirs = stock(name, d, r, moved=moved, **others)
    return theirs, ours_like(theirs, **others)


def leaves(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that both sides share by name; R of a constrained class is not among them.

    Nor is the bias that `add_bias` gives to stock's NodiReFT, which no output depends on; ours has none.
    """
    named = {}
    for name in ("learned_source", "proj_layer"):
        part = getattr(module, name, None)
        if isinstance(part, nn.Linear):
            named[f"{name}.weight"] = part.weight
            unused = (type(module).__name__, name) == ("NodireftIntervention", "proj_layer")
            if part.bias is not None and not unused:
                named[f"{name}.bias"] = part.bias
        elif part is not None:
            named[name] = part
    return named


def weights(module: nn.Module) -> dict[str, Tensor]:
    """`leaves`, and R [d, r] as "rotate_layer.weight" where the class has one."""
    named = leaves(module)
    if hasattr(module, "rotate_layer"):
        named["rotate_layer.weight"] = module.rotate_layer.weight
    return {name: value.detach().clone() for name, value in named.items()}


def forward_backward(module: nn.Module, base: Tensor, upstream: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients by name: "base" and `leaves`."""
    base = base.detach().clone().requires_grad_()
    output = module(base)
    inputs = {"base": base, **leaves(module)}
    found = torch.autograd.grad(output, list(inputs.values()), upstream)
    return output.detach(), dict(zip(inputs, found, strict=True))


def stock_gradient_of_rotation(theirs: nn.Module, base: Tensor, upstream: Tensor) -> Tensor:
    """dL/dR [r, d] of a stock constrained class, R being the one matrix that all its accesses share."""
    with parametrize.cached():
        rotation = theirs.rotate_layer.weight
        (gradient,) = torch.autograd.grad(theirs(base), rotation, upstream)
    return gradient.T


def oracle(theirs: nn.Module, base: Tensor, upstream: Tensor, act_fn: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients in fp64, with the names of `leaves` and "rotation" for dL/dR [r, d].

    What each class computes is written here from pyreft/interventions.py, not taken from our classes.
    """
    name = type(theirs).__name__
    source = theirs.learned_source
    R = theirs.proj_layer.weight if name in WITH_PROJ else theirs.rotate_layer.weight.T
    W, b = (source.weight, source.bias) if name in WITH_W else (None, source)
    c = theirs.proj_layer.bias if name == "NoreftIntervention" else None
    R, W, b, c = (None if t is None else t.detach().double() for t in (R, W, b, c))
    activation = (act_fn if name in WITH_W else None) or "linear"
    options = {"c": c, "subtract": name in SUBTRACTING, "activation": activation}
    output = reference.edit(base.double(), R, W, b, **options)
    found = reference.edit_backward(upstream.double(), base.double(), R, W, b, **options)
    gradients = {"base": found.h, ("proj_layer.weight" if name in WITH_PROJ else "rotation"): found.R}
    if c is not None:
        gradients["proj_layer.bias"] = found.c
    if name in WITH_W:
        gradients |= {"learned_source.weight": found.W, "learned_source.bias": found.b}
    else:
        gradients["learned_source"] = found.b
    return output, gradients


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def largest(*tensors: Tensor) -> float:
    return max(float(tensor.double().abs().max()) for tensor in tensors)


def assert_equal_within(ours: Tensor, theirs: Tensor, bound: float, what: str, scale: float | None = None) -> None:
    """max |ours - theirs| <= bound * scale, by default the largest entry of theirs, which is finite."""
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, stock {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, stock {theirs.dtype}"
    assert torch.isfinite(theirs).all(), what
    scale = largest(theirs) if scale is None else scale
    difference = largest(ours.double() - theirs.double())
    assert difference <= bound * scale, f"{what}: differs by {difference:.3e}, at a scale of {scale:.3e}"


# Of the RMS of the exact result: about half the error of rounding it once to the dtype; for fp32, whose sums
# of some hundred products stay unrounded, ten times that.
FLOOR = {torch.bfloat16: 2**-10, torch.float16: 2**-13, torch.float32: 2**-20}


def assert_as_exact_as(ours: Tensor, theirs: Tensor, exact: Tensor, what: str, *, factor: float) -> None:
    """RMS error of ours <= factor * that of stock + a little for the dtype of the result."""
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)}, stock {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype, f"{what}: {ours.dtype}, stock {theirs.dtype}"
    error, stock_error = rms(ours.double() - exact), rms(theirs.double() - exact)
    bound = factor * stock_error + FLOOR[ours.dtype] * rms(exact)
    assert error <= bound, f"{what}: RMS error {error:.3e}, bound {bound:.3e} (stock {stock_error:.3e})"


def representations(layers: Iterable[int], modules: Iterable[nn.Module], rank: int) -> list[dict[str, Any]]:
    """The list of dicts that pyreft's README passes to ReftConfig, one intervention instance per entry."""
    return [
        {"layer": layer, "component": "block_output", "low_rank_dimension": rank, "intervention": module}
        for layer, module in zip(layers, modules, strict=True)
    ]


@dataclass
class Models:
    """A stock pyreft model and ours around two copies of one base model, with the same weights."""

    theirs: Any
    ours: Any

    @property
    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(stock, ours) in the order of unit_locations, on both sides the order of the configuration."""
        return list(zip(self.theirs.interventions.values(), self.ours.interventions.values(), strict=True))


def build_models(
    base: Callable[[], nn.Module],
    name: str,
    layers: Sequence[int],
    rank: int,
    *,
    positions: str,
    tied: bool,
    moved: bool = True,
    **others: Any,
) -> Models:
    """`base` returns a new copy of the model at each call: pyvene deletes every hook of the one it runs.

    Untied: the layers are listed twice, the prefix's interventions first (pyreft,
    examples/loreft/train.py).
    """
    listed = list(layers) if tied else [*layers, *layers]
    model, other = base(), base()
    d = model.config.hidden_size
    stock_modules = [stock(name, d, rank, moved=moved, **others) for _ in listed]
    stock_config = pyreft.ReftConfig(representations=representations(listed, stock_modules, rank))
    theirs = pyreft.get_reft_model(model, stock_config)
    entries = representations(listed, [ours_like(module, **others) for module in stock_modules], rank)
    written = [positions] if tied else positions.split("+")
    for index, entry in enumerate(entries):
        entry["positions"] = written[index // len(layers)]
    config = reft_kernels.ReftConfig(representations=entries)
    return Models(theirs, reft_kernels.get_reft_model(other, config))


def prompt_columns(length: int, positions: str, count: int, tied: bool, start: int) -> list[list[int]]:
    """pyreft's own locations [I][P] of a prompt of `length` tokens that begins at column `start`.

    Its "no position" is -1 before the shift. Moved like the others it names the column in front of the
    prompt, a masked one: pyreft's datasets put a padding token, the sink, there for that purpose.
    """
    found = pyreft.get_intervention_locations(
        last_position=length, positions=positions, num_interventions=count, share_weights=tied
    )
    return [[column + start for column in row] for row in found]


def unit_locations(per_example: Sequence[list[list[int]]]) -> dict[str, Any]:
    """Locations [B][I][P] as the argument that pyvene takes, [I][B][P]."""
    return {"sources->base": (None, [list(of_one) for of_one in zip(*per_example, strict=True)])}

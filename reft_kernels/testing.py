"""Helpers for tests of numerical kernels: comparisons that say where, poisoned memory, and random edits.

Nothing here needs pytest. A result is right if its error against an oracle in float64 is not much larger than that
of plain PyTorch in the same dtype (:func:`assert_close`); what must not be touched is compared bit by bit
(:func:`assert_bitwise_equal`); what must be written is checked in memory that starts as NaN (:func:`poison_empty`).
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from reft_kernels import reference

__all__ = [
    "METHODS",
    "EditCase",
    "EditOperands",
    "Gradients",
    "assert_bitwise_equal",
    "assert_close",
    "edit_cases",
    "gradients",
    "lay_out",
    "pairwise",
    "poison_empty",
    "random_edit",
]

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FLOOR = 8.0  # in eps, of the largest element of the oracle; a float64 baseline has no error of its own to compare with
_FLOOR_64 = 64.0


def assert_close(
    actual: Tensor, oracle: Tensor, baseline: Tensor, *, factor: float = 2.0, name: str = "result"
) -> None:
    """Fails unless ``actual`` is about as near to the oracle as plain PyTorch in the same dtype is.

    With e(x) = x - oracle over the finite elements, two bounds hold:

        max |e(actual)|  <=  factor * max |e(baseline)|  +  floor * max |oracle|
        rms  e(actual)   <=  factor * rms  e(baseline)   +  floor * rms  oracle

    The floor is for baselines that are right by luck. It is 8 eps for float32 and 64 eps for float64; in half
    precision 8 eps of float32 and one eps of the result, twice what the rounding of a store can cost.

    Args:
        actual: the result under test.
        oracle: the same in float64.
        baseline: the same by plain PyTorch, in the dtype of ``actual``.
        factor: how many times the baseline's error is allowed; 2 for values, 3 for gradients.
        name: what the message calls the result.

    Raises:
        AssertionError: shapes differ, the baseline has another dtype, NaN or an infinity stands where the oracle has
            none (or is missing, or has another sign), or a bound is exceeded. The message names the first bad indices.
        TypeError: the oracle is not float64.
    """
    if oracle.dtype != torch.float64:
        raise TypeError(f"oracle: expected float64, got {oracle.dtype}")
    if not actual.shape == oracle.shape == baseline.shape:
        raise AssertionError(
            f"{name}: shapes differ: got {list(actual.shape)}, oracle {list(oracle.shape)}, "
            f"baseline {list(baseline.shape)}"
        )
    if actual.dtype != baseline.dtype:
        raise AssertionError(f"{name}: expected {baseline.dtype}, the dtype of the baseline, got {actual.dtype}")
    if actual.numel() == 0:
        return
    actual, oracle, baseline = (t.detach().cpu() for t in (actual, oracle, baseline))
    got, finite = actual.double(), oracle.isfinite()
    alike = (got == oracle) | (got.isnan() & oracle.isnan()) | (finite & got.isfinite())
    if not bool(alike.all()):
        raise AssertionError(f"{name}: NaN or infinity in the wrong place {_first(~alike, got, oracle)}")
    if not bool(finite.any()):
        return

    epsilon = torch.finfo(actual.dtype).eps
    if actual.dtype == torch.float64:
        relative = _FLOOR_64 * epsilon
    else:
        relative = _FLOOR * 2**-23 + (epsilon if epsilon > 2**-23 else 0.0)
    zero = torch.zeros((), dtype=torch.float64)
    true = oracle.where(finite, zero)
    error = (got - oracle).where(finite, zero)
    # Where the baseline overflowed it has nothing to say.
    theirs = (baseline.double() - oracle).where(finite & baseline.isfinite(), zero)
    allowed = factor * float(theirs.abs().max()) + relative * float(true.abs().max())
    worst = float(error.abs().max())
    if worst > allowed:
        raise AssertionError(
            f"{name}: largest error {worst:.3g} > {allowed:.3g} allowed (baseline's {float(theirs.abs().max()):.3g}) "
            f"{_first(error.abs() > allowed, got, oracle)}"
        )
    rms, rms_theirs, rms_true = (float(t.square().mean().sqrt()) for t in (error, theirs, true))
    allowed = factor * rms_theirs + relative * rms_true
    if rms > allowed:
        raise AssertionError(f"{name}: rms error {rms:.3g} > {allowed:.3g} allowed (baseline's {rms_theirs:.3g})")


def _first(bad: Tensor, got: Tensor, expected: Tensor, count: int = 3) -> str:
    """Where ``bad`` holds first, and what stands there."""
    places = bad.nonzero()
    shown = [
        f"{tuple(i)}: got {got[tuple(i)].item():.6g}, expected {expected[tuple(i)].item():.6g}"
        for i in places[:count].tolist()
    ]
    return f"({len(places)} of {bad.numel()} elements; first at {'; '.join(shown)})"


def assert_bitwise_equal(actual: Tensor, expected: Tensor, *, name: str = "result") -> None:
    """Fails unless two tensors hold the same bits: -0.0 differs from 0.0, and so do two NaNs of other payloads.

    Strides may differ.

    Raises:
        AssertionError: shapes, dtypes or bits differ; the message names the first mismatch.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{name}: got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    got, wanted = _bits(actual), _bits(expected)
    differ = got != wanted
    if bool(differ.any()):
        where = tuple(differ.nonzero()[0].tolist())
        width = 2 * actual.element_size()
        mask = (1 << (4 * width)) - 1
        raise AssertionError(
            f"{name}: {int(differ.sum())} of {differ.numel()} elements differ, first at {where}: "
            f"got {actual[where].item()!r} (0x{int(got[where]) & mask:0{width}x}), "
            f"expected {expected[where].item()!r} (0x{int(wanted[where]) & mask:0{width}x})"
        )


def _bits(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if not tensor.dtype.is_floating_point:
        return tensor
    tensor = tensor.contiguous() if tensor.dim() else tensor.reshape(1)
    return tensor.view(_INTEGER_OF_SIZE[tensor.element_size()])


class poison_empty(TorchFunctionMode):
    """While active, uninitialised memory that reft_kernels asks for starts as NaN, so that what stays unwritten shows.

    Covers ``torch.empty``, ``torch.empty_like``, ``torch.empty_strided`` and the methods ``new_empty`` and
    ``new_empty_strided``, called from a module of the package; other callers get what they always get. Integers
    start as the lowest value of their type, booleans as True. ``count`` says how many tensors were poisoned.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls ``func``, and poisons its result if it is uninitialised and the package's."""
        result = func(*args, **(kwargs or {}))
        if func in _EMPTIES and _calling_module().split(".")[0] == "reft_kernels":
            self.count += 1
            if result.dtype.is_floating_point or result.dtype.is_complex:
                result.fill_(float("nan"))
            else:
                result.fill_(True if result.dtype == torch.bool else torch.iinfo(result.dtype).min)
        return result


_EMPTIES = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
)


def _calling_module() -> str:
    """The name of the innermost module outside torch and this one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name != __name__ and name.split(".")[0] not in ("torch", "contextlib"):
            return name
        frame = frame.f_back
    return ""


class _Method(NamedTuple):
    has_W: bool
    has_c: bool
    subtract: bool


METHODS: Mapping[str, _Method] = {
    "loreft": _Method(True, False, True),
    "noreft": _Method(True, False, True),
    "noreft_with_c": _Method(True, True, True),
    "consreft": _Method(False, False, True),
    "lobireft": _Method(False, False, False),
    "direft": _Method(True, False, False),
    "nodireft": _Method(True, False, False),
}
"""The rows of the table of interventions, and which operands each has."""

_DTYPES: Mapping[str, tuple[torch.dtype, torch.dtype, torch.dtype]] = {
    # of h and scale, of R, of W, b and c
    "float32": (torch.float32, torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64, torch.float64),
    "mixed": (torch.bfloat16, torch.float32, torch.bfloat16),
    "mixed16": (torch.float16, torch.float32, torch.float32),
}

LAYOUTS = ("contiguous", "slice", "rows", "transposed", "columns", "expanded")


@dataclass(frozen=True)
class EditCase:
    """One configuration of an edit, of which :func:`random_edit` draws the operands.

    ``shape`` is that of h without d; with positions other than ``"none"`` it is (B, S). ``positions`` is one of
    none (every row), some, padded (with -1), nothing (all -1); ``groups`` is G, 0 for no group; ``scale`` one of
    none, number, rows; ``dtype`` a torch dtype's name, mixed (h bfloat16, R float32, W and b bfloat16) or mixed16 (h
    float16, the weights float32); ``layout`` as in :func:`lay_out`; ``index`` one of int64, int32, strided.
    """

    method: str = "loreft"
    activation: str = "linear"
    dtype: str = "float32"
    layout: str = "contiguous"
    positions: str = "none"
    groups: int = 0
    scale: str = "none"
    dropout: float = 0.0
    shape: tuple[int, ...] = (2, 5)
    slots: int = 3
    d: int = 60
    r: int = 4
    index: str = "int64"

    def __str__(self) -> str:
        """All that differs from the default, as a test's name."""
        default = EditCase()
        parts = [self.method, self.dtype, "x".join(map(str, (*self.shape, self.d))) + f"r{self.r}"]
        for field in ("activation", "layout", "positions", "groups", "scale", "dropout", "index"):
            value = getattr(self, field)
            if value != getattr(default, field):
                parts.append(f"{field}={value}" if field in ("groups", "scale", "dropout", "positions") else value)
        return "-".join(parts)


@dataclass(frozen=True)
class EditOperands:
    """The operands of one edit, as :func:`reft_kernels.edit` takes them."""

    h: Tensor
    R: Tensor
    W: Tensor | None
    b: Tensor | None
    c: Tensor | None
    positions: Tensor | None
    group: Tensor | None
    scale: Tensor | float | None
    subtract: bool
    activation: str
    dropout: float
    seed: int

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Those of h, R, W, b and c that there are."""
        named = {name: getattr(self, name) for name in ("h", "R", "W", "b", "c")}
        return {name: t for name, t in named.items() if t is not None}

    @property
    def named(self) -> Tensor:
        """bool of the shape of h without d: which rows the edit names."""
        rows = self.h.shape[:-1]
        if self.positions is None:
            return torch.ones(rows, dtype=torch.bool) if self.group is None else self._known(self.group)
        named = torch.zeros(rows, dtype=torch.bool)
        edited = (self.positions >= 0) & (self.positions < rows[1])
        if self.group is not None:
            edited = edited & self._known(self.group)
        for batch, slot in edited.nonzero().tolist():
            named[batch, int(self.positions[batch, slot])] = True
        return named

    def _known(self, group: Tensor) -> Tensor:
        return (group >= 0) & (group < self.R.shape[0])

    def keywords(self) -> dict[str, Any]:
        """Everything but h, by name."""
        names = ["R", "W", "b", "c", "positions", "group", "scale", "subtract", "activation", "dropout", "seed"]
        return {name: getattr(self, name) for name in names}

    def edit(self, **changes: Any) -> Tensor:
        """:func:`reft_kernels.edit` of these operands, with ``changes`` (backend, inplace, ...)."""
        from reft_kernels.functional import edit

        return edit(changes.pop("h", self.h), **{**self.keywords(), **changes})

    def reference(self, dtype: torch.dtype = torch.float64, **changes: Any) -> Tensor:
        """:func:`reft_kernels.reference.edit` of these operands, all in ``dtype``; float64 is the oracle."""
        values = {"h": self.h, **self.keywords(), **changes}
        for name in ("h", "R", "W", "b", "c"):
            values[name] = None if values[name] is None else values[name].to(dtype)
        if isinstance(values["scale"], (int, float)):
            slots = self.h.shape[:-1] if self.positions is None else self.positions.shape
            values["scale"] = torch.full(slots, float(values["scale"]), dtype=dtype)
        values["seed"] = torch.tensor([values["seed"]]) if self.dropout > 0 else None
        return reference.edit(values.pop("h"), values.pop("R"), values.pop("W"), values.pop("b"), **values)

    def to(self, dtype: torch.dtype) -> EditOperands:
        """The same with every float in ``dtype``."""
        floats: dict[str, Any] = {name: t.to(dtype) for name, t in self.differentiable.items()}
        scale = self.scale.to(dtype) if isinstance(self.scale, Tensor) else self.scale
        return replace(self, **floats, scale=scale)


def random_edit(case: EditCase, seed: int = 0) -> EditOperands:
    """Draws the operands of a case; the same for the same seed.

    Rows of h that the edit does not name hold NaN, infinities and negative zeros (unless ``layout`` is expanded,
    where rows share memory): an edit must neither read them nor change a bit of them. Results are of order one.
    """
    rng = torch.Generator().manual_seed(seed)
    method = METHODS[case.method]
    h_dtype, R_dtype, W_dtype = _DTYPES[case.dtype]
    d, r = case.d, case.r

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    batch = math.prod(case.shape[:1])
    positions = group = None
    if case.positions != "none":
        length, slots = case.shape[1], min(case.slots, case.shape[1])
        # Distinct in each row and in no order.
        drawn = [torch.randperm(length, generator=rng)[:slots] for _ in range(batch)]
        positions = torch.stack(drawn) if drawn else torch.zeros(0, slots, dtype=torch.int64)
        if case.positions == "padded":
            positions = positions.where(torch.rand(positions.shape, generator=rng) < 0.6, -1)
            positions[:1, :1] = -1
        elif case.positions == "nothing":
            positions = torch.full_like(positions, -1)
    per_slot = case.shape if positions is None else tuple(positions.shape)
    if case.groups:
        group = torch.randint(-1, case.groups, per_slot, generator=rng)
    weights = (case.groups, r) if case.groups else (r,)
    scale: Tensor | float | None = None
    if case.scale == "number":
        scale = -1.5
    elif case.scale == "rows":
        scale = (torch.rand(per_slot, generator=rng) * 4 - 2).to(h_dtype)

    operands = EditOperands(
        h=normal(*case.shape, d).to(h_dtype),
        R=(normal(*weights, d) / math.sqrt(max(d, 1))).to(R_dtype),
        W=(normal(*weights, d) / math.sqrt(max(d, 1))).to(W_dtype) if method.has_W else None,
        b=normal(*weights).to(W_dtype),
        c=normal(*weights).to(W_dtype) if method.has_c else None,
        positions=_lay_out_index(positions, case.index),
        group=_lay_out_index(group, case.index),
        scale=scale,
        subtract=method.subtract,
        activation=case.activation,
        dropout=case.dropout,
        seed=int(torch.randint(-(2**62), 2**62, (1,), generator=rng)),
    )
    h = operands.h
    if case.layout != "expanded":
        odd = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=h_dtype)
        which = torch.randint(0, 4, (*case.shape, 1), generator=rng)
        h = h.where(operands.named[..., None], odd[which])
    return replace(operands, h=lay_out(h, case.layout))


def _lay_out_index(index: Tensor | None, kind: str) -> Tensor | None:
    if index is None or kind == "int64":
        return index
    if kind == "int32":
        return index.int()
    return lay_out(index, "columns")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other strides; what lies between them in memory is NaN (or the lowest integer).

    ``layout`` is one of

        contiguous
        slice       rows of a wider buffer, which starts before them
        rows        every second row of a longer buffer
        transposed  the first and the last but one dimension swapped in memory
        columns     the last dimension is not the one with unit stride
        expanded    the first entry of the first dimension repeated, without memory of its own (values change)
        scalar      one value for all (values change), the layout of the gradient of ``sum()``

    A tensor with too few dimensions for a layout gets the nearest one that it can have.
    """
    if layout == "scalar":
        value = tensor.reshape(-1)[0] if tensor.numel() else tensor.new_zeros(())
        return value.clone().expand(tensor.shape)
    if tensor.dim() == 0 or tensor.numel() == 0 or layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    poison = math.nan if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).min
    *leading, last = tensor.shape
    if layout == "slice":
        view = tensor.new_full((*leading, last + 5), poison)[..., 3 : 3 + last]
    elif layout == "rows" and leading:
        view = tensor.new_full((*leading[:-1], 2 * leading[-1] + 1, last), poison)[..., 1::2, :]
    elif layout == "transposed" and len(leading) >= 2:
        view = tensor.new_full(tensor.transpose(0, -2).shape, poison).transpose(0, -2)
    elif layout == "columns" and leading:
        view = tensor.new_full((*leading[:-1], last, leading[-1]), poison).transpose(-1, -2)
    elif layout in ("rows", "columns"):
        view = tensor.new_full((2 * last,), poison)[::2]
    elif layout == "expanded" and leading:
        return tensor[:1].clone(memory_format=torch.contiguous_format).expand(tensor.shape)
    elif layout in ("transposed", "expanded"):
        return tensor.clone(memory_format=torch.contiguous_format)
    else:
        raise ValueError(f"layout: expected one of {', '.join((*LAYOUTS, 'scalar'))}, got {layout!r}")
    return view.copy_(tensor)


class Gradients(NamedTuple):
    """The result of an edit and its gradients, by the names of the operands."""

    y: Tensor
    grads: dict[str, Tensor]


def gradients(
    function: Callable[..., Tensor], operands: EditOperands, grad: Tensor, wanted: Sequence[str] | None = None
) -> Gradients:
    """Runs ``function(**floats)`` forward and, with dL/dy = ``grad``, backward.

    Args:
        function: takes h, R, W, b, c by keyword, those that there are; for instance ``operands.edit``.
        operands: whose floats are copied (strides kept) and asked for gradients.
        grad: dL/dy, of the shape of y and of any strides; converted to the dtype of y.
        wanted: names of the operands to differentiate to; None: all.
    """
    leaves = {name: t.detach() for name, t in operands.differentiable.items()}
    names = [name for name in leaves if wanted is None or name in wanted]
    for name in names:
        leaves[name].requires_grad_()
    y = function(**leaves)
    found = torch.autograd.grad(y, [leaves[name] for name in names], grad.to(y.dtype))
    return Gradients(y.detach(), dict(zip(names, found, strict=True)))


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Few combinations in which every pair of values of two factors occurs together at least once.

    Greedy: each combination starts from a pair not met yet and takes, factor by factor, the value that meets most
    of the others. The same for the same seed.
    """
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        frozenset(((a, i), (b, j)))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    rows = []
    while missing:
        chosen = dict(min(missing, key=lambda pair: sorted(pair)))
        rest = [name for name in names if name not in chosen]
        rng.shuffle(rest)
        for name in rest:
            order = list(range(len(factors[name])))
            rng.shuffle(order)
            chosen[name] = max(
                order, key=lambda i: sum(frozenset(((name, i), other)) in missing for other in chosen.items())
            )
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        rows.append({name: factors[name][chosen[name]] for name in names})
    return rows


def edit_cases(seed: int = 0) -> list[EditCase]:
    """Small cases in which every two features of an edit meet."""
    factors: dict[str, Sequence[Any]] = {
        "method": list(METHODS),
        "activation": reference.ACTIVATIONS,
        "dtype": list(_DTYPES),
        "layout": LAYOUTS,
        "positions": ("none", "some", "padded", "nothing"),
        "groups": (0, 1, 3),
        "scale": ("none", "number", "rows"),
        "dropout": (0.0, 0.3),
        "size": (((2, 5), 60, 4), ((1, 7), 33, 1), ((3, 2), 130, 5), ((4, 9), 8, 3), ((2, 3), 65, 8)),
        "index": ("int64", "int32", "strided"),
    }
    cases = []
    for row in pairwise(factors, seed):
        shape, d, r = row.pop("size")
        cases.append(EditCase(**row, shape=shape, d=d, r=r))
    return cases

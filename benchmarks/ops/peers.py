"""The registry of peers: everything that computes the same edit, this package's backends among them."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import reft_kernels as rk
from benchmarks.ops.operands import Operands
from benchmarks.ops.workloads import SIZES, Workload, sets_needed
from benchmarks.pyreft_peer import PeerLoreft
from reft_kernels import reference

# The oracle gathers R and W for every row; beyond this it is no plausible peer.
REFERENCE_LIMIT = 2 << 30
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda s: s, "relu": torch.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A peer ready for one set of operands: ``apply(h)`` is y, ``wanted`` the parameters to differentiate to.

    What is called R, W or b in ``wanted`` has the shape and the meaning of the set's own.
    """

    apply: Callable[[Tensor], Tensor]
    wanted: dict[str, Tensor]


class Peer:
    """What all peers have.

    ``no_graph``: why no CUDA graph can hold it, empty if one can. ``core_only``: for the core workloads alone, unless
    all are asked for. ``slow_start``: takes seconds before its first call.
    """

    name = ""
    about = ""
    no_graph = ""
    core_only = False
    slow_start = False

    def absent(self, device: torch.device) -> str | None:
        """Why this peer cannot run here; None if it can."""
        return None

    def refuses(self, workload: Workload, operands: Operands) -> str | None:
        """Why this peer does not do this workload; None if it does."""
        return None

    def inplace(self, workload: Workload) -> bool:
        """Whether it writes h itself."""
        return False

    def cold_sets(self, workload: Workload, cache_bytes: int) -> int:
        """How many sets of operands it must rotate among to find none in the cache."""
        return sets_needed(replace(workload, inplace=self.inplace(workload)), cache_bytes)

    def prepare(self, workload: Workload, operands: Operands) -> Prepared:
        """Binds the peer to a set of operands."""
        raise NotImplementedError


def _leaves(operands: Operands) -> dict[str, Tensor]:
    """R, W and b as leaves that want gradients; the memory is the set's."""
    return {name: getattr(operands, name).detach().requires_grad_() for name in ("R", "W", "b")}


class Ours(Peer):
    """``reft_kernels.edit`` by one backend."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.about = f"reft_kernels, backend {name}"

    def absent(self, device: torch.device) -> str | None:
        reason = rk.available_backends()[self.name]
        if reason != "ok":
            return reason
        from reft_kernels.backends.triton import interpreted

        if self.name == "triton" and interpreted():
            return "Triton's interpreter (TRITON_INTERPRET=1) computes for tests; its times mean nothing"
        return None

    def refuses(self, workload: Workload, operands: Operands) -> str | None:
        o = operands
        found = rk.explain(
            o.h, o.R, o.W, o.b, positions=o.positions, group=o.group, activation=workload.activation
        )[self.name]  # fmt: skip
        return None if found == "ok" else found

    def inplace(self, workload: Workload) -> bool:
        return workload.inplace

    def prepare(self, workload: Workload, operands: Operands) -> Prepared:
        leaves = _leaves(operands)
        settings: dict[str, Any] = {
            "positions": operands.positions,
            "group": operands.group,
            "activation": workload.activation,
            "inplace": workload.inplace,
            "backend": self.name,
        }
        if workload.inplace and "rebuild" in inspect.signature(rk.edit).parameters:
            settings["rebuild"] = True
        return Prepared(lambda h: rk.edit(h, leaves["R"], leaves["W"], leaves["b"], **settings), leaves)


class Chain(Peer):
    """Gather, addmm, addmm, index_copy_: see :class:`_ChainFunction`."""

    name = "addmm chain"
    about = "gather, addmm, addmm, index_copy_ in place, backward by hand: the best that plain torch does"

    def refuses(self, workload: Workload, operands: Operands) -> str | None:
        return "one weight set only" if workload.G > 1 else None

    def inplace(self, workload: Workload) -> bool:
        return workload.inplace and workload.P > 0  # for every token a new h is less work than saving the old one

    def prepare(self, workload: Workload, operands: Operands) -> Prepared:
        leaves = _leaves(operands)
        rows = None if operands.positions is None else operands.rows

        def apply(h: Tensor) -> Tensor:
            return _ChainFunction.apply(h, *leaves.values(), rows, workload.activation, self.inplace(workload))

        return Prepared(apply, leaves)


class _ChainFunction(torch.autograd.Function):
    """The edit as few torch calls as it takes, with the backward written by hand.

    Computes in the dtype of h, as a model in half precision does. Linear: u = x A^T + b with A = W - R, one skinny
    product down and one up. In place it writes the incoming gradient without asking whose it is, which autograd does
    not allow in general: no peer can do less.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, R: Tensor, W: Tensor, b: Tensor, rows: Tensor | None, activation: str,
                inplace: bool) -> Tensor:  # fmt: skip
        ctx.dtypes = (R.dtype, W.dtype, b.dtype)
        flat = h.view(-1, h.shape[-1])
        x = flat if rows is None else flat.index_select(0, rows)
        A = (W - R).to(h.dtype) if activation == "linear" else W.to(h.dtype)
        R, b = R.to(h.dtype), b.to(h.dtype)
        s = torch.addmm(b, x, A.T)
        u = s if activation == "linear" else torch.addmm(ACTIVATIONS[activation](s), x, R.T, alpha=-1)
        after = torch.addmm(x, u, R)
        ctx.save_for_backward(x, R, A, s, u, rows)
        ctx.activation, ctx.inplace = activation, inplace
        if inplace:
            ctx.mark_dirty(h)
            flat.index_copy_(0, rows, after)
            return h
        return after.view(h.shape) if rows is None else flat.index_copy(0, rows, after).view(h.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, R, A, s, u, rows = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        g = flat if rows is None else flat.index_select(0, rows)
        gd = g @ R.T
        if ctx.activation == "linear":
            gs = gd
            dW = gd.T @ x
            dR = torch.addmm(dW, u.T, g, beta=-1)
            dx = torch.addmm(g, gd, A)
        else:
            gs = gd * reference.activation_slope(s, ctx.activation)
            dW = gs.T @ x
            dR = torch.addmm(gd.T @ x, u.T, g, beta=-1)
            dx = torch.addmm(g, gs, A).addmm_(gd, R, alpha=-1)
        if rows is None:
            dh = dx.view(grad.shape)
        else:
            dh = (flat.index_copy_ if ctx.inplace else flat.index_copy)(0, rows, dx).view(grad.shape)
        R_dtype, W_dtype, b_dtype = ctx.dtypes
        return dh, dR.to(R_dtype), dW.to(W_dtype), gs.sum(0).to(b_dtype), None, None, None


class Plain(Peer):
    """The formula in torch operations, differentiated by autograd; computes in the dtype of h."""

    name = "torch"
    about = "the formula in plain torch operations, backward by autograd"

    def refuses(self, workload: Workload, operands: Operands) -> str | None:
        return "one weight set only" if workload.G > 1 else None

    def prepare(self, workload: Workload, operands: Operands) -> Prepared:
        leaves = _leaves(operands)
        rows = None if operands.positions is None else operands.rows
        function = self._function(workload)
        return Prepared(lambda h: function(h, *leaves.values(), rows, workload.activation), leaves)

    def _function(self, workload: Workload) -> Callable[..., Tensor]:
        return _plain_edit


def _plain_edit(h: Tensor, R: Tensor, W: Tensor, b: Tensor, rows: Tensor | None, activation: str) -> Tensor:
    R, W, b = R.to(h.dtype), W.to(h.dtype), b.to(h.dtype)
    flat = h.reshape(-1, h.shape[-1])
    x = flat if rows is None else flat[rows]
    y = x + (ACTIVATIONS[activation](x @ W.T + b) - x @ R.T) @ R
    return (y if rows is None else flat.index_put((rows,), y)).view(h.shape)


class Compiled(Plain):
    """:class:`Plain` through torch.compile; core workloads alone, since each takes a compilation."""

    name = "torch.compile"
    about = "the same through torch.compile"
    core_only = True
    slow_start = True

    def __init__(self) -> None:
        self._compiled: dict[str, Callable[..., Tensor]] = {}

    def absent(self, device: torch.device) -> str | None:
        if device.type == "cpu" and not _has_compiler():
            return "torch.compile needs a C++ compiler on the CPU and found none"
        return None

    def _function(self, workload: Workload) -> Callable[..., Tensor]:
        if workload.name not in self._compiled:
            import torch._functorch.config as config

            # With donated buffers a compiled backward refuses retain_graph=True, which timing it alone needs.
            config.donated_buffer = False
            torch.compiler.reset()
            self._compiled = {workload.name: torch.compile(_plain_edit, dynamic=False)}
        return self._compiled[workload.name]


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


class Oracle(Peer):
    """``reft_kernels.reference.edit`` in the dtype of h; it lists its rows on the host, so no graph can hold it."""

    name = "reference"
    about = "the oracle, reft_kernels.reference, in the dtype of h"
    no_graph = "lists its rows on the host"
    core_only = True

    def refuses(self, workload: Workload, operands: Operands) -> str | None:
        gathered = workload.N * workload.r * workload.d * SIZES[workload.h]
        if gathered > REFERENCE_LIMIT:
            return f"gathers R and W for every row, {gathered / 2**30:.0f} GiB each"
        return None

    def prepare(self, workload: Workload, operands: Operands) -> Prepared:
        leaves = _leaves(operands)

        def apply(h: Tensor) -> Tensor:
            weights = (t.to(h.dtype) for t in leaves.values())
            return reference.edit(
                h, *weights, positions=operands.positions, group=operands.group, activation=workload.activation
            )

        return Prepared(apply, leaves)


class Rewritten(Peer):
    """:class:`benchmarks.pyreft_peer.PeerLoreft` on gathered rows, written back in place.

    R is computed from its parametrisation at every access, as pyreft does, and its gradient ends there. The index of
    the rows is ready on the device, where pyvene makes one from lists at every call.
    """

    name = "pyreft rewritten"
    about = "pyreft's LoreftIntervention written anew, without pyvene's hooks: a lower bound of pyreft"
    no_graph = "torch's parametrisation of R calls a solver library"
    core_only = True

    def absent(self, device: torch.device) -> str | None:
        return "stands in for pyreft, which is there" if Pyreft().absent(device) is None else None

    def refuses(self, workload: Workload, operands: Operands) -> str | None:
        if workload.G > 1:
            return "one weight set only"
        if workload.activation != "linear":
            return "linear only"
        if workload.params != "float32" and workload.params != workload.h:
            return "W in float32 or in the dtype of h"
        return None

    def inplace(self, workload: Workload) -> bool:
        return workload.inplace

    def cold_sets(self, workload: Workload, cache_bytes: int) -> int:
        """Few: each has a matrix [d, d] of its own, which is read at every call."""
        base = workload.d * workload.d * 4
        return min(super().cold_sets(workload, cache_bytes), math.ceil(2 * cache_bytes / base) + 1)

    def _module(self, workload: Workload) -> torch.nn.Module:
        return PeerLoreft(workload.d, workload.r, getattr(torch, workload.h))

    def prepare(self, workload: Workload, operands: Operands) -> Prepared:
        device = operands.h.device
        module = self._module(workload).to(device)
        with torch.no_grad():
            module.rotate_layer.weight = operands.R.T.float()
            module.learned_source.weight.copy_(operands.W)
            module.learned_source.bias.copy_(operands.b)
        batch = torch.arange(workload.B, device=device)[:, None]
        positions = operands.positions

        def apply(h: Tensor) -> Tensor:
            if positions is None:
                return module(h)
            rows = module(h[batch, positions])
            if workload.inplace:
                h[batch, positions] = rows
                return h
            return h.index_put((batch, positions), rows)

        free = [p for name, p in module.named_parameters() if "rotate_layer" in name]
        own = {f"parametrised R {i}": p for i, p in enumerate(free)}
        return Prepared(apply, {"W": module.learned_source.weight, "b": module.learned_source.bias, **own})


class Pyreft(Rewritten):
    """The authors' ``pyreft.LoreftIntervention`` in the same place."""

    name = "pyreft"
    about = "the authors' pyreft.LoreftIntervention on gathered rows, without pyvene's hooks"

    def absent(self, device: torch.device) -> str | None:
        if importlib.util.find_spec("pyreft") is None:
            return "the package pyreft is not installed (requirements-pyreft.txt)"
        try:
            _quietly_import_pyreft()
        except Exception as error:  # any failure of another package's import is a reason, not an error of ours
            return f"pyreft cannot be imported: {type(error).__name__}: {error}"
        return None

    def _module(self, workload: Workload) -> torch.nn.Module:
        pyreft = _quietly_import_pyreft()
        module: torch.nn.Module = pyreft.LoreftIntervention(
            embed_dim=workload.d, low_rank_dimension=workload.r, dtype=getattr(torch, workload.h)
        )
        return module


def _quietly_import_pyreft() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pyreft
    return pyreft


class LeftOut(Peer):
    """A peer that starts too slowly for a quick run."""

    def __init__(self, peer: Peer) -> None:
        self.name, self.about, self.core_only = peer.name, peer.about, peer.core_only

    def absent(self, device: torch.device) -> str | None:
        return "left out by --quick: it takes seconds to compile"


def peers() -> list[Peer]:
    """All of them, this package's backends first, in the order in which ``auto`` tries them."""
    ours = [Ours(name) for name in rk.available_backends()]
    return [*ours, Chain(), Plain(), Compiled(), Oracle(), Rewritten(), Pyreft()]

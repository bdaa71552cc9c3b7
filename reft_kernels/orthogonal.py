"""R with orthonormal rows, parametrised without a d x d matrix.

The map is that of ``torch.nn.utils.parametrizations.orthogonal`` (householder, with a trivialising base), which
pyreft uses: X [d, r] holds r reflectors below its diagonal and r signs on it,

    Q = H_1 ... H_r E diag(sign X_jj),   H_j = I - 2 v_j v_j^T / |v_j|^2,   v_j = e_j + (X below the diagonal)_j
    R^T = B Q,                            B orthogonal, constant, with R_0^T as its first r columns

where E is the first r columns of the identity. Both products of reflectors are kept in their compact WY form
(Schreiber and Van Loan, 1989; T from Puglisi, 1992),

    H_1 ... H_r = I - V T V^T,            T^-1 = strict upper part of V^T V + half its diagonal,

so that B is r reflectors and r signs: 2 d r numbers in all instead of d^2, and O(d r^2) work. All R of a model are one
call of a backend forward and one backward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from reft_kernels import orthonormal_reference
from reft_kernels.autograd import first_derivative_only
from reft_kernels.backends.orthonormal_registry import choose
from reft_kernels.debug import debug_is_on
from reft_kernels.orthonormal_ops import NO_SECOND_DERIVATIVE
from reft_kernels.orthonormal_problem import OrthonormalProblem
from reft_kernels.problem import wide_default_dtype, without_autocast
from reft_kernels.transforms import has_tangent, torch_func_is_active

_optimizer_steps = 0
_steps_are_captured = False


def _count_optimizer_step(*_: Any) -> None:
    """Some optimisers write parameters behind autograd's back, by kernels of their own, or in a graph's replays."""
    global _optimizer_steps, _steps_are_captured
    _optimizer_steps += 1
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _steps_are_captured = True


register_optimizer_step_post_hook(_count_optimizer_step)


class WatchedParameter(nn.Parameter):
    """A parameter that counts how often its ``.data`` is taken or set: writing through it leaves no other trace."""

    _data_taken = 0

    @property
    def data(self) -> Tensor:
        """As of every tensor."""
        self._data_taken += 1
        return torch.Tensor.data.__get__(self)  # type: ignore[attr-defined, no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        self._data_taken += 1
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]


class OrthonormalRows(nn.Module):
    """R [r, d] with orthonormal rows, as a function of an unconstrained parameter X [d, r].

    ``weight`` is R in float32 (float64 if X is), differentiable to X once, and not to be written. It is computed once
    and kept until X changes: in place, through ``.data``, by an optimiser's step, by ``load_state_dict``, by a move to
    another device or because another tensor takes its place. What leaves no trace anywhere is not seen: a write through
    NumPy's view of X or through a ``.data`` taken long before, or a collective of ``torch.distributed`` that writes X;
    call :meth:`invalidate` after those. The state (X and the base) is exact: a module that loads it has the same R, bit
    for bit. Several modules' R are one computation in :func:`orthonormal_rows`. Under torch.func and forward-mode
    differentiation R is computed in PyTorch's operations, which have every derivative.

    Args:
        d: the length of a row.
        r: the number of rows, at most d.

    Raises:
        ValueError: r is not in [1, d].

    A gradient of R that is not finite makes one of X that is not, as of any other parameter; in debug mode
    (:func:`reft_kernels.set_debug`) the backward raises FloatingPointError instead.

    Source: the householder map of torch.nn.utils.parametrizations.orthogonal; pyreft's LowRankRotateLayer.
    """

    orthogonality: ClassVar[str] = "householder"
    reflectors: Tensor
    signs: Tensor

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        check_sizes(d, r)
        self.d, self.r = d, r
        self._X_set = 0
        dtype = wide_default_dtype()
        self.X = nn.Parameter(torch.empty(d, r, dtype=dtype))
        self.register_buffer("reflectors", torch.empty(d, r, dtype=dtype))
        self.register_buffer("signs", torch.empty(r, dtype=dtype))
        self._cache: _Cache | None = None
        self._shared: Tensor | None = None
        self._captured = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws R uniformly (``torch.nn.init.orthogonal_``) and makes it the base."""
        self.assign(random_rows(self.d, self.r))

    @torch.no_grad()
    def assign(self, R: Tensor) -> None:
        """Makes R [r, d] the base: ``weight`` then equals it to rounding, and X starts anew from -I.

        Raises:
            ValueError: the shape is not [r, d], or the rows are further than 1e-2 from orthonormal.
        """
        check_rows(R, self.d, self.r)
        if self.X.is_meta:
            return
        target = R.detach().to("cpu", torch.float64).T  # [d, r]
        check_orthonormal(R)
        packed, _ = torch.geqrf(target)
        eye = torch.eye(self.d, self.r, dtype=torch.float64, device="cpu")
        reflectors = (packed.tril(-1) + eye).to(self.reflectors.dtype)
        # The signs for which the first columns of the base point along R, whatever geqrf chose.
        plain = OrthonormalProblem((-eye,), (reflectors.double(),), (packed.new_ones(self.r),))
        (start,), _ = choose("auto", plain).orthonormalize_forward(plain)
        self.reflectors.copy_(reflectors)
        self.signs.copy_((start.T * target).sum(0).sign())
        self.X.copy_(-eye)

    @property
    def weight(self) -> Tensor:
        """R [r, d]."""
        if _reading.apart:
            return _computed((self,))[0]
        return self._shared if self._shared is not None else orthonormal_rows((self,))[0]

    def _key(self) -> tuple[Any, ...] | None:
        """Changes whenever X or the base may have changed. None where that would not be seen, and nothing is kept.

        It is not seen of tensors made in inference mode, nor during and after the capture of a CUDA graph: the graph
        must hold R's own computation, and its replays may write X without a trace. Nor of memory that processes share.
        """
        X, B, signs = self.X, self.reflectors, self.signs
        stream = 0
        if X.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                self._captured, self._cache = True, None
            if _steps_are_captured:
                return None
            stream = torch.cuda.current_stream(X.device).cuda_stream
        elif X.is_shared():  # by other processes, which may write it
            return None
        if self._captured or X.is_inference() or B.is_inference() or signs.is_inference():
            return None
        if type(X) is nn.Parameter:  # whoever made it
            X.__class__ = WatchedParameter
        return (
            self._X_set, X.data_ptr(), X._version, getattr(X, "_data_taken", 0), X.requires_grad, X.dtype,
            B.data_ptr(), B._version, signs.data_ptr(), signs._version, _optimizer_steps, stream,
        )  # fmt: skip

    def __setattr__(self, name: str, value: Any) -> None:
        # FullyShardedDataParallel puts gathered parameters in place by this, and writes them without a trace.
        if name == "X":
            self.__dict__["_X_set"] += 1
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthonormalRows:
        """Moves to another device; a cast to less than float32 (``model.to(bfloat16)``) leaves the dtype alone."""
        self._cache = None  # or it would hold the other device's memory
        super()._apply(kept_wide(fn), recurse)
        return self

    def invalidate(self) -> None:
        """Forgets R: it is computed anew when it is read next."""
        self._cache = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the cached R, which belongs to an autograd graph and cannot be copied."""
        return {**super().__getstate__(), "_cache": None, "_shared": None}

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"d={self.d}, r={self.r}"


class _Cache(NamedTuple):
    key: tuple[Any, ...]
    X: nn.Parameter
    R: Tensor
    version: int  # of R, which is not to be written


def orthonormal_rows(modules: Sequence[OrthonormalRows]) -> list[Tensor]:
    """R [r, d] of each module, in one launch forward and one backward for all whose R is not known.

    Args:
        modules: of any sizes. Those on one device and of one dtype are one computation; what is cached is not computed
            again.

    Returns:
        ``module.weight`` of each; differentiable to each X once, any number of times until that X changes.

    Raises:
        RuntimeError: in the backward, where an X was written since its R was computed.
        NotImplementedError: where a second derivative is asked for.
    """
    if torch.compiler.is_compiling():
        return _traced(modules)
    if torch_func_is_active() or any(has_tangent(module.X) for module in modules):
        return [_followed(module) for module in modules]
    keys = [module._key() for module in modules]
    found: list[Tensor | None] = []
    stale: dict[tuple[torch.device, torch.dtype], dict[int, OrthonormalRows]] = {}
    for module, key in zip(modules, keys, strict=True):
        cache, X = module._cache, module.X
        if cache is not None and key == cache.key and cache.X is X and cache.R._version == cache.version:
            found.append(cache.R)
        else:
            found.append(None)
            stale.setdefault((X.device, X.dtype), {})[id(module)] = module
    if stale:
        new = {id(m): R for ms in stale.values() for m, R in zip(ms.values(), _computed([*ms.values()]), strict=True)}
        for i, (module, key) in enumerate(zip(modules, keys, strict=True)):
            if found[i] is None:
                found[i] = R = new[id(module)]
                module.__dict__["_cache"] = None if key is None else _Cache(key, module.X, R, R._version)
    return [R for R in found if R is not None]


@contextmanager
def shared_rows(modules: Iterable[OrthonormalRows]) -> Iterator[None]:
    """Computes every R at once, and gives it to whoever reads a module's ``weight`` within the context."""
    chosen = list(modules)
    try:
        for module, R in zip(chosen, orthonormal_rows(chosen), strict=True):
            module.__dict__["_shared"] = R
        yield
    finally:
        for module in chosen:
            module.__dict__["_shared"] = None


class _Reading(threading.local):
    """Whether this thread gives every R that is read a graph of its own."""

    apart = False


_reading = _Reading()


@contextmanager
def rows_apart() -> Iterator[None]:
    """Computes every R when it is read, by itself, so that its backward comes to its own X alone.

    For backwards within a backward, each of which would run through the one node of all R: what counts gradients as
    they arrive (DistributedDataParallel) would see all X once for each.
    """
    before, _reading.apart = _reading.apart, True
    try:
        yield
    finally:
        _reading.apart = before


def _computed(modules: Sequence[OrthonormalRows]) -> Sequence[Tensor]:
    """R of modules on one device and of one dtype."""
    X = [module.X for module in modules]
    with torch.inference_mode(False), torch.enable_grad(), without_autocast(X[0].device):
        wide = torch.promote_types(X[0].dtype, torch.float32)
        problem = OrthonormalProblem(
            tuple(_dense(x.detach(), wide) for x in X),
            tuple(_dense(module.reflectors, wide) for module in modules),
            tuple(_dense(module.signs, wide) for module in modules),
        )
        if any(x.requires_grad for x in X):
            R: tuple[Tensor, ...] = _OrthonormalRowsFunction.apply(problem, *X)
            return R
        return choose("auto", problem).orthonormalize_forward(problem)[0]


def _dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it is contiguous and of that dtype."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def _followed(module: OrthonormalRows) -> Tensor:
    """R in PyTorch's operations alone, which torch.func and forward-mode differentiation follow."""
    with without_autocast(module.X.device):
        X = module.X.to(torch.promote_types(module.X.dtype, torch.float32))
        return orthonormal_reference.orthonormalize(X, module.reflectors, module.signs)


def _traced(modules: Sequence[OrthonormalRows]) -> list[Tensor]:
    """By the op in a compiled graph, where nothing is kept. An X whose R is not used has a gradient of zeros there."""
    found: dict[int, Tensor] = {}
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, module in enumerate(modules):
        kinds.setdefault((module.X.device, module.X.dtype), []).append(i)
    for (device, dtype), members in kinds.items():
        wide = torch.promote_types(dtype, torch.float32)
        with without_autocast(device):
            operands = (
                [_dense(t, wide) for t in ts]
                for ts in zip(*((modules[i].X, modules[i].reflectors, modules[i].signs) for i in members), strict=True)
            )
            R, _ = torch.ops.reft_kernels.orthonormalize_forward(*operands, "auto")
        found.update(zip(members, R, strict=True))
    return [found[i] for i in range(len(modules))]


class _OrthonormalRowsFunction(torch.autograd.Function):
    """Every R as an output of one node, which may be used, and run backward, any number of times until X changes.

    What the backward needs hangs on the node itself: tensors saved the usual way are gone after one backward, but
    R is shared by the micro-batches of a step and by recomputed forwards.
    """

    @staticmethod
    def forward(ctx: Any, problem: OrthonormalProblem, *X: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        R, ctx.factors = choose("auto", problem).orthonormalize_forward(problem)
        ctx.mark_non_differentiable(*(R[i] for i, x in enumerate(X) if not x.requires_grad))
        ctx.problem, ctx.parameters = problem, X
        ctx.versions = [None if x.is_inference() else x._version for x in X]
        return R

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        p: OrthonormalProblem = ctx.problem
        for i, (x, version, grad) in enumerate(zip(ctx.parameters, ctx.versions, grads, strict=True)):
            if grad is not None and version is not None and x._version != version:
                raise RuntimeError(
                    f"X {list(x.shape)}, number {i} of those of which R was computed, has been modified by an inplace "
                    "operation (an optimiser's step, for instance): read `weight` again and compute the loss from that"
                )
        if debug_is_on():
            _check_finite(grads)
        with torch.no_grad(), without_autocast(p.X[0].device):
            dense = [None if g is None else g.to(x.dtype).contiguous() for g, x in zip(grads, p.X, strict=True)]
            dX = choose("auto", p).orthonormalize_backward(dense, p, ctx.factors)
            found = [None if g is None else g.to(x.dtype) for g, x in zip(dX, ctx.parameters, strict=True)]
        if torch.is_grad_enabled():
            found = list(first_derivative_only(tuple(found), (*grads, *ctx.parameters), NO_SECOND_DERIVATIVE))
        return None, *found


def _check_finite(grads: Sequence[Tensor | None]) -> None:
    for index, grad in enumerate(grads):
        if grad is not None and not grad.isfinite().all():
            raise FloatingPointError(f"the gradient of R {list(grad.shape)}, number {index}, is not finite")


def random_rows(d: int, r: int) -> Tensor:
    """R [r, d] float32, drawn uniformly among the matrices with orthonormal rows."""
    start = torch.empty(d, r, dtype=torch.float32)
    nn.init.orthogonal_(start)
    return start.T


def check_sizes(d: int, r: int) -> None:
    """Raises ValueError where no r rows of length d are orthonormal."""
    if not 1 <= r <= d:
        raise ValueError(f"r: expected 1 <= r <= d={d}, got {r}")


def check_rows(R: Tensor, d: int, r: int) -> None:
    """Raises ValueError where R is not [r, d]."""
    if R.shape != (r, d):
        raise ValueError(f"R: expected {[r, d]}, got {list(R.shape)}")


def row_error(R: Tensor) -> float:
    """The largest entry of |R R^T - I|."""
    wide = R.detach().to("cpu", torch.float64)
    return float((wide @ wide.T - torch.eye(len(wide), dtype=torch.float64, device="cpu")).abs().max())


def check_orthonormal(R: Tensor, advice: str = "") -> None:
    """Raises ValueError where the rows of R [r, d] are further than 1e-2 from orthonormal; ``advice`` ends it."""
    error = row_error(R)
    if not error <= 1e-2:
        raise ValueError(f"R: expected orthonormal rows, got rows with |R R^T - I| = {error:.2g}{advice}")


def kept_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A module's conversion, but without casts to less than float32."""

    def keep(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrow = torch.promote_types(moved.dtype, torch.float32) != moved.dtype
        return tensor.to(moved.device) if narrow else moved

    return keep

"""R with orthonormal rows, parametrised without a d x d matrix.

The map is that of ``torch.nn.utils.parametrizations.orthogonal`` (householder, with a trivialising base), which
pyreft uses: X [d, r] holds r reflectors below its diagonal and r signs on it,

    Q = H_1 ... H_r E diag(sign X_jj),   H_j = I - 2 v_j v_j^T / |v_j|^2,   v_j = e_j + (X below the diagonal)_j
    R^T = B Q,                            B orthogonal, constant, with R_0^T as its first r columns

where E is the first r columns of the identity. Both products of reflectors are kept in their compact WY form
(Schreiber and Van Loan, 1989; T from Puglisi, 1992),

    H_1 ... H_r = I - V T V^T,            T^-1 = strict upper part of V^T V + half its diagonal,

so that B is r reflectors and r signs: 2 d r numbers in all instead of d^2, and O(d r^2) work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from reft_kernels.autograd import first_derivative_only
from reft_kernels.problem import wide_default_dtype, without_autocast

_optimizer_steps = 0


def _count_optimizer_step(*_: Any) -> None:
    """Some optimisers write parameters behind autograd's back (``.data``, kernels of their own)."""
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_optimizer_step)


class OrthonormalRows(nn.Module):
    """R [r, d] with orthonormal rows, as a function of an unconstrained parameter X [d, r].

    ``weight`` is R in float32 (float64 if X is), differentiable to X. It is computed once and kept until X
    changes: in place, by an optimiser's step, by ``load_state_dict`` or by a move to another device. Writing into
    ``X.data`` outside an optimiser's step leaves no trace and is not seen; write X under ``torch.no_grad()``. The
    state (X and the base) is exact: a module that loads it has the same R, bit for bit.

    Args:
        d: the length of a row.
        r: the number of rows, at most d.

    Raises:
        ValueError: r is not in [1, d].

    Source: the householder map of torch.nn.utils.parametrizations.orthogonal; pyreft's LowRankRotateLayer.
    """

    reflectors: Tensor
    signs: Tensor

    def __init__(self, d: int, r: int) -> None:
        super().__init__()
        if not 1 <= r <= d:
            raise ValueError(f"r: expected 1 <= r <= d={d}, got {r}")
        self.d, self.r = d, r
        dtype = wide_default_dtype()
        self.X = nn.Parameter(torch.empty(d, r, dtype=dtype))
        self.register_buffer("reflectors", torch.empty(d, r, dtype=dtype))
        self.register_buffer("signs", torch.empty(r, dtype=dtype))
        self._cache: _Cache | None = None
        self._captured = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws R uniformly (``torch.nn.init.orthogonal_``) and makes it the base."""
        start = torch.empty(self.d, self.r, dtype=torch.float32)
        nn.init.orthogonal_(start)
        self.assign(start.T)

    @torch.no_grad()
    def assign(self, R: Tensor) -> None:
        """Makes R [r, d] the base: ``weight`` then equals it to rounding, and X starts anew from -I.

        Raises:
            ValueError: the shape is not [r, d], or the rows are further than 1e-2 from orthonormal.
        """
        if R.shape != (self.r, self.d):
            raise ValueError(f"R: expected {[self.r, self.d]}, got {list(R.shape)}")
        if self.X.is_meta:
            return
        target = R.detach().to("cpu", torch.float64).T  # [d, r]
        error = (target.T @ target - torch.eye(self.r, dtype=torch.float64)).abs().max()
        if not error <= 1e-2:
            raise ValueError(f"R: expected orthonormal rows, got rows with |R R^T - I| = {float(error):.2g}")
        packed, _ = torch.geqrf(target)
        reflectors = (packed.tril(-1) + _identity(packed)).to(self.reflectors.dtype)
        wide = reflectors.double()
        # The signs for which the first columns of the base point along R, whatever geqrf chose.
        signs = (_reflect(wide, _identity(wide)) * target).sum(0).sign()
        self.reflectors.copy_(reflectors)
        self.signs.copy_(signs)
        self.X.copy_(-_identity(self.X))

    @property
    def weight(self) -> Tensor:
        """R [r, d]."""
        if not self._cacheable():
            with without_autocast(self.X.device):
                return self._compute(self.X)
        key = self._key()
        cache = self._cache
        if cache is None or cache.key != key or cache.X is not self.X:
            with torch.inference_mode(False), torch.enable_grad(), without_autocast(self.X.device):
                R = _OrthonormalRowsFunction.apply(self.X, self) if self.X.requires_grad else self._compute(self.X)
            self._cache = cache = _Cache(key, self.X, R)
        return cache.R

    def _cacheable(self) -> bool:
        """Whether a change of X would be seen: not while compiling, not for tensors made in inference mode.

        Nor during and after the capture of a CUDA graph: the graph must hold R's own computation, and its replays
        may write X without a trace.
        """
        if torch.compiler.is_compiling():
            return False
        if self.X.is_cuda and torch.cuda.is_current_stream_capturing():
            self._captured, self._cache = True, None
        return not (self._captured or any(t.is_inference() for t in (self.X, self.reflectors, self.signs)))

    def _key(self) -> tuple[Any, ...]:
        """Changes whenever X or the base may have changed."""
        tensors = (self.X, self.reflectors, self.signs)
        versions = tuple((t.data_ptr(), t._version, t.device, t.dtype) for t in tensors)
        return (*versions, self.X.requires_grad, _optimizer_steps)

    def _compute(self, X: Tensor) -> Tensor:
        """R [r, d] from X [d, r]."""
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        eye = _identity(X)
        Q = _reflect(X.tril(-1) + eye, eye) * torch.where(X.diagonal() < 0, -1.0, 1.0)  # [d, r]
        signs = torch.cat((self.signs.to(X.dtype), self.signs.new_ones(self.d - self.r, dtype=X.dtype)))
        return _reflect(self.reflectors.to(X.dtype), Q * signs[:, None]).T.contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OrthonormalRows:
        """Moves to another device; a cast to less than float32 (``model.to(bfloat16)``) leaves the dtype alone."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrow = torch.promote_types(moved.dtype, torch.float32) != moved.dtype
            return tensor.to(moved.device) if narrow else moved

        super()._apply(keep_wide, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without the cached R, which belongs to an autograd graph and cannot be copied."""
        return {**super().__getstate__(), "_cache": None}

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"d={self.d}, r={self.r}"


class _Cache(NamedTuple):
    key: tuple[Any, ...]
    X: nn.Parameter
    R: Tensor


class _OrthonormalRowsFunction(torch.autograd.Function):
    """R as a node that may be used, and run backward, any number of times until X changes.

    What the backward needs hangs on the node itself: tensors saved the usual way are gone after one backward, but
    R is shared by the micro-batches of a step and by recomputed forwards.
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, module: OrthonormalRows) -> Tensor:
        ctx.parameter = X
        with torch.enable_grad():
            ctx.X = X.detach().requires_grad_()
            ctx.R = module._compute(ctx.X)
        return ctx.R.detach()  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        with without_autocast(grad.device):
            gradients = torch.autograd.grad(ctx.R, ctx.X, grad.detach(), retain_graph=True)
        return first_derivative_only(gradients, (grad, ctx.parameter))[0], None


def _identity(like: Tensor) -> Tensor:
    """The first r columns of the identity, [d, r]."""
    return torch.eye(*like.shape, dtype=like.dtype, device=like.device)


def _reflect(V: Tensor, A: Tensor) -> Tensor:
    """(I - V T V^T) A for V [d, r], unit lower trapezoidal, and A [d, r].

    The sums over d are kept in float64: in float32 they cost R its orthonormality, 6e-6 at d = 4096.
    """
    wide = V.double()
    gram = wide.T @ wide
    inverse_T = gram.triu(1) + (gram.diagonal() / 2).diag()
    coefficients: Tensor = torch.linalg.solve_triangular(inverse_T, wide.T @ A.double(), upper=True)
    return A - V @ coefficients.to(V.dtype)

"""AdamW that keeps the rows of chosen matrices orthonormal, one launch for all parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from reft_kernels.backends.orthonormal_registry import NAMES, choose
from reft_kernels.orthonormal_problem import StiefelProblem
from reft_kernels.stiefel import StiefelParameter

_OWN_DTYPES = (torch.float32, torch.float64)
_NOT_CONSTRAINABLE = "params: expected contiguous float32 or float64 where rows are to stay orthonormal, got {}"


class StiefelAdamW(Optimizer):
    """AdamW whose matrices R [r, d] with orthonormal rows stay orthonormal; everything in one launch a step.

    For a gradient g, clipped to ``max_norm`` over all parameters, step t and a parameter w:

        R only, where ``riemannian``:  g <- g - sym(g R^T) R
        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        all but R:  w <- (1 - lr weight_decay) w
        w <- w - lr m / (1 - beta1^t) / ( sqrt(v / (1 - beta2^t)) + eps )
        R only:  R <- (R R^T)^(-1/2) R,     the nearest matrix with orthonormal rows

    Weight decay has no effect on R, as the retraction would undo it. Where nothing is constrained this is
    ``torch.optim.AdamW``, whose state it reads and writes (``step``, ``exp_avg``, ``exp_avg_sq``).

    Args:
        params: parameters or groups of them. Constrained are those of interventions with ``orthogonality="polar"``
            (:class:`reft_kernels.stiefel.StiefelParameter`) and those of groups with ``orthonormal=True``: contiguous
            [r, d] in float32 or float64, with orthonormal rows at the start.
        lr: a number, or a tensor [] on the device of the parameters (for captured graphs).
        betas, eps, weight_decay, maximize: as of ``torch.optim.AdamW``.
        max_norm: clip the norm of all gradients to this (as ``torch.nn.utils.clip_grad_norm_``); None: do not.
        riemannian: project R's gradients on the tangent space first (Edelman, Arias and Smith, 1998, embedded metric).
        backend: one of auto, triton, cuda, cpu, eager.

    Attributes:
        grad_norm: the norm of all gradients before clipping in the last step, float64 []; None without ``max_norm``.

    Gradients that are not finite: with ``max_norm`` such a step changes nothing, neither parameters nor moments nor
    step counts; ``grad_norm`` tells. Without it a constrained R stays as it was, with its moments and its count, while
    the others do what AdamW does. ``torch.amp.GradScaler`` unscales within the launch, and a step in which it found
    infinities changes nothing. Nothing is read back to the host.

    Raises:
        ValueError: a setting out of range, a constrained parameter that is no such matrix, an unknown backend or one
            that cannot take the parameters.
        TypeError: a sparse or complex gradient.

    Source: AdamW of Loshchilov and Hutter, 2019; retraction by the polar factor, Absil, Mahony and Sepulchre, 2008.
    """

    retracts = True
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float | None = None,
        riemannian: bool = False,
        maximize: bool = False,
        backend: str = "auto",
    ) -> None:
        if backend not in NAMES:
            raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {backend!r}")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm: expected a positive number or None, got {max_norm!r}")
        self.max_norm, self.riemannian, self.backend = max_norm, riemannian, backend
        self.grad_norm: Tensor | None = None
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize,
            "orthonormal": False,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every optimiser; checks the settings and the constrained parameters of the group."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Returns the closure's result, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours, others = self._tensors()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        max_norm, self.grad_norm = self.max_norm, None
        if max_norm is not None and len(ours) + len(others) > 1:  # no launch sees every gradient
            gradients = [one.grad for batch in (*ours.values(), *others.values()) for one in batch]
            self.grad_norm, grad_scale, found_inf = _clipped(gradients, max_norm, grad_scale, found_inf)
            max_norm = None
        for key, batch in ours.items():
            norm = self._launch(key, batch, max_norm, grad_scale, found_inf)
            self.grad_norm = norm if norm is not None else self.grad_norm
        for key, batch in others.items():
            _torchs(key, batch, grad_scale, found_inf)
        return loss

    def _tensors(self) -> tuple[dict[_Settings, list[_Tensors]], dict[_Settings, list[_Tensors]]]:
        """What has a gradient, by settings: what the backends take, and what is left to torch's fused AdamW."""
        ours: dict[_Settings, list[_Tensors]] = {}
        others: dict[_Settings, list[_Tensors]] = {}
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None or parameter.numel() == 0:
                    continue
                if grad.is_sparse or grad.is_complex():
                    raise TypeError(f"params: expected dense real gradients, got {grad.dtype} {grad.layout}")
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                if state["exp_avg"].device != parameter.device:
                    raise RuntimeError(
                        f"params: expected parameters where their state is, on {state['exp_avg'].device}, got one on "
                        f"{parameter.device}; make the optimiser after the model was moved"
                    )
                own = _is_orthonormal(parameter, group)
                mine = parameter.dtype in _OWN_DTYPES and grad.dtype == parameter.dtype and parameter.is_contiguous()
                if own and not mine:
                    raise ValueError(_NOT_CONSTRAINABLE.format(_kind(parameter)))
                decay = group["weight_decay"]
                settings = _Settings(
                    parameter.device, parameter.dtype, _number(lr), beta1, beta2, group["eps"], group["maximize"],
                    0.0 if mine else decay,
                )  # fmt: skip
                one = _Tensors(parameter, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], own, decay, lr)
                (ours if mine else others).setdefault(settings, []).append(one)
        return ours, others

    def _launch(
        self,
        key: _Settings,
        batch: list[_Tensors],
        max_norm: float | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor | None:
        on = key.device
        problem = StiefelProblem(
            tuple(one.parameter for one in batch),
            tuple(one.grad.contiguous() for one in batch),
            tuple(one.exp_avg for one in batch),
            tuple(one.exp_avg_sq for one in batch),
            tuple(one.step for one in batch),
            tuple(one.orthonormal for one in batch),
            tuple(one.weight_decay for one in batch),
            batch[0].lr, key.beta1, key.beta2, key.eps, max_norm, self.riemannian, key.maximize,
            None if grad_scale is None else grad_scale.to(on), None if found_inf is None else found_inf.to(on),
        )  # fmt: skip
        return choose(self.backend, problem).stiefel_adamw_step(problem)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of every optimiser; also reads the state of ``torch.optim.AdamW`` over the same parameters.

        Which parameters are constrained stays what it is where the state does not say it; ``max_norm`` and
        ``riemannian`` are no part of the state.
        """
        constrained = [group["orthonormal"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, constrained, strict=True):
            group.setdefault("orthonormal", own)
            _check_group(group)
            for parameter in group["params"]:
                state = self.state.get(parameter)
                if state and "step" in state:  # AdamW keeps it on the CPU unless it is fused or capturable
                    step = torch.as_tensor(state["step"], dtype=torch.float32)
                    state["step"] = step.to(parameter.device)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        own = {name: getattr(self, name) for name in ("max_norm", "riemannian", "backend")}
        return {**super().__getstate__(), **own, "grad_norm": None}


class _Settings(NamedTuple):
    """What tensors of one launch have in common."""

    device: torch.device
    dtype: torch.dtype
    lr: float | int  # the identity of a tensor
    beta1: float
    beta2: float
    eps: float
    maximize: bool
    weight_decay: float  # 0 where each tensor has its own


class _Tensors(NamedTuple):
    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    orthonormal: bool
    weight_decay: float
    lr: float | Tensor


def _number(lr: float | Tensor) -> float | int:
    return id(lr) if isinstance(lr, Tensor) else lr


def _kind(parameter: Tensor) -> str:
    layout = "" if parameter.is_contiguous() else " that is not contiguous"
    return f"{str(parameter.dtype).removeprefix('torch.')}{layout}"


def _is_orthonormal(parameter: Tensor, group: dict[str, Any]) -> bool:
    return isinstance(parameter, StiefelParameter) or bool(group.get("orthonormal", False))


def _check_group(group: dict[str, Any]) -> None:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: expected a number or a tensor of one element, got {list(lr.shape)}")
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"lr: expected a number of at least 0, got {lr!r}")
    for beta in (beta1, beta2):
        if not 0 <= beta < 1:
            raise ValueError(f"betas: expected two numbers in [0, 1), got {group['betas']!r}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {group[name]!r}")
    for parameter in group["params"]:
        if not _is_orthonormal(parameter, group):
            continue
        shape = list(parameter.shape)
        if len(shape) != 2 or not 1 <= shape[0] <= shape[1]:
            raise ValueError(f"params: expected [r, d] with r <= d where rows are to stay orthonormal, got {shape}")
        if parameter.dtype not in _OWN_DTYPES or not parameter.is_contiguous():
            raise ValueError(_NOT_CONSTRAINABLE.format(_kind(parameter)))


def _clipped(
    gradients: list[Tensor], max_norm: float, grad_scale: Tensor | None, found_inf: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of all gradients; what to divide them by and whether to pass the step over (1), as a GradScaler says."""
    on = gradients[0].device
    norms = [norm.to(on, torch.float64) for norm in torch._foreach_norm(gradients, dtype=torch.float64)]
    scale = torch.ones((), dtype=torch.float64, device=on) if grad_scale is None else grad_scale.to(on).double()
    norm = torch.stack(norms).norm() / scale
    divisor = scale / (max_norm / (norm + 1e-6)).clamp(max=1.0)
    goes = norm.isfinite() if found_inf is None else norm.isfinite() & (found_inf.to(on) == 0)
    return norm, torch.where(norm.isfinite(), divisor, 1.0).float(), (~goes).float()


def _torchs(key: _Settings, batch: list[_Tensors], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """torch's fused AdamW, for what no backend of ours takes: half precision, gradients of another dtype."""
    adamw(
        [one.parameter for one in batch], [one.grad.to(one.parameter.dtype) for one in batch],
        [one.exp_avg for one in batch], [one.exp_avg_sq for one in batch], [], [one.step for one in batch],
        fused=True, amsgrad=False, beta1=key.beta1, beta2=key.beta2, lr=batch[0].lr, weight_decay=key.weight_decay,
        eps=key.eps, maximize=key.maximize,
        grad_scale=None if grad_scale is None else grad_scale.to(key.device),
        found_inf=None if found_inf is None else found_inf.to(key.device),
    )  # fmt: skip

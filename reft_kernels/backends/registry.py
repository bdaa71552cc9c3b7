"""Which backend takes an edit, and why the others do not."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from reft_kernels.backends import cpu, cuda, eager, triton
from reft_kernels.problem import EditProblem, Needs


class Backend(Protocol):
    """What a backend module provides; :mod:`reft_kernels.backends.eager` documents each call."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine; None if it can."""

    def unsupported(self, problem: EditProblem) -> str | None:
        """Why this backend cannot take this edit; None if it can. Reads no tensor's contents."""

    def edit_forward(
        self, problem: EditProblem, inplace: bool, save_rows: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, delta, s, rows before the edit."""

    def edit_backward(
        self,
        grad: Tensor,
        problem: EditProblem,
        delta: Tensor,
        s: Tensor,
        needs: Needs,
        *,
        inplace: bool = False,
        rebuild: bool = False,
        into: tuple[Tensor | None, ...] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """dh, dR, dW, db, dc.

        With ``inplace`` grad [B, S, d] may be overwritten: dh is grad itself, of which the edited rows are written.
        With ``rebuild`` problem.h is y [B, S, d], the tensor after the edit, and the rows before it are
        y - scale * R^T delta; never with dropout. ``into`` names for each of dR, dW, db and dc a contiguous tensor of
        its shape and of a dtype of its own, to which the gradient is added and which is returned for it, or None.
        """


BACKENDS: dict[str, Backend] = {"triton": triton, "cuda": cuda, "cpu": cpu, "eager": eager}
NAMES = ("auto", *BACKENDS)


def order(problem: EditProblem) -> tuple[str, ...]:
    """The backends in the order in which ``auto`` tries them for an edit.

    On a GPU Triton goes before CUDA, as no measurement shows where CUDA is the faster one; elsewhere the CPU kernels
    go first. Triton's interpreter, which takes CPU tensors, is for tests and comes after eager, which takes everything.
    """
    if problem.h.device.type == "cuda":
        return ("triton", "cuda", "eager", "cpu")
    return ("cpu", "eager", "triton", "cuda")


def refusal(backend: Backend, problem: EditProblem) -> str | None:
    """Why ``backend`` would not take ``problem``; None if it would."""
    return backend.unavailable() or backend.unsupported(problem)


def choose(name: str, problem: EditProblem) -> Backend:
    """The backend for one edit.

    ``auto`` takes the first of :func:`order` that can. A backend asked for by name is never replaced by another.

    Raises:
        ValueError: no such backend, or the named one cannot take the edit; the message says why.
    """
    if name == "auto":
        candidates = (BACKENDS[candidate] for candidate in order(problem))
        return next(candidate for candidate in candidates if refusal(candidate, problem) is None)
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    why_not = refusal(backend, problem)
    if why_not is not None:
        raise ValueError(f"backend={name!r} cannot take this edit: {why_not}")
    return backend


def availability() -> dict[str, str]:
    """For each backend ``"ok"``, or the reason why it cannot run on this machine."""
    return {name: backend.unavailable() or "ok" for name, backend in BACKENDS.items()}

"""Which backend takes an edit, and why the others do not."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from reft_kernels.backends import eager, triton
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


# In the order in which `auto` tries them.
BACKENDS: dict[str, Backend] = {"triton": triton, "eager": eager}
NAMES = ("auto", *BACKENDS)


def refusal(backend: Backend, problem: EditProblem) -> str | None:
    """Why ``backend`` would not take ``problem``; None if it would."""
    return backend.unavailable() or backend.unsupported(problem)


def choose(name: str, problem: EditProblem) -> Backend:
    """The backend for one edit.

    ``auto`` takes the first that can, leaving aside Triton's interpreter, which is for tests. A backend asked for
    by name is never replaced by another.

    Raises:
        ValueError: no such backend, or the named one cannot take the edit; the message says why.
    """
    if name == "auto":
        if problem.h.device.type == "cuda" and refusal(triton, problem) is None:
            return triton
        return eager
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

"""R of all layers, forward and backward, and one optimiser step: ours, torch's parametrisation, a batched compact WY.

    python -m benchmarks.orthonormal [--device auto] [--threads 2] [--seconds 2] [--only REGEX]

All sides of a size take turns in one process (on a GPU each is captured in a CUDA graph, by the timers of
``benchmarks.run``). Timed are

    R       from X of every layer to R, and from dL/dR to dL/dX: what happens once per optimiser step
    step    one step of the optimiser over R (or X), W and b of every layer, and then R, ready to be read

"torch" is ``torch.nn.utils.parametrizations.orthogonal`` of one layer, times the layers: its d x d bases for all of
them would take gigabytes. "compact WY" is the same map in plain batched torch operations with autograd, the fewest that
do it, sums in float32. R of each side is compared with that of the oracle in float64 first, and its distance from
orthonormal rows is kept. "state" counts the floats that a layer keeps for R, parameter and buffers, by d r.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from benchmarks.ops import machine, store
from benchmarks.ops.timing import Effort, time_cpu, time_cuda
from reft_kernels import OrthonormalRows, StiefelAdamW, orthonormal_rows
from reft_kernels import orthonormal_reference as reference
from reft_kernels.backends import orthonormal_registry as registry
from reft_kernels.stiefel import StiefelRows

RESULTS = machine.ROOT / "benchmarks" / "results"


class Size(NamedTuple):
    """L layers of R [r, d]."""

    layers: int
    d: int
    r: int

    @property
    def name(self) -> str:
        """As --only searches it."""
        return f"L{self.layers}-d{self.d}-r{self.r}"


SIZES = (
    Size(32, 4096, 8), Size(32, 4096, 1), Size(32, 4096, 4), Size(32, 4096, 64), Size(30, 576, 8), Size(32, 8192, 8),
)  # fmt: skip


class Timed(NamedTuple):
    """A side: what is called, by what its time is multiplied, and R of the first layer for the check."""

    call: Callable[[], object]
    times: int
    R: Tensor | None = None
    expected: Tensor | None = None
    state: float | None = None  # floats kept for R, by d r


def main() -> int:
    """Measures and writes benchmarks/results/orthonormal_<device>.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orthonormal", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each side (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="searched in names such as L32-d4096-r8")
    parser.add_argument("--out", type=Path, help="a folder (default: benchmarks/results)", default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = machine.choose_device(options.device)
    torch.set_default_device(device)
    results: dict[str, Any] = {}
    table = Table("size", "what", "side", "median ms", "over ours", "error", "state")
    for size in SIZES:
        if not re.search(options.only, size.name):
            continue
        results[size.name] = {}
        for what, sides in (("R", rows_sides(size, device)), ("step", step_sides(size, device))):
            found = measure(sides, device, options.seconds)
            results[size.name][what] = found
            for name, one in found.items():
                error, state = one.get("error"), one.get("state")
                table.add_row(
                    size.name, what, name, f"{one['p50_us'] / 1e3:,.3f}", f"{one['times_ours']:,.2f}",
                    "" if error is None else f"{error:.1g}", "" if state is None else f"{state:.2f}",
                )  # fmt: skip
    path = options.out / f"orthonormal_{machine.slug(device)}.json"
    kept = {"environment": machine.environment(device), "backends": backends(device), "sizes": results}
    store.write_json(path, kept)
    Console(width=120).print(table)
    print(path)
    return 0


def backends(device: torch.device) -> list[str]:
    """Ours that run here, the one that ``auto`` takes first."""
    names = registry.order(device)
    return [name for name in names if registry.BACKENDS[name].unavailable() is None]


def rows_sides(size: Size, device: torch.device) -> dict[str, Timed]:
    """R of all layers, forward and backward."""
    modules = [_moved(size.d, size.r) for _ in range(size.layers)]
    grads = [torch.randn(size.r, size.d) for _ in modules]
    X = [module.X for module in modules]
    first = modules[0]
    oracle = reference.orthonormalize(first.X.detach().double(), first.reflectors.double(), first.signs.double())
    state = sum(t.numel() for t in first.state_dict().values()) / (size.d * size.r)
    sides: dict[str, Timed] = {}

    for name in backends(device):
        backend = registry.BACKENDS[name]

        def ours(backend: Any = backend) -> object:
            for module in modules:
                module._cache = None
            with _Only(backend):
                return torch.autograd.grad(orthonormal_rows(modules), X, grads)

        with _Only(backend):
            first._cache = None
            R = first.weight.detach().clone()
        sides[f"reft_kernels {name}"] = Timed(ours, 1, R, oracle, state)

    stacked = [
        torch.stack([t.detach() for t in ts])
        for ts in ([*X], *zip(*((m.reflectors, m.signs) for m in modules), strict=True))
    ]
    leaf, stacked_grads = stacked[0].requires_grad_(), torch.stack(grads)

    def compact() -> object:
        return torch.autograd.grad(compact_wy(leaf, stacked[1], stacked[2]), leaf, stacked_grads)

    with torch.no_grad():
        sides["compact WY"] = Timed(compact, 1, compact_wy(leaf, stacked[1], stacked[2])[0].clone(), oracle, state)

    holder = _torchs(size.d, size.r)
    parameter = holder.parametrizations.weight.original

    def torchs() -> object:
        return torch.autograd.grad(holder.weight, parameter, grads[0].T)

    kept = (size.d * size.r + size.d * size.d) / (size.d * size.r)
    R = holder.weight.detach().T.clone()
    sides["torch"] = Timed(torchs, size.layers, R, None, kept)
    return sides


def step_sides(size: Size, device: torch.device) -> dict[str, Timed]:
    """An optimiser's step over R, W, b of all layers, and R after it."""
    sides: dict[str, Timed] = {}
    for name in backends(device):
        rows = [StiefelRows(size.d, size.r) for _ in range(size.layers)]
        polar = StiefelAdamW(_with_W(rows, size), lr=1e-4, backend=name)
        sides[f"StiefelAdamW {name}"] = Timed(polar.step, 1, None, None, 1.0)
    clipped = StiefelAdamW(
        _with_W([StiefelRows(size.d, size.r) for _ in range(size.layers)], size), lr=1e-4, max_norm=1.0
    )
    sides["StiefelAdamW, clipping"] = Timed(clipped.step, 1)
    for name, keywords in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
        modules = [_moved(size.d, size.r) for _ in range(size.layers)]
        adamw = torch.optim.AdamW(_with_W(modules, size), lr=1e-4, **keywords)

        def step(adamw: Any = adamw, modules: Any = modules) -> object:
            adamw.step()
            return orthonormal_rows(modules)

        sides[f"AdamW {name}, then householder R"] = Timed(step, 1)
        plain = torch.optim.AdamW(
            _with_W([nn.Linear(size.d, size.r, False) for _ in range(size.layers)], size), lr=1e-4, **keywords
        )
        sides[f"AdamW {name}, R free"] = Timed(plain.step, 1)
    holder = _torchs(size.d, size.r)
    alone = torch.optim.AdamW(_with_W([holder], size), lr=1e-4, fused=True)

    def torchs() -> object:
        alone.step()
        with torch.no_grad():
            return holder.weight

    sides["AdamW fused, then torch's R"] = Timed(torchs, size.layers)
    return sides


def measure(sides: dict[str, Timed], device: torch.device, seconds: float) -> dict[str, Any]:
    """Percentiles in microseconds of all sides, and their medians over that of the first."""
    effort = Effort(seconds, least=5, most=400)
    if device.type == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            times = {name: time_cuda([side.call], effort) for name, side in sides.items()}
    else:
        times = time_cpu({name: [side.call] for name, side in sides.items()}, effort)
    ours = next(iter(times.values())).p50
    found: dict[str, Any] = {}
    for name, side in sides.items():
        timing = times[name]
        found[name] = {
            **{f"{q}_us": round(getattr(timing, q) * side.times, 2) for q in ("p20", "p50", "p80")},
            "times_ours": round(timing.p50 * side.times / ours, 3),
            "samples": timing.samples, "method": timing.method, "note": timing.note,
        }  # fmt: skip
        if side.R is not None:
            wide = side.R.double()
            found[name]["error"] = float((wide @ wide.T - torch.eye(len(wide), dtype=torch.float64)).abs().max())
        if side.R is not None and side.expected is not None:
            assert (side.R - side.expected).abs().max() < 1e-4, name
        if side.state is not None:
            found[name]["state"] = round(side.state, 3)
    return found


def compact_wy(X: Tensor, reflectors: Tensor, signs: Tensor) -> Tensor:
    """R [L, r, d] of X [L, d, r]: what plain torch takes for the same map."""
    eye = torch.eye(*X.shape[1:])
    V = X.tril(-1) + eye
    Q = _reflected(V, eye.expand_as(V)) * torch.where(X.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)[:, None]
    Q = torch.cat((Q[:, : X.shape[2]] * signs[:, :, None], Q[:, X.shape[2] :]), 1)
    return _reflected(reflectors, Q).mT


def _reflected(V: Tensor, A: Tensor) -> Tensor:
    gram = V.mT @ V
    inverse = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=1, dim2=2) / 2)
    return A - V @ torch.linalg.solve_triangular(inverse, V.mT @ A, upper=True)


class _Only:
    """Makes ``auto`` one backend."""

    def __init__(self, backend: Any) -> None:
        self._backend, self._kept = backend, dict(registry.BACKENDS)

    def __enter__(self) -> None:
        registry.BACKENDS.update(dict.fromkeys(registry.BACKENDS, self._backend))

    def __exit__(self, *_: object) -> None:
        registry.BACKENDS.update(self._kept)


def _moved(d: int, r: int) -> OrthonormalRows:
    module = OrthonormalRows(d, r)
    with torch.no_grad():
        module.X.add_(torch.randn(d, r).tril(-1), alpha=0.05)
    return module


def _torchs(d: int, r: int) -> Any:
    holder: Any = nn.Module()
    holder.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(d, r)))
    return parametrizations.orthogonal(holder, orthogonal_map="householder")


def _with_W(rows: Sequence[nn.Module], size: Size) -> list[nn.Parameter]:
    """The parameters of R, and of W and b of as many layers, each with a gradient."""
    sources = [nn.Linear(size.d, size.r) for _ in rows]
    parameters = [p for module in (*rows, *sources) for p in module.parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


if __name__ == "__main__":
    sys.exit(main())

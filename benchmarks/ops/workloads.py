"""The registry of workloads: which edits are timed, and the least memory traffic that each can do with."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

MODES = ("forward", "backward", "both")
SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """One edit of h [B, S, d]: P named positions in each batch row, or all of them (P = 0).

    ``inplace`` asks for h and the incoming gradient to be written, where a peer can. ``core`` marks the rows that
    the project's targets are about; they are timed first.
    """

    family: str
    B: int
    S: int
    P: int
    d: int
    r: int
    G: int = 1
    h: str = "bfloat16"
    params: str = "float32"
    activation: str = "linear"
    inplace: bool = True
    core: bool = False

    @property
    def N(self) -> int:
        """Number of edited rows."""
        return self.B * (self.P or self.S)

    @property
    def name(self) -> str:
        """Unique in the registry; what is not the usual choice stands at its end."""
        parts = [f"{self.family}-N{self.N}-d{self.d}-r{self.r}"]
        if self.G > 1:
            parts.append(f"G{self.G}")
        parts.append(_short(self.h) if self.h == self.params else f"{_short(self.h)}.{_short(self.params)}")
        if self.activation != "linear":
            parts.append(self.activation)
        if not self.inplace:
            parts.append("copy")
        return "-".join(parts)


def _short(dtype: str) -> str:
    return dtype.replace("bfloat", "bf").replace("float", "fp")


def minimum_bytes(workload: Workload, mode: str) -> int:
    """The fewest bytes that must cross the memory bus, everything read once and written once.

    With s and p the bytes an element of h and of the parameters takes, and 4 bytes for what the forward keeps for the
    backward (u = f(Wh + b) - Rh, and Wh + b too where f is not linear):

        forward    2 N d s                 rows of h read and written
                   + 2 G r d p             R and W read
                   + 4 N r [+ 4 N r]       u [and Wh + b] written
        backward   3 N d s                 rows of g and h read, of dh written
                   + 2 G r d p             R and W read
                   + 2 G r d p             dR and dW written
                   + 8 N r [+ 4 N r]       u [and Wh + b] read, R g written once for the second pass
        both       the sum

    Out of place, the forward copies the rows that are not named as well: 2 (B S - N) d s. The backward need not, as it
    may overwrite a gradient that nobody else holds. b, db and the positions, less than a thousandth, are left out.

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if mode == "both":
        return minimum_bytes(workload, "forward") + minimum_bytes(workload, "backward")
    w = workload
    rows = w.N * w.d * SIZES[w.h]
    weights = 2 * w.G * w.r * w.d * SIZES[w.params]
    kept = 4 * w.N * w.r
    extra = 0 if w.activation == "linear" else kept
    if mode == "backward":
        return 3 * rows + 2 * weights + 2 * kept + extra
    others = 0 if w.inplace else 2 * (w.B * w.S - w.N) * w.d * SIZES[w.h]
    return 2 * rows + weights + kept + extra + others


def touched_bytes(workload: Workload) -> int:
    """Bytes of distinct memory that a forward reads: the named rows and the weights (all of h where it is copied)."""
    w = workload
    rows = w.N if w.inplace else w.B * w.S
    return rows * w.d * SIZES[w.h] + 2 * w.G * w.r * w.d * SIZES[w.params]


def workloads(device: str, quick: bool = False) -> list[Workload]:
    """The workloads of a kind of device, "cuda" or "cpu", the core ones first; ``quick``: a handful of small ones."""
    if quick:
        return _quick(device)
    found = _unique(_cuda() if device == "cuda" else _cpu())
    return sorted(found, key=lambda w: not w.core)


def _unique(found: Iterable[Workload]) -> list[Workload]:
    by_name: dict[str, Workload] = {}
    for workload in found:
        known = by_name.get(workload.name)
        if known is None or workload.core:
            by_name[workload.name] = workload
    return list(by_name.values())


def _indexed(N: int, d: int, r: int, **changes: object) -> Workload:
    """N rows spread over a batch of prompts: f7+l7 in each of 32 for N = 448."""
    B, S, P = {1: (1, 512, 1), 32: (32, 512, 1), 448: (32, 512, 14), 4096: (64, 512, 64)}[N]
    return replace(Workload("indexed", B, S, P, d, r), **changes)  # type: ignore[arg-type]


def _cuda() -> list[Workload]:
    every_token = Workload("all", 32, 2048, 0, 4096, 4, core=True)
    decode = Workload("decode", 32, 1, 0, 4096, 4, core=True)
    core = [
        _indexed(448, 4096, 4, core=True),
        _indexed(4096, 4096, 4, core=True),
        _indexed(4096, 4096, 8, core=True),
        *(replace(every_token, r=r) for r in (4, 8, 64)),
        *(replace(decode, B=B) for B in (1, 32)),
        _indexed(448, 4096, 8, core=True),
        _indexed(448, 4096, 32, core=True),
        _indexed(448, 4096, 4, G=2, core=True),
    ]
    dtypes = [
        _indexed(448, 4096, 8, h=h, params=params)
        for h, params in (
            ("bfloat16", "bfloat16"), ("float16", "float32"), ("float16", "float16"), ("float32", "float32"),
        )
    ]  # fmt: skip
    plain = replace(every_token, r=8, core=False)
    features = [
        *(_indexed(448, 4096, 8, activation=f) for f in ("gelu", "silu", "relu")),
        replace(plain, activation="gelu"),
        _indexed(448, 4096, 8, inplace=False),
        replace(plain, inplace=False),
        replace(decode, B=256, r=8, G=64, core=False),
        _indexed(4096, 4096, 8, G=64),
        *(replace(plain, d=d) for d in (2048, 8192)),
        *(replace(decode, B=B, r=r, core=False) for B in (1, 32) for r in (1, 8, 64)),
    ]
    grid = [_indexed(N, d, r) for d in (4096, 2048, 8192) for N in (448, 4096, 32, 1) for r in (8, 4, 1, 32, 64)]
    return [*core, *dtypes, *features, *grid]


def _cpu() -> list[Workload]:
    base = Workload("indexed", 32, 128, 14, 4096, 8, h="float32", core=True)
    return [
        base,
        replace(base, d=576),
        *(replace(base, B=B, P=1, d=d, core=False) for d in (4096, 576) for B in (1, 32)),
        replace(base, r=4, core=False),
        replace(base, r=64, core=False),
        replace(base, r=4, G=2, core=False),
        replace(base, activation="gelu", core=False),
        replace(base, inplace=False, core=False),
        replace(base, h="bfloat16", core=False),
        Workload("all", 4, 512, 0, 576, 8, h="float32"),
        Workload("decode", 1, 1, 0, 4096, 4, h="float32"),
        Workload("decode", 32, 1, 0, 4096, 8, G=8, h="float32"),
    ]


def _quick(device: str) -> list[Workload]:
    h = "bfloat16" if device == "cuda" else "float32"
    base = Workload("indexed", 4, 32, 3, 256, 4, h=h, core=True)
    return [
        base,
        replace(base, P=8),
        replace(base, G=2, activation="gelu", inplace=False),
        Workload("all", 4, 64, 0, 256, 8, h=h),
    ]


def sets_needed(workload: Workload, cache_bytes: int) -> int:
    """How many sets a rotation takes so that none is left in the cache: as many as hold twice the cache, and one."""
    return math.ceil(2 * cache_bytes / touched_bytes(workload)) + 1

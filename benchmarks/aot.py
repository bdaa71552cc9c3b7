"""Compiles the Triton kernels ahead of time, without a GPU, and reports what each needs on each architecture.

    python -m benchmarks.aot [--quick] [--out benchmarks/results/triton_resources.csv]

The launchers themselves are run on tensors without memory, with the kernel replaced by a recorder: what is compiled
here is what is launched. Columns: registers a thread, bytes spilled (stack), shared memory a block, and the counts of
16-byte global loads (into registers or straight into shared memory), of fused multiply-adds and of tensor-core
instructions in the machine code. gfx942 is AMD's MI300, where the registers are the vector ones.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks import aot_orthonormal
from benchmarks.h100 import L2_BYTES, PROGRAMS
from benchmarks.machine_code import disassembled, instruction_counts, only, print_table, resource_usage, write_table
from reft_kernels.backends import triton as launcher
from reft_kernels.problem import EditProblem, Needs

# Shared memory that a block may have, in bytes.
SHARED_LIMIT = {
    "sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Case:
    """One edit to compile for: its shape, dtypes and which of the kernel's branches it takes."""

    d: int = 4096
    r: int = 8
    h: str = "bfloat16"
    weights: str = "float32"
    activation: str = "linear"
    subtract: bool = True
    positions: bool = True
    group: bool = False
    dropout: float = 0.0
    rebuild: bool = False


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs."""

    kernel: str
    arch: str
    d: int
    r: int
    h: str
    weights: str
    activation: str
    subtract: bool
    positions: bool
    group: bool
    dropout: float
    rebuild: bool
    method: str
    warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    wide_loads: int
    ffma: int
    mma: int
    mma_tf32: int


def cases(quick: bool) -> list[Case]:
    """The configurations that are reported; the first few of them when ``quick``."""
    ranks = [Case(r=r) for r in (1, 4, 8, 16, 32, 64)]
    every_token = [Case(r=r, positions=False) for r in (4, 8, 64)]
    if quick:
        return [
            *ranks,
            *every_token,
            Case(d=768, r=4, h="float16", weights="float16", activation="gelu"),
            Case(d=576, r=8, h="float32", positions=False, group=True, activation="tanh", dropout=0.1),
            Case(r=64, activation="silu", group=True, dropout=0.1),
            Case(r=8, activation="gelu", positions=False, rebuild=True),
        ]
    dtypes = [Case(r=r, h=h, weights=w) for r in (4, 64) for h, w in
              (("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16"))]  # fmt: skip
    widths = [Case(d=d, r=r, positions=positions) for d in (2048, 8192) for r in (8, 64) for positions in (True, False)]
    branches = [
        Case(d=d, r=r, activation=activation, subtract=subtract, positions=positions, group=group, dropout=dropout)
        for (d, r), activation, (subtract, positions), (group, dropout) in itertools.product(
            ((576, 8), (4096, 64)), ("gelu", "tanh"), ((True, True), (False, False)), ((False, 0.0), (True, 0.1)),
        )
    ]  # fmt: skip
    rebuilt = [Case(r=r, activation=f, positions=False, rebuild=True) for r in (8, 64) for f in ("linear", "silu")]
    return [*ranks, *every_token, *dtypes, *widths, *branches, *rebuilt]


def compile_case(case: Case, arch: str) -> list[Report]:
    """Both kernels of one case, for one architecture."""
    reports = []
    for name, kernel, arguments in _recorded(case, arch):
        compiled = _compile(kernel, arguments, arch)
        resources = _resources(compiled)
        reports.append(
            Report(
                kernel=name,
                arch=arch,
                **asdict(case),
                method=arguments["METHOD"],
                warps=compiled.metadata.num_warps,
                shared_bytes=compiled.metadata.shared,
                **resources,
            )
        )
    return reports


def compile_matrices(r: int, arch: str) -> list[Report]:
    """The kernels of matrices with orthonormal rows; what only edits have is left empty, and ``method`` says which
    phases a launch goes through."""
    case = Case(r=r, h="float32")
    edits_alone = dict.fromkeys(("activation", "subtract", "positions", "group", "dropout", "rebuild"), "")
    reports = []
    for name, kernel, arguments in aot_orthonormal.recorded(case.d, (r,) * aot_orthonormal.MATRICES):
        compiled = _compile(kernel, arguments, arch)
        reports.append(
            Report(
                kernel=name,
                arch=arch,
                **(asdict(case) | edits_alone),
                method=aot_orthonormal.phases(arguments),
                warps=compiled.metadata.num_warps,
                shared_bytes=compiled.metadata.shared,
                **_resources(compiled),
            )
        )
    return reports


def _recorded(case: Case, arch: str) -> list[tuple[str, Any, dict[str, Any]]]:
    """Name, kernel and arguments of every launch that a forward and a backward of ``case`` make."""
    h_dtype, w_dtype = getattr(torch, case.h), getattr(torch, case.weights)
    batch, length, slots, groups = 32, 512, 14, 4 if case.group else 1
    grid = (batch, slots if case.positions else length)
    meta: dict[str, Any] = {"device": "meta"}
    problem = EditProblem(
        h=torch.empty(batch, length, case.d, dtype=h_dtype, **meta),
        R=torch.empty(groups, case.r, case.d, **meta),
        W=torch.empty(groups, case.r, case.d, dtype=w_dtype, **meta),
        b=torch.empty(groups, case.r, dtype=w_dtype, **meta),
        c=None,
        positions=torch.empty(grid, dtype=torch.int64, **meta) if case.positions else None,
        group=torch.empty(grid, dtype=torch.int64, **meta) if case.group else None,
        scale=None,
        seed=torch.empty(1, dtype=torch.int64, **meta) if case.dropout else None,
        subtract=case.subtract,
        activation=case.activation,
        dropout=case.dropout,
    )
    launches: list[tuple[str, Any, dict[str, Any]]] = []
    with _recording(launches, arch):
        _, delta, s, _ = launcher.edit_forward(problem, inplace=case.rebuild, save_rows=False)
        needs = Needs(True, True, True, True, False)
        grad = torch.empty_like(problem.h)
        launcher.edit_backward(grad, problem, delta, s, needs, inplace=True, rebuild=case.rebuild)
    return launches


@contextlib.contextmanager
def _recording(launches: list[tuple[str, Any, dict[str, Any]]], arch: str = "sm_90") -> Iterator[None]:
    """Replaces the launcher's kernels by recorders, and what would ask a GPU by constants."""
    kernels = launcher._kernels()

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*positional: Any, **named: Any) -> None:
                arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
                launches.append((self.kernel.fn.__name__.removesuffix("_kernel"), self.kernel, arguments))

            return launch

    recorders = SimpleNamespace(
        forward=Recorder(kernels.forward), backward=Recorder(kernels.backward), accumulators=kernels.accumulators
    )
    replaced = {
        "_kernels": lambda: recorders,
        "barrier_word": lambda device: torch.empty(1, dtype=torch.int32, device=device),
        "interpreted": lambda: False,
        "_on_amd": lambda: arch.startswith("gfx"),
        "resident_programs": lambda device: PROGRAMS,
        "warpgroups": lambda device: arch in ("sm_90", "sm_100"),
        "_l2_bytes": lambda device: L2_BYTES,
    }
    originals = {name: getattr(launcher, name) for name in replaced}
    try:
        for name, replacement in replaced.items():
            setattr(launcher, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(launcher, name, original)


def _compile(kernel: Any, arguments: dict[str, Any], arch: str) -> Any:
    """Compiles as Triton's own launch would: the same types, the same specialisation on 1 and on multiples of 16."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    divisible = [["tt.divisibility", 16]]
    options = dict(arguments)
    for index, parameter in enumerate(kernel.params):
        value = options.pop(parameter.name)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = divisible
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = divisible
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    return triton.compile(source, target=target, options=options)


def _resources(compiled: Any) -> dict[str, int]:
    """Registers, stack and instruction counts: of AMD's assembly, or by the disassemblers of Triton's own package."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        return {
            "registers": int(only(r"\.vgpr_count:\s+(\d+)", code)),
            "spill_bytes": 4 * int(only(r"\.vgpr_spill_count:\s+(\d+)", code)),
            "wide_loads": len(re.findall(r"\b(?:global|buffer)_load_(?:dwordx4|lds_dwordx4)", code)),
            "ffma": len(re.findall(r"\bv_(?:pk_)?fma\w*_f32", code)),
            "mma": len(re.findall(r"\bv_mfma", code)),
            "mma_tf32": len(re.findall(r"\bv_mfma\w*xf32", code)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = resource_usage(Path(file.name)), disassembled(Path(file.name))
    counts = instruction_counts(code)
    return {
        "registers": int(only(r"REG:(\d+)", usage)),
        "spill_bytes": int(only(r"STACK:(\d+)", usage)),
        **{kind: counts[kind] for kind in ("wide_loads", "ffma", "mma", "mma_tf32")},
    }


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints the table and writes it where --out says; 1 if a kernel spills or has too much shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few configurations instead of all")
    parser.add_argument("--arch", nargs="+", choices=list(SHARED_LIMIT), default=list(SHARED_LIMIT))
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(argv)
    reports: list[Report] = []
    todo: list[tuple[Callable[[Any, str], list[Report]], Any, str]] = [
        (compile_case, case, arch) for case in cases(options.quick) for arch in options.arch
    ]
    todo += [
        (compile_matrices, r, arch)
        for r in aot_orthonormal.reported_ranks(options.quick)
        for arch in options.arch
        if not arch.startswith("gfx")  # not tried there yet
    ]
    for index, (compile_one, case, arch) in enumerate(todo):
        if sys.stderr.isatty():
            print(f"\r{index + 1}/{len(todo)}", end="", file=sys.stderr, flush=True)
        reports += compile_one(case, arch)
    rows = [asdict(report) for report in reports]
    print_table(rows)
    if options.out is not None:
        write_table(rows, options.out)
    bad = [r for r in reports if r.spill_bytes > 0 or r.shared_bytes > SHARED_LIMIT[r.arch]]
    for report in bad:
        print(f"over its limits: {report}")
    print(f"{len(reports)} kernels compiled with Triton {triton.__version__}; {len(bad)} over their limits")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

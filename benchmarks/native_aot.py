"""Compiles the CUDA kernels of csrc for every architecture, without a GPU, and reports what each needs.

    python -m benchmarks.native_aot [--arch 90a ...] [--file edit_forward_float32 ...] [--out benchmarks/results/...csv]

Fails where a kernel spills registers or keeps anything on a stack, or lacks an instruction that it was written for.
Columns: registers a thread; bytes of stack and spilled; then counts in the machine code: of all instructions, of global
loads of 16 bytes (into registers or straight into shared memory), of fused multiply-adds and tensor-core instructions,
of copies from global to shared memory by threads and in bulk, of arrivals at cluster barriers, of shuffles, and of
barriers of a block.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.machine_code import disassembled, instruction_counts, only, output_of, print_table, write_table
from benchmarks.ops.machine import ROOT, commit

ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
CUDA = ROOT / "csrc" / "cuda"

# Of kernels by their names and template arguments: the least architecture that they are launched on, and instructions
# that they are for. The last argument of the forward's says whether a cluster shares a row.
CLAIMS: list[tuple[str, int, tuple[str, ...]]] = [
    (r"edit_forward_rows<.*, false>", 80, ("wide_loads", "ffma", "async_copies", "shuffles")),
    (r"edit_forward_rows<.*, true>", 90, ("wide_loads", "ffma", "bulk_copies", "cluster_barriers", "shuffles")),
    (r"edit_forward_mma<.*>", 80, ("wide_loads", "mma")),
    (r"edit_backward_rows<.*>", 80, ("wide_loads", "ffma", "async_copies", "shuffles")),
    (r"edit_backward_mma<.*>", 80, ("wide_loads", "mma", "async_copies")),
    (r"orthonormalize_kernel<.*>", 80, ("wide_loads", "ffma", "shuffles")),
    (r"stiefel_adamw_step_kernel<.*>", 80, ("wide_loads", "ffma", "shuffles")),
]


def compiled(file: str, arch: str) -> list[dict[str, object]]:
    """What each kernel of csrc/cuda/``file``.cu needs on an architecture."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        run = subprocess.run(
            ["nvcc", "-std=c++17", "-O3", "-fmad=true", "-Xptxas=-O3,-v", "--diag-suppress=177", f"-arch=sm_{arch}",
             "-I", str(CUDA.parent / "include"), "-cubin", "-o", str(cubin), str(CUDA / f"{file}.cu")],
            capture_output=True, text=True,
        )  # fmt: skip
        if run.returncode != 0:
            raise RuntimeError(f"{file}.cu for sm_{arch}:\n{run.stderr}")
        usage = re.split(r"Compiling entry function '(\S+)' for 'sm_\w+'\n", run.stderr)[1:]
        code = re.split(r"\n\.text\.(\S+?):\n", disassembled(cubin))[1:] if usage else []
    code_of = dict(zip(code[::2], code[1::2], strict=True))
    names = output_of("c++filt", *usage[::2]).splitlines() if usage else []
    rows = []
    for mangled, name, text in zip(usage[::2], names, usage[1::2], strict=True):
        template = re.search(r"reft_kernels::(\w+)<(.*)>\(reft_kernels::", name)
        if template is None:
            continue  # a kernel that the launchers only ask the runtime about
        kernel, arguments = template[1], template[2].replace("reft_kernels::", "").replace(" >", ">").strip()
        rows.append({
            "kernel": kernel,
            "arguments": arguments,
            "arch": arch,
            "registers": int(only(r"Used (\d+) registers", text)),
            "stack_bytes": int(only(r"(\d+) bytes stack frame", text)),
            "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
            "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code_of[mangled], re.MULTILINE)),
            **instruction_counts(code_of[mangled]),
        })  # fmt: skip
    return rows


def faults(row: dict[str, object]) -> list[str]:
    """What is wrong with a kernel."""
    found = [f"{row[kind]} {kind}" for kind in ("stack_bytes", "spill_bytes") if row[kind]]
    claims = [claim for claim in CLAIMS if re.fullmatch(claim[0], f"{row['kernel']}<{row['arguments']}>")]
    if len(claims) != 1:
        return [*found, "a kernel of which nothing is known"]
    _, least, instructions = claims[0]
    if int(str(row["arch"]).rstrip("a")) >= least:
        found += [f"no {kind}" for kind in instructions if not row[kind]]
    return found


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints the table and writes it where --out says; 1 if a kernel is not as it should be."""
    files = sorted(path.stem for path in CUDA.glob("*.cu"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--file", nargs="+", choices=files, default=files)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(argv)
    if shutil.which("nvcc") is None:
        print("nvcc is not on the PATH", file=sys.stderr)
        return 2
    version = only(r"release [\d.]+, V([\d.]+)", output_of("nvcc", "--version"))
    todo = [(file, arch) for file in options.file for arch in options.arch]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "1"))) as pool:
        found = pool.map(lambda job: compiled(*job), todo)
        rows = [{**row, "nvcc": version, "commit": commit()} for part in found for row in part]
    rows.sort(key=lambda row: (row["kernel"], row["arguments"], ARCHITECTURES.index(str(row["arch"]))))
    print_table(rows)
    if options.out is not None:
        write_table(rows, options.out)
    bad = [(row, wrong) for row in rows if (wrong := faults(row))]
    for row, wrong in bad:
        print(f"{row['kernel']}<{row['arguments']}> for sm_{row['arch']}: {', '.join(wrong)}")
    print(f"{len(rows)} kernels compiled with nvcc {version}; {len(bad)} not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

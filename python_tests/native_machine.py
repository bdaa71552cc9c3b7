"""Builds and loads the CUDA kernels of csrc for the CPU (python_tests/native), and the ops that run them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_kernels.backends import cuda_orthonormal, native, native_orthonormal, native_schemas
from reft_kernels.orthonormal_problem import OrthonormalProblem, StiefelProblem

HERE = Path(__file__).parent / "native"
CSRC = HERE.parents[1] / "csrc"
NAMESPACE = "reft_kernels_on_cpu"
CACHE = Path(tempfile.gettempdir()) / "reft_kernels_native"

# -Og compiles the kernels in about half the time that -O1 takes, and they run about as fast.
_COMMON = ["-Og", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-DREFT_KERNELS_ON_CPU"]
_SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
_MACHINE_SOURCES = ("machine.cpp", "primitives.cpp", "races.cpp", "fiber.cpp")
# Has the compiler report every access of a kernel to the machine, which has ThreadSanitizer's functions for that.
_REPORT_ACCESSES = ["-fsanitize=thread"]


@functools.cache
def compiler() -> str:
    """g++, or the reason to skip what needs it."""
    found = shutil.which("g++")
    if found is None:
        pytest.skip("needs g++ (Debian: package g++)")
    return found


def _ninja() -> str:
    beside = Path(sys.executable).parent / "ninja"
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        pytest.skip("needs ninja (pip install ninja)")
    return found


def build(
    name: str, sources: Sequence[str], *, sanitize: bool = False, csrc: Path = CSRC, flags: Sequence[str] = ()
) -> Path:
    """A shared library of kernels (.cu) and host code, by which the machine's is loaded as well.

    Args:
        name: of the library.
        sources: files of ``csrc`` or, if there are none of that name, of python_tests/native.
        sanitize: with AddressSanitizer and UBSan; then races are not looked for.
        csrc: the folder of the sources, to build a changed copy.
        flags: more of them, for the sources.

    Each is built once on a machine, whichever process comes first, and again in parts when sources change.
    """
    torch_root = Path(torch.__file__).parent
    headers = [f"-I{HERE}", f"-I{HERE / 'cuda_runtime'}", f"-I{csrc / 'include'}", f"-I{csrc}"]
    common = [*_COMMON, *headers, *(_SANITIZE if sanitize else [])]
    rule = (
        "rule compile\n  command = $compiler -MMD -MF $out.d $flags -c $in -o $out\n  depfile = $out.d\n  deps = gcc\n"
        "rule link\n  command = $compiler -shared $in -o $out $flags\n"
    )
    lines = ["ninja_required_version = 1.5", f"compiler = {compiler()}", rule]

    def compiled(path: Path, *flags: str) -> str:
        out = f"{path.name}.o"
        if not any(line.startswith(f"build {out}:") for line in lines):
            lines.append(f"build {out}: compile {path}\n  flags = {' '.join([*common, *flags])}")
        return out

    machine = [compiled(HERE / file, "-std=c++17", "-O2") for file in _MACHINE_SOURCES]
    link = " ".join(_SANITIZE if sanitize else [])
    # Templates that both libraries have are each its own: those of the kernels report their accesses.
    lines.append(f"build libmachine.so: link {' '.join(machine)}\n  flags = {link} -Wl,-Bsymbolic -Wl,-z,defs -ldl")
    objects = []
    for file in sources:
        path = csrc / file if (csrc / file).exists() else HERE / file
        if path.suffix == ".cu":
            own = ["-std=c++17", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-x c++"]
            own += [] if sanitize else _REPORT_ACCESSES
        elif file.endswith("ops_on_cpu.cpp"):
            own = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-isystem {torch_root / 'include'}"]
        else:
            own = ["-std=c++17"]
        if file.startswith("edit_") and file.endswith("_plan.cpp"):  # other plans stand in their place
            own += [f"-Dplan_edit_{way}=planned_edit_{way}" for way in ("forward", "backward")]
        objects.append(compiled(path, *own, *flags))
    torch_libraries = (
        f"-L{torch_root / 'lib'} -Wl,--no-as-needed -ltorch_cpu -lc10"
        if any(file.endswith("ops_on_cpu.cpp") for file in sources)
        else ""
    )
    lines.append(
        f"build {name}.so: link {' '.join(objects)} | libmachine.so\n"
        f"  flags = {link} -L. -lmachine -Wl,-rpath,'$$ORIGIN' -Wl,-z,defs {torch_libraries}"
    )
    version = subprocess.run([compiler(), "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\0".join([*lines, version, str(csrc)]).encode()).hexdigest()[:16]
    folder = CACHE / f"{name}_{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        run = subprocess.run([_ninja(), "-j2", "-C", str(folder), f"{name}.so"], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{name}: {run.stdout[-6000:]}{run.stderr[-2000:]}")
    return folder / f"{name}.so"


_LAUNCHED = [
    "launches_on_cpu.cpp", "ops_on_cpu.cpp", "forced_forward.cpp", "forced_backward.cpp", "edit_forward_plan.cpp",
    "edit_backward_plan.cpp",
]  # fmt: skip
KERNEL_SOURCES = [*_LAUNCHED, *(f"cuda/{path.name}" for path in sorted((CSRC / "cuda").glob("edit_*.cu")))]
# One kernel of each kind, for bfloat16 rows with R in float32 and W in bfloat16.
FEW_SOURCES = [*_LAUNCHED, "few_forward.cu", "few_backward.cu"]


ORTHONORMAL_SOURCES = [
    "launches_on_cpu.cpp", "orthonormal_ops_on_cpu.cpp", "matrix_plan.cpp", "cuda/orthonormalize.cu",
    "cuda/stiefel_adamw.cu",
]  # fmt: skip


@dataclass(frozen=True)
class Device:
    """A made-up GPU."""

    capability: int = 90  # 10 * major + minor
    multiprocessors: int = 3
    shared_bytes: int = 227 * 1024
    l2_bytes: int = 50 << 20


KERNELS = ("forward_rows", "forward_cluster", "forward_mma", "backward_rows", "backward_mma")


@dataclass(frozen=True)
class Wishes:
    """What a test asks of the plan; None: as planned. See forced_plans.h."""

    kernel: str | None = None
    tile_rows: int | None = None
    rank_tile: int | None = None
    slab: int | None = None
    cluster: int | None = None
    threads: int | None = None
    blocks: int | None = None
    chunk: int | None = None
    staged: bool | None = None
    shared_bytes: int | None = None


class Library:
    """A library of kernels, whose device and order of threads a test can choose."""

    def __init__(self, library: Path, schemas: tuple[str, ...]) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.on_cpu_launches.restype = ctypes.c_uint64
        self.library.on_cpu_barrier.restype = ctypes.c_uint32
        _define(schemas)
        torch.ops.load_library(str(library))
        self.use(Device())

    def use(self, device: Device = Device()) -> None:
        """Launches from now on are planned for this device."""
        self.library.on_cpu_device(
            device.capability, device.multiprocessors, device.shared_bytes, ctypes.c_int64(device.l2_bytes)
        )

    def seed(self, seed: int) -> None:
        """Of the order of the next launch's threads; the launches after it go on from there."""
        self.library.on_cpu_seed(ctypes.c_uint64(seed))

    @property
    def launches(self) -> int:
        """Since the library was loaded."""
        return int(self.library.on_cpu_launches())

    @property
    def barrier(self) -> int:
        """The word of the grid barrier, which all launches share."""
        return int(self.library.on_cpu_barrier())


@functools.cache
def _define(schemas: tuple[str, ...]) -> torch.library.Library:
    """The ops in the namespace of the machine, once."""
    return native.define(NAMESPACE, schemas)


class Machine(Library):
    """The ops of edits by a library of kernels: a backend, whose plans a test can choose besides."""

    name = "cuda"

    def __init__(self, library: Path) -> None:
        super().__init__(library, native_schemas.SCHEMAS)
        ops = native.NativeOps(NAMESPACE)
        self.edit_forward, self.edit_backward = ops.edit_forward, ops.edit_backward

    @contextlib.contextmanager
    def forced(self, forward: Wishes | None = None, backward: Wishes | None = None) -> Iterator[None]:
        """Within the context plans are as wished, as far as the kernels can."""
        self._force(forward or Wishes(), backward or Wishes())
        try:
            yield
        finally:
            self._force(Wishes(), Wishes())

    def _force(self, *both: Wishes) -> None:
        for is_forward, wishes in zip((True, False), both, strict=True):
            fields = [KERNELS.index(w) if isinstance(w, str) else -1 if w is None else int(w) for w in astuple(wishes)]
            self.library.on_cpu_force(is_forward, (ctypes.c_int64 * len(fields))(*fields))

    @property
    def plan(self) -> dict[str, Any]:
        """Of the last launch."""
        names = ("kernel", "tile_rows", "rank_tile", "slab", "cluster", "threads", "blocks", "chunk", "shared_bytes")
        fields = (ctypes.c_int64 * len(names))()
        self.library.on_cpu_last_plan(fields)
        plan: dict[str, Any] = dict(zip(names, fields, strict=True))
        return {**plan, "kernel": KERNELS[plan["kernel"]]}


class OrthonormalMachine(Library):
    """The ops of matrices with orthonormal rows by a library of kernels: a backend."""

    name = "cuda"

    def __init__(self, library: Path) -> None:
        super().__init__(library, native_schemas.ORTHONORMAL_SCHEMAS)
        ops = native_orthonormal.NativeOrthonormalOps(NAMESPACE)
        self.orthonormalize_forward, self.orthonormalize_backward = (
            ops.orthonormalize_forward,
            ops.orthonormalize_backward,
        )
        self.stiefel_adamw_step = ops.stiefel_adamw_step

    def unavailable(self) -> str | None:
        """It is there."""
        return None

    def unsupported_matrices(self, problem: OrthonormalProblem | StiefelProblem) -> str | None:
        """What the CUDA backend would say of the problem, were it on a GPU."""
        return cuda_orthonormal.unsupported_sizes(problem)


def toy_library(*, sanitize: bool = False) -> ctypes.CDLL:
    """The kernels of toy_kernels.cu."""
    library = ctypes.CDLL(str(build("toys", ["toy_kernels.cu"], sanitize=sanitize)))
    library.run_toy.restype = ctypes.c_char_p
    library.run_toy.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64]
    return library


__all__ = [
    "CACHE", "CSRC", "FEW_SOURCES", "HERE", "KERNEL_SOURCES", "ORTHONORMAL_SOURCES", "Device", "Library", "Machine",
    "OrthonormalMachine", "Wishes", "build", "compiler",
    "toy_library",
]  # fmt: skip

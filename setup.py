"""Build script: the native library by CMake; everything declarative is in pyproject.toml.

What is built follows from what is there, and the build says so. Environment variables:

    REFT_KERNELS_SKIP_CUDA_BUILD=1   leave the CUDA kernels out
    REFT_KERNELS_FORCE_CUDA_BUILD=1  build them although the installed torch has no CUDA, and fail where they cannot be
    TORCH_CUDA_ARCH_LIST             architectures instead of the usual ones, as for torch: "8.0;9.0a;12.0+PTX"
    CUDA_HOME, CUDA_PATH             where the CUDA toolkit is
    MAX_JOBS                         compilers at once; by default as many as cores and free memory allow
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OPS_LIBRARY = "libreft_kernels_ops.so"
OLDEST_MAJOR = 8  # compute capability
OLDEST_CUDA = (12, 8)
# What the sources ask of a compiler beyond C++17.
PROBE = """
typedef float V __attribute__((vector_size(16)));
template <auto f> constexpr auto call = f;
V shuffled(V v) { return __builtin_shufflevector(v, v, 3, 2, 1, 0); }
"""
# Of one compiler: nvcc's on the largest source, all architectures, one after another.
BYTES_OF_COMPILER = 3 << 30


def tool(name: str) -> str | None:
    """A program's path: of this Python's environment, active or not, or on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def say(text: str) -> None:
    """A line of the build's report; pip shows it with -v."""
    print(f"reft_kernels: {text}", file=sys.stderr, flush=True)


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def cuda_toolkit() -> Path | None:
    """The CUDA toolkit's folder: one with a compiler and its headers."""
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    beside = str(Path(nvcc).resolve().parent.parent) if nvcc else None
    for folder in (*named, beside, "/usr/local/cuda"):
        if folder and (Path(folder) / "bin/nvcc").is_file() and (Path(folder) / "include/cuda_runtime.h").is_file():
            return Path(folder)
    return None


def torch_has_cuda() -> bool:
    """Whether the torch that is built against is one for CUDA; its libraries tell, without importing it."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    return (Path(torch.origin).parent / "lib/libtorch_cuda.so").is_file()


def cuda_version(toolkit: Path) -> tuple[int, int]:
    """Of a toolkit's compiler; (0, 0) if it does not tell."""
    told = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", told)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def why_no_cuda(toolkit: Path | None) -> str | None:
    """Why the CUDA kernels are left out; None if they are built."""
    forced = is_set("REFT_KERNELS_FORCE_CUDA_BUILD")
    if is_set("REFT_KERNELS_SKIP_CUDA_BUILD"):
        if forced:
            raise SystemExit(
                "reft_kernels: REFT_KERNELS_SKIP_CUDA_BUILD and REFT_KERNELS_FORCE_CUDA_BUILD are both set"
            )
        return "REFT_KERNELS_SKIP_CUDA_BUILD is set"
    if toolkit is None:
        if forced:
            raise SystemExit(
                "reft_kernels: REFT_KERNELS_FORCE_CUDA_BUILD is set, but no CUDA toolkit was found "
                "(looked for bin/nvcc and include/cuda_runtime.h in CUDA_HOME, CUDA_PATH, beside nvcc on PATH, "
                "/usr/local/cuda)"
            )
        return "no CUDA toolkit was found"
    version = cuda_version(toolkit)
    if version < OLDEST_CUDA:
        reason = "CUDA {}.{} or newer is needed, {} has {}.{}".format(*OLDEST_CUDA, toolkit, *version)
        if forced:
            raise SystemExit(f"reft_kernels: REFT_KERNELS_FORCE_CUDA_BUILD is set, but {reason}")
        return reason
    if not torch_has_cuda() and not forced:
        return "the installed torch has no CUDA (REFT_KERNELS_FORCE_CUDA_BUILD=1 builds them all the same)"
    return None


def architectures(listed: str) -> str:
    """TORCH_CUDA_ARCH_LIST as CMake has it: "8.0;9.0a+PTX" to "80-real;90a-real;90a-virtual".

    Entries that no kernel is for are left out, as such lists are often set for everything that torch runs on.
    """
    found, too_old = [], []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(
                f"reft_kernels: TORCH_CUDA_ARCH_LIST: expected entries like 9.0a or 12.0+PTX, got {entry!r}"
            )
        if int(match[1]) < OLDEST_MAJOR:
            too_old.append(entry)
            continue
        name = match[1] + match[2]
        found += [f"{name}-real", *([f"{name}-virtual"] if match[3] else [])]
    if too_old and not found:
        raise SystemExit(
            f"reft_kernels: TORCH_CUDA_ARCH_LIST: the CUDA kernels need {OLDEST_MAJOR}.0 or newer, got {listed!r}"
        )
    if too_old:
        say(f"no CUDA kernels for {', '.join(too_old)}: they need {OLDEST_MAJOR}.0 or newer")
    return ";".join(found)


def jobs() -> int:
    """How many compilers to run at once."""
    wanted = os.environ.get("MAX_JOBS")
    if wanted:
        if not wanted.isdecimal():
            raise SystemExit(f"reft_kernels: MAX_JOBS: expected a number, got {wanted!r}")
        return max(1, int(wanted))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, free // BYTES_OF_COMPILER))


def compiles(compiler: str) -> bool:
    """Whether a compiler takes what the sources ask of it."""
    probe = [compiler, "-x", "c++", "-std=c++20", "-fsyntax-only", "-"]
    return subprocess.run(probe, input=PROBE, capture_output=True, text=True).returncode == 0


def missing_tools() -> str | None:
    """What the native library cannot be built without, if it is not there."""
    if sys.platform != "linux":
        return f"Linux (this is {sys.platform})"
    if importlib.util.find_spec("torch") is None:
        return "torch, whose headers it is compiled with"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11"
    if tool("cmake") is None:
        return "cmake"
    compiler = next(filter(None, map(tool, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        return "a C++ compiler"
    if not compiles(compiler):
        return f"a newer C++ compiler than {compiler} (C++20, g++ 12 or clang 12)"
    return None


class BuildNative(build_ext):
    """Configures and builds with CMake what stands for the two extensions below."""

    def run(self) -> None:
        missing = missing_tools()
        if missing is not None:
            if is_set("REFT_KERNELS_FORCE_CUDA_BUILD"):
                raise SystemExit(f"reft_kernels: REFT_KERNELS_FORCE_CUDA_BUILD is set, but {missing} is missing")
            say(f"NOT building the native kernels: {missing} is missing. Triton and plain torch do without them.")
            self.extensions = []
            return
        toolkit = cuda_toolkit()
        reason = why_no_cuda(toolkit)
        say("building the CPU kernels")
        options = ["-DREFT_KERNELS_CUDA=OFF", f"-DREFT_KERNELS_CUDA_REASON={reason}"]
        if reason is None:
            listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
            # Without a list, what an earlier build in the same folder had is forgotten.
            named = f"-DCMAKE_CUDA_ARCHITECTURES={architectures(listed)}" if listed else "-UCMAKE_CUDA_ARCHITECTURES"
            options = ["-DREFT_KERNELS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={toolkit}/bin/nvcc", named]
            say(f"building the CUDA kernels with {toolkit} for {listed or 'the usual architectures'}")
        else:
            say(f"NOT building the CUDA kernels: {reason}")
        ninja = tool("ninja")
        if ninja is not None:
            options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        if tool("ccache"):
            options += ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache", "-DCMAKE_CUDA_COMPILER_LAUNCHER=ccache"]
        # In the source tree the same folder every time, so that only what changed is compiled.
        build = ROOT / "build" / Path(self.build_temp).name if self.inplace else Path(self.build_temp).resolve()
        installed = build / "installed"
        build.mkdir(parents=True, exist_ok=True)
        cmake = tool("cmake") or "cmake"
        commands = (
            [cmake, "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
             f"-DPython_EXECUTABLE={sys.executable}", *options],
            [cmake, "--build", str(build), "--parallel", str(jobs())],
            [cmake, "--install", str(build), "--prefix", str(installed), "--strip"],
        )  # fmt: skip
        for command in commands:
            status = subprocess.run(command).returncode
            if status:
                raise SystemExit(f"reft_kernels: {' '.join(command)} failed with exit status {status}")
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        for file in (installed / "reft_kernels").iterdir():
            # Replaced as a whole: a running process may have the old one mapped.
            new = target / "reft_kernels" / f".{file.name}.new"
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, new)
            new.replace(new.with_name(file.name))

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "reft_kernels" / name) for name in self._products()]

    def get_output_mapping(self) -> dict[str, str]:
        """Of an editable installation: where each product lies in the source tree."""
        return {
            str(Path(self.build_lib) / "reft_kernels" / n): str(ROOT / "reft_kernels" / n) for n in self._products()
        }

    def _products(self) -> list[str]:
        if not self.extensions:
            return []
        return [Path(self.get_ext_filename("reft_kernels._native")).name, OPS_LIBRARY]


setup(ext_modules=[Extension("reft_kernels._native", [])], cmdclass={"build_ext": BuildNative})

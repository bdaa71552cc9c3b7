"""setup.py: what it builds natively, with what, and what it says where it cannot."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

setuptools = pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = (
    "REFT_KERNELS_SKIP_CUDA_BUILD", "REFT_KERNELS_FORCE_CUDA_BUILD", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH",
    "MAX_JOBS", "CXX",
)  # fmt: skip


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module that set nothing up, where none of its environment variables is set."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("reft_kernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit_in(folder: Path, *, headers: bool = True, version: str = "13.0") -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include/cuda_runtime.h").touch()
    return folder


@pytest.mark.parametrize(
    ("listed", "found"),
    [
        ("9.0a", "90a-real"),
        ("8.0;9.0a+PTX", "80-real;90a-real;90a-virtual"),
        (" 8.6, 8.9  10.3f\n", "86-real;89-real;103f-real"),
        ("12.0;12.0+PTX", "120-real;120-real;120-virtual"),
    ],
)
def test_architectures_as_cmake_names_them(build: ModuleType, listed: str, found: str) -> None:
    assert build.architectures(listed) == found


@pytest.mark.parametrize("entry", ["Hopper", "90", "9", "9.0b", "9.0+ptx", "-9.0", "sm_90"])
def test_no_architecture(build: ModuleType, entry: str) -> None:
    with pytest.raises(SystemExit, match=rf"TORCH_CUDA_ARCH_LIST: expected .*, got '{re.escape(entry)}'"):
        build.architectures(f"8.0;{entry}")


def test_architectures_that_are_too_old(build: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"need 8\.0 or newer, got '7\.0 7\.5\+PTX'"):
        build.architectures("7.0 7.5+PTX")
    assert build.architectures("7.5 9.0a 10.0+PTX") == "90a-real;100-real;100-virtual"


def test_toolkits_that_are_too_old(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "torch_has_cuda", lambda: True)
    toolkit = toolkit_in(tmp_path, version="12.6")
    assert "CUDA 12.8 or newer is needed" in build.why_no_cuda(toolkit)
    monkeypatch.setenv("REFT_KERNELS_FORCE_CUDA_BUILD", "1")
    with pytest.raises(SystemExit, match=r"12\.8 or newer is needed, .* has 12\.6"):
        build.why_no_cuda(toolkit)


def test_compilers_that_are_too_old(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert build.missing_tools() is None
    compiler = tmp_path / "g++-9"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert "a newer C++ compiler than" in build.missing_tools()


def test_cuda_is_built_where_torch_has_it(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolkit = toolkit_in(tmp_path / "cuda")
    monkeypatch.setattr(build, "torch_has_cuda", lambda: True)
    assert build.why_no_cuda(toolkit) is None
    assert build.why_no_cuda(None) == "no CUDA toolkit was found"
    monkeypatch.setattr(build, "torch_has_cuda", lambda: False)
    assert "the installed torch has no CUDA" in build.why_no_cuda(toolkit)


def test_cuda_is_skipped_on_demand(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolkit = toolkit_in(tmp_path / "cuda")
    monkeypatch.setattr(build, "torch_has_cuda", lambda: True)
    monkeypatch.setenv("REFT_KERNELS_SKIP_CUDA_BUILD", "1")
    assert build.why_no_cuda(toolkit) == "REFT_KERNELS_SKIP_CUDA_BUILD is set"
    monkeypatch.setenv("REFT_KERNELS_FORCE_CUDA_BUILD", "1")
    with pytest.raises(SystemExit, match="are both set"):
        build.why_no_cuda(toolkit)
    monkeypatch.setenv("REFT_KERNELS_SKIP_CUDA_BUILD", "0")
    assert build.why_no_cuda(toolkit) is None


def test_cuda_is_forced(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolkit = toolkit_in(tmp_path / "cuda")
    monkeypatch.setattr(build, "torch_has_cuda", lambda: False)
    monkeypatch.setenv("REFT_KERNELS_FORCE_CUDA_BUILD", "1")
    assert build.why_no_cuda(toolkit) is None
    with pytest.raises(SystemExit, match="FORCE_CUDA_BUILD is set, but no CUDA toolkit was found"):
        build.why_no_cuda(None)


def test_where_the_toolkit_is_looked_for(build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home, path, beside = (toolkit_in(tmp_path / name) for name in ("home", "path", "beside"))
    # A link to nvcc, as packages of distributions have it, leads to the folder that it lies in.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").symlink_to(beside / "bin/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert build.cuda_toolkit() == beside
    monkeypatch.setenv("CUDA_PATH", str(path))
    assert build.cuda_toolkit() == path
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert build.cuda_toolkit() == home
    monkeypatch.setenv("CUDA_HOME", str(toolkit_in(tmp_path / "no_headers", headers=False)))
    assert build.cuda_toolkit() == path


def test_jobs_that_are_asked_for(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, jobs in (("3", 3), ("0", 1)):
        monkeypatch.setenv("MAX_JOBS", wanted)
        assert build.jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a number, got 'many'"):
        build.jobs()


@pytest.mark.parametrize(("gibibytes", "jobs"), [(1, 1), (13, 4), (1000, 64)])
def test_jobs_that_memory_allows(build: ModuleType, monkeypatch: pytest.MonkeyPatch, gibibytes: int, jobs: int) -> None:
    pages = {"SC_AVPHYS_PAGES": gibibytes << 18, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    assert build.jobs() == jobs


def test_jobs_where_memory_is_not_told(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise ValueError(name)

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(os, "sysconf", refuse)
    assert build.jobs() == 64


def test_what_is_missing(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, programs = {"torch", "pybind11"}, {"cmake", "clang++"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)
    monkeypatch.setattr(build, "tool", lambda name: name if name in programs else None)
    monkeypatch.setattr(build, "compiles", lambda compiler: True)
    assert build.missing_tools() is None
    for there, name, said in (
        (programs, "clang++", "a C++ compiler"),
        (programs, "cmake", "cmake"),
        (modules, "pybind11", "pybind11"),
        (modules, "torch", "torch"),
    ):
        there.remove(name)
        assert build.missing_tools().startswith(said)


def test_a_named_compiler_is_one(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(build, "tool", lambda name: name if name in {"cmake", "icpx"} else None)
    monkeypatch.setattr(build, "compiles", lambda compiler: True)
    assert build.missing_tools() == "a C++ compiler"
    monkeypatch.setenv("CXX", "icpx")
    assert build.missing_tools() is None


def command(build: ModuleType, folder: Path) -> setuptools.Command:
    extension = setuptools.Extension("reft_kernels._native", [])
    found = build.BuildNative(setuptools.Distribution({"name": "reft_kernels", "ext_modules": [extension]}))
    found.build_lib, found.build_temp = str(folder / "lib"), str(folder / "temp")
    found.ensure_finalized()
    return found


def test_nothing_is_built_without_a_compiler(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(build, "missing_tools", lambda: "a C++ compiler")
    builder = command(build, tmp_path)
    builder.run()
    assert "NOT building the native kernels: a C++ compiler is missing" in capsys.readouterr().err
    assert builder.get_outputs() == []
    assert builder.get_output_mapping() == {}
    monkeypatch.setenv("REFT_KERNELS_FORCE_CUDA_BUILD", "1")
    with pytest.raises(SystemExit, match="FORCE_CUDA_BUILD is set, but a C\\+\\+ compiler is missing"):
        command(build, tmp_path).run()


def test_what_is_built_is_installed(build: ModuleType, tmp_path: Path) -> None:
    builder = command(build, tmp_path)
    module, library = map(Path, builder.get_outputs())
    assert module.parent == library.parent == tmp_path / "lib/reft_kernels"
    assert module.name.startswith("_native.")
    assert library.name == "libreft_kernels_ops.so"
    assert builder.get_output_mapping() == {
        str(file): str(ROOT / "reft_kernels" / file.name) for file in (module, library)
    }


@pytest.mark.parametrize("listed", [None, "9.0a"])
def test_cmake_is_told_of_cuda(
    build: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    listed: str | None,
) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0 if len(commands) == 1 else 2)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(build, "missing_tools", lambda: None)
    monkeypatch.setattr(build, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(build, "cuda_version", lambda toolkit: (13, 0))
    monkeypatch.setenv("CUDA_HOME", str(toolkit_in(tmp_path / "toolkit")))
    if listed:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(SystemExit, match=r"cmake\S* --build .* failed with exit status 2"):
        command(build, tmp_path).run()
    assert f"building the CUDA kernels with {tmp_path / 'toolkit'}" in capsys.readouterr().err
    assert {"-DREFT_KERNELS_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={tmp_path / 'toolkit/bin/nvcc'}"} <= set(commands[0])
    named = "-DCMAKE_CUDA_ARCHITECTURES=90a-real" if listed else "-UCMAKE_CUDA_ARCHITECTURES"
    assert named in commands[0]


def test_cmake_is_told_why_there_is_no_cuda(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(build, "missing_tools", lambda: None)
    monkeypatch.setenv("REFT_KERNELS_SKIP_CUDA_BUILD", "1")
    with pytest.raises(SystemExit, match="failed with exit status 1"):
        command(build, tmp_path).run()
    assert "NOT building the CUDA kernels: REFT_KERNELS_SKIP_CUDA_BUILD is set" in capsys.readouterr().err
    assert {"-DREFT_KERNELS_CUDA=OFF", "-DREFT_KERNELS_CUDA_REASON=REFT_KERNELS_SKIP_CUDA_BUILD is set"} <= set(
        commands[0]
    )

"""Which backend takes an edit, and what is said about the others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reft_kernels import available_backends, edit, explain
from reft_kernels.backends import cpu, cuda, eager, native, registry, triton
from reft_kernels.functional import _normalise
from reft_kernels.problem import Needs
from reft_kernels.testing import EditCase, poison_empty, random_edit


def problem(**changes):
    h, R = changes.pop("h", torch.randn(2, 8)), changes.pop("R", torch.randn(2, 8))
    return _normalise(h, R, None, None, None, None, None, None, True, "linear", 0.0, None)


def test_available_backends_under_the_interpreter() -> None:
    found = available_backends()
    assert list(found) == ["triton", "cuda", "cpu", "eager"]
    assert found["triton"] == found["eager"] == "ok"


def test_the_native_library_is_built() -> None:
    """Only where there is nothing to build it with it may be missing: then everything else works without it."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    assert available_backends()["cpu"] == "ok"


def test_every_backend_has_the_whole_protocol() -> None:
    for name, backend in registry.BACKENDS.items():
        assert backend.name == name
        for call in ("unavailable", "unsupported", "edit_forward", "edit_backward"):
            assert callable(getattr(backend, call))
    assert registry.NAMES == ("auto", "triton", "cuda", "cpu", "eager")


def test_auto_leaves_the_interpreter_aside() -> None:
    assert registry.choose("auto", problem()) is (cpu if cpu.unavailable() is None else eager)
    assert registry.choose("triton", problem()) is triton
    assert registry.choose("eager", problem()) is eager


def test_auto_takes_the_kernels_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

    on_gpu = problem()._replace(h=OnGpu())
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unsupported", lambda p: None)
    assert registry.choose("auto", on_gpu) is triton
    monkeypatch.setattr(triton, "unsupported", lambda p: "too large")
    monkeypatch.setattr(cuda, "unsupported", lambda p: None)
    assert registry.choose("auto", on_gpu) is cuda
    monkeypatch.setattr(cuda, "unsupported", lambda p: "too large")
    assert registry.choose("auto", on_gpu) is eager


def test_one_asked_for_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "unavailable", lambda: "it is Sunday")
    with pytest.raises(ValueError, match=r"backend='triton' cannot take this edit: it is Sunday"):
        edit(torch.randn(2, 8), torch.randn(2, 8), backend="triton")
    assert explain(torch.randn(2, 8), torch.randn(2, 8))["triton"] == "it is Sunday"
    assert available_backends()["triton"] == "it is Sunday"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend: expected one of auto, triton, cuda, cpu, eager, got 'tpu'"):
        registry.choose("tpu", problem())


def test_explain_takes_what_edit_takes() -> None:
    o = random_edit(EditCase("noreft_with_c", "gelu", positions="some", groups=2, scale="rows", dropout=0.2))
    said = explain(o.h, **o.keywords(), inplace=True, backend="triton")
    assert list(said) == ["cpu", "eager", "triton", "cuda"]
    assert said["eager"] == said["triton"] == "ok"
    assert said["cpu"] == available_backends()["cpu"]
    assert said["cuda"] != "ok" or torch.cuda.is_available()
    assert "r=65" in explain(torch.randn(2, 100), torch.randn(65, 100))["triton"]


@pytest.mark.parametrize("backend", [eager, cpu, triton], ids=lambda b: b.name)
@pytest.mark.parametrize("activation", ["linear", "tanh"])
@pytest.mark.parametrize("save_rows", [False, True])
def test_what_the_calls_return(save_rows: bool, activation: str, backend) -> None:
    """delta and s are the accumulator's, zero where nothing is edited; saved rows are those before the edit."""
    o = random_edit(EditCase(activation=activation, dtype="mixed", positions="padded", shape=(2, 4), slots=3, r=2))
    p = _normalise(o.h, o.R, o.W, o.b, None, o.positions, None, None, True, activation, 0.0, None)
    for inplace in (False, True):
        h = o.h.clone()
        with poison_empty():
            y, delta, s, rows = backend.edit_forward(p._replace(h=h), inplace, save_rows)
        assert (y.data_ptr() == h.data_ptr()) == inplace
        assert delta.dtype == s.dtype == torch.float32
        assert delta.shape == (6, 2)
        assert s.shape == ((0,) if activation == "linear" else (6, 2))
        edited = (o.positions >= 0).reshape(-1)
        assert not delta[~edited].any()
        assert activation == "linear" or not s[~edited].any()
        if save_rows:
            batch, slot = (o.positions >= 0).nonzero(as_tuple=True)
            assert torch.equal(rows[edited], o.h[batch, o.positions[batch, slot]])
        else:
            assert rows.numel() == 0
        grad = torch.randn(2, 4, 60).to(o.h.dtype)
        found = backend.edit_backward(grad, p, delta, s, Needs(False, False, False, False, False))
        assert found == (None,) * 5


def run(code: str, **environment: str) -> str:
    root = str(Path(__file__).parents[1])
    full = {**os.environ, "PYTHONPATH": root, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_needs_neither_triton_nor_cuda() -> None:
    code = """
import sys
import reft_kernels, torch
print([m for m in ("triton", "transformers", "datasets") if m in sys.modules], torch.cuda.is_initialized())
"""
    assert run(code) == "[] False"


def test_without_the_interpreter_and_without_a_gpu_triton_says_why() -> None:
    code = """
import torch, reft_kernels
print(reft_kernels.available_backends()["triton"])
h, R = torch.randn(2, 8), torch.randn(2, 8)
reft_kernels.edit(h, R)
try:
    reft_kernels.edit(h, R, backend="triton")
except ValueError as error:
    print(error)
"""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = run(code, TRITON_INTERPRET="0").splitlines()
    assert said[0].startswith("no GPU")
    assert said[1].startswith("backend='triton' cannot take this edit: no GPU")


def test_without_the_package_triton_says_so() -> None:
    code = """
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else find(name, *a)
import reft_kernels
print(reft_kernels.available_backends())
reft_kernels.edit(torch.randn(2, 8), torch.randn(2, 8))
"""
    said = run(code)
    assert said.startswith("{'triton': 'the package triton is not installed', ")
    assert said.endswith("'eager': 'ok'}")


def test_without_the_native_library_it_is_said_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.so", "is not built"), (Path(__file__), "does not load: .*(header|magic|ELF)")):
        monkeypatch.setattr(native, "LIBRARY", path)
        native.load.cache_clear()
        try:
            with pytest.raises(ValueError, match=rf"backend='cpu' cannot take this edit: the native library {why}"):
                edit(torch.randn(2, 8), torch.randn(2, 8), backend="cpu")
            assert registry.choose("auto", problem()) is eager
        finally:
            native.load.cache_clear()


STALE = "the native library was built from other sources; build it again (make setup, or pip install)"


@pytest.mark.parametrize("where", ["library", "module"])
def test_a_library_for_other_schemas_is_not_used(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.unavailable() is not None:
        pytest.skip("the native library is not built")
    told = native.build_info()
    if where == "library":
        monkeypatch.setattr(native, "FINGERPRINT", "of other schemas")
        monkeypatch.setattr(native, "build_info", dict)
    else:
        monkeypatch.setattr(native, "build_info", lambda: {**told, "schemas": "other"})
    native.load.cache_clear()
    try:
        assert native.load() == STALE
        assert registry.choose("auto", problem()) is eager
    finally:
        native.load.cache_clear()


def test_a_library_that_tells_no_schemas_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    older = tmp_path / "libolder.so"
    subprocess.run([compiler, "-shared", "-o", older, "-xc", "/dev/null"], check=True)
    monkeypatch.setattr(native, "LIBRARY", older)
    native.load.cache_clear()
    try:
        assert native.load() == STALE
    finally:
        native.load.cache_clear()


def test_kernels_are_compiled_for_these_types_alone() -> None:
    """What the CUDA backend refuses before it looks at a device."""

    def said(**dtypes: torch.dtype) -> str | None:
        h, R = torch.zeros(2, 8, dtype=dtypes["h"]), torch.zeros(2, 8, dtype=dtypes["R"])
        W = torch.zeros(2, 8, dtype=dtypes["W"]) if "W" in dtypes else None
        return cuda.unsupported_operands(problem(h=h, R=R)._replace(W=W))

    half, wide = torch.bfloat16, torch.float32
    for taken in ({"h": wide, "R": wide}, {"h": half, "R": half}, {"h": half, "R": wide, "W": half}):
        assert said(**taken) is None
    assert said(h=half, R=half, W=wide) == "no kernel was compiled for h of bfloat16, R of bfloat16 and W of float32"
    assert "float64" in (said(h=torch.float64, R=torch.float64) or "")
    assert cuda.unsupported_operands(problem(R=torch.zeros(65, 8))) == "takes ranks up to 64, got r=65"

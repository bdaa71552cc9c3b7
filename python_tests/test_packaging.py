"""What is shipped and what importing it needs: versions, wheel and sdist contents, imports without optional parts."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import reft_kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "reft_kernels"

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in [name for name in sys.modules if name.partition(".")[0] in {blocked!r}]:
    del sys.modules[name]
"""
# A table of launch configurations: the folder is shipped whatever tables it holds.
PROBE = "reft_kernels/triton/configs/probe.json"
OPTIONAL = ("triton", "transformers", "accelerate", "datasets", "sklearn", "matplotlib", "rich", "gguf")


def run_python(script: str, cwd: Path = ROOT, **environment: str) -> str:
    """stdout of a script in a fresh interpreter that has not TRITON_INTERPRET set."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    ran = subprocess.run([sys.executable, "-c", script], cwd=cwd, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def pyproject(pattern: str) -> str:
    match = re.search(pattern, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None, f"pyproject.toml has no {pattern}"
    return match[1]


def test_version_is_said_once() -> None:
    assert reft_kernels.__version__ == pyproject(r'^version = "(.+)"$')
    assert f"## {reft_kernels.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_supported_pythons_agree() -> None:
    oldest = tuple(map(int, pyproject(r'^requires-python = ">=(.+)"$').split(".")))
    assert pyproject(r'^target-version = "py(.+)"$') == f"{oldest[0]}{oldest[1]}"
    assert f"sys.version_info < {oldest}" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-pyreft.txt"])
def test_pinned_setuptools_suits_every_torch(file: str) -> None:
    """torch 2.11 and 2.12 want less than 82, 2.13 and 2.14 at least 77.0.3."""
    match = re.search(r"^setuptools==(\d+)\.(\d+)\.(\d+)$", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None
    assert (77, 0, 3) <= tuple(map(int, match.groups())) < (82,)


@pytest.mark.parametrize("blocked", [("triton",), ("transformers",), OPTIONAL], ids=["triton", "transformers", "all"])
def test_import_and_edit_without(blocked: tuple[str, ...]) -> None:
    script = BLOCK.format(blocked=blocked) + (
        "import torch, reft_kernels as k\n"
        "h, R, W, b = torch.randn(3, 8), torch.linalg.qr(torch.randn(8, 2))[0].T, torch.randn(2, 8), torch.randn(2)\n"
        "y = k.loreft(h, R, W, b)\n"
        "torch.testing.assert_close(y, h + (h @ W.T + b - h @ R.T) @ R)\n"
        "try:\n"
        f"    import {blocked[0]}\n"
        "except ModuleNotFoundError:\n"
        "    print('edited')\n"
    )
    assert run_python(script) == "edited"


def test_import_brings_nothing_optional() -> None:
    script = f"import sys, reft_kernels; print([n for n in {OPTIONAL!r} if n in sys.modules])"
    assert run_python(script) == "[]"


def test_import_does_not_initialise_cuda() -> None:
    script = (
        "import torch\n"
        "def initialise(*_):\n"
        "    raise AssertionError('CUDA was initialised')\n"
        "torch._C._cuda_init = torch.cuda._lazy_init = initialise\n"
        "import reft_kernels\n"
        "assert not torch.cuda.is_initialized()\n"
        "print('imported')\n"
    )
    assert run_python(script) == "imported"


def test_every_public_name_is_there() -> None:
    pytest.importorskip("transformers")
    for name in reft_kernels.__all__:
        assert getattr(reft_kernels, name) is not None, name
    assert set(reft_kernels.__all__) <= set(dir(reft_kernels))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = reft_kernels.no_such_name


def package_files() -> set[str]:
    """Files of the package that have to be shipped, relative to the root."""
    shipped = [PACKAGE / "py.typed"] + [path for end in ("py", "pyi", "json") for path in PACKAGE.rglob(f"*.{end}")]
    return {path.relative_to(ROOT).as_posix() for path in shipped}


def build_dist(kind: str, source: Path, folder: Path) -> Path:
    """The sdist or the wheel that a source tree gives; its CUDA kernels, where there is nvcc, are left out."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    env = {**os.environ, "REFT_KERNELS_SKIP_CUDA_BUILD": "1", "REFT_KERNELS_FORCE_CUDA_BUILD": "0"}
    ran = subprocess.run([sys.executable, "-c", script], cwd=source, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (built,) = folder.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, of a copy that holds no leftovers of other builds."""
    pytest.importorskip("setuptools", minversion="77")
    base = tmp_path_factory.mktemp("sdist")
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "*.egg-info", "build", "dist", "__pycache__", ".*_cache", "demo_output"
    )
    shutil.copytree(ROOT, base / "source", ignore=ignore)
    probe = base / "source" / PROBE
    probe.parent.mkdir(exist_ok=True)
    probe.write_text("{}")
    return build_dist("sdist", base / "source", base)


@pytest.fixture
def native_files() -> set[str]:
    """What is compiled into the wheel, where there is a compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return set()
    return {f"reft_kernels/_native{sysconfig.get_config_var('EXT_SUFFIX')}", "reft_kernels/libreft_kernels_ops.so"}


@pytest.mark.slow
def test_wheel_of_the_sdist(sdist: Path, native_files: set[str], tmp_path: Path) -> None:
    """It holds the package with its native kernels and nothing else, and edits natively wherever it is installed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (source,) = (tmp_path / "source").iterdir()
    wheel = build_dist("wheel", source, tmp_path)
    check_contents(wheel, native_files, tmp_path)
    if native_files:
        check_edit(wheel, tmp_path)


def check_contents(wheel: Path, native_files: set[str], built_in: Path) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.startswith(f"reft_kernels-{reft_kernels.__version__}-{python}-{python}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"reft_kernels-{reft_kernels.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        binaries = {name: archive.read(name) for name in native_files & names}
    shipped = {name for name in names if not name.startswith(f"{info}/")}
    assert shipped == package_files() | {PROBE} | native_files
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata
    for name, binary in binaries.items():
        assert str(built_in).encode() not in binary, f"{name} names the folder that it was built in"


def check_edit(wheel: Path, folder: Path) -> None:
    pytest.importorskip("pip")
    target, elsewhere = folder / "target", folder / "elsewhere"
    elsewhere.mkdir()
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    script = (
        "import torch, reft_kernels as k\n"
        "from reft_kernels import _native\n"
        f"assert k.__file__.startswith({str(target)!r}), k.__file__\n"
        f"assert _native.__file__.startswith({str(target)!r}), _native.__file__\n"
        "assert _native.build_info()['version'] == k.__version__\n"
        "assert k.available_backends()['cpu'] == 'ok', k.available_backends()\n"
        "h, R, W, b = torch.randn(3, 40), torch.randn(2, 40), torch.randn(2, 40), torch.randn(2)\n"
        "operands = [t.requires_grad_() for t in (h, R, W, b)]\n"
        "found, expected = (k.edit(*operands, backend=name) for name in ('cpu', 'eager'))\n"
        "torch.testing.assert_close(found, expected)\n"
        "g = torch.randn(3, 40)\n"
        "for pair in zip(*(torch.autograd.grad(y, operands, g) for y in (found, expected))):\n"
        "    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)\n"
        "print('edited')\n"
    )
    assert run_python(script, cwd=elsewhere, PYTHONPATH=str(target)) == "edited"


def test_package_depends_on_little(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        stem = f"reft_kernels-{reft_kernels.__version__}"
        member = archive.extractfile(f"{stem}/PKG-INFO")
        assert member is not None
        metadata = member.read().decode()
    needs = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if "Requires-Dist: " in line]
    assert {re.split(r"[><=;\s]", need)[0] for need in needs if "extra ==" not in need} == {
        "numpy", "safetensors", "torch"
    }  # fmt: skip


def test_tables_of_launch_configurations_are_looked_for_where_they_are_shipped() -> None:
    from reft_kernels.triton.launch_configs import SHIPPED_FOLDER

    assert (ROOT / PROBE).parent == SHIPPED_FOLDER


def test_sdist_builds_and_tests_itself(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "CHANGELOG.md", "CMakeLists.txt", "Makefile", "pyproject.toml", "setup.py"}
    needed |= {"benchmarks/demo.py"} | {path.name for path in ROOT.glob("requirements*.txt")}
    for folder in ("csrc", "python_tests"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        needed |= {path.relative_to(ROOT).as_posix() for path in files}
    assert (needed | package_files() | {PROBE}) <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def imports_of(path: Path) -> set[str]:
    """Top-level names that a module imports when it is itself imported, `if TYPE_CHECKING` blocks aside."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_optional_packages_stay_in_their_rooms() -> None:
    """Triton is imported in triton/ alone, transformers and what comes with it in training/ and model code."""
    for path in PACKAGE.rglob("*.py"):
        room, imports = path.relative_to(PACKAGE).parts[0], imports_of(path)
        if room != "triton":
            assert "triton" not in imports, path
        if room not in {"training", "cli", "model.py"}:
            assert not imports & {"transformers", "accelerate", "datasets", "sklearn"}, path


def test_no_path_of_a_machine_is_shipped() -> None:
    word = re.compile(r"/(?:work|home|root|tmp|opt)/\w")
    files = [
        *PACKAGE.rglob("*.py"),
        *ROOT.glob("requirements*.txt"),
        *(path for path in (ROOT / "csrc").rglob("*") if path.is_file()),
        *(ROOT / name for name in ("CMakeLists.txt", "Makefile", "pyproject.toml", "setup.py")),
    ]
    for path in files:
        match = word.search(path.read_text(encoding="utf-8"))
        assert match is None, f"{path}: {match and match[0]}"

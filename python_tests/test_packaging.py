"""What is shipped and what importing it needs: versions, wheel and sdist contents, imports without optional parts."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
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


def run_python(script: str, **environment: str) -> str:
    """stdout of a script in a fresh interpreter that has not TRITON_INTERPRET set."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
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
    shipped = [*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.json"), PACKAGE / "py.typed"]
    return {path.relative_to(ROOT).as_posix() for path in shipped}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the wheel and the sdist, built from a copy that holds no leftovers of other builds."""
    pytest.importorskip("setuptools", minversion="77")
    base = tmp_path_factory.mktemp("build")
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "*.egg-info", "build", "dist", "__pycache__", ".*_cache", "demo_output"
    )
    shutil.copytree(ROOT, base / "source", ignore=ignore)
    probe = base / "source" / PROBE
    probe.parent.mkdir(exist_ok=True)
    probe.write_text("{}")
    script = (
        "from setuptools import build_meta\n"
        f"build_meta.build_sdist({str(base)!r})\n"
        f"build_meta.build_wheel({str(base)!r})\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=base / "source", capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return base


def test_wheel_holds_the_package_and_nothing_else(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"reft_kernels-{reft_kernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"reft_kernels-{reft_kernels.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
    shipped = {name for name in names if not name.startswith(f"{info}/")}
    assert shipped == package_files() | {PROBE}
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_wheel_depends_on_little(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"reft_kernels-{reft_kernels.__version__}.dist-info/METADATA").decode()
    needs = re.findall(r"^Requires-Dist: (\S+?)[><=; ].*$|^Requires-Dist: (\S+)$", metadata, re.MULTILINE)
    base = {
        re.split(r"[><=;\s]", line.removeprefix("Requires-Dist: "))[0]
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    }
    assert needs
    assert base == {"numpy", "safetensors", "torch"}


def test_tables_of_launch_configurations_are_looked_for_where_they_are_shipped() -> None:
    from reft_kernels.triton.launch_configs import SHIPPED_FOLDER

    assert (ROOT / PROBE).parent == SHIPPED_FOLDER


def test_sdist_builds_and_tests_itself(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {"LICENSE", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py", "python_tests/conftest.py"}
    needed |= {"benchmarks/demo.py"} | {path.name for path in ROOT.glob("requirements*.txt")}
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
        *(ROOT / name for name in ("Makefile", "pyproject.toml")),
    ]
    for path in files:
        match = word.search(path.read_text(encoding="utf-8"))
        assert match is None, f"{path}: {match and match[0]}"

"""The examples run from end to end on toys of base models, and use no name that pyreft does not have."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reft_kernels

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))
# What the examples take of pyreft, all of it in its __init__.
PYREFT = {
    "ConsreftIntervention", "LoreftIntervention", "ReftConfig", "ReftDataCollator", "ReftModel",
    "ReftSupervisedDataset", "ReftTrainerForCausalLM", "get_reft_model", "make_last_position_supervised_data_module",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _verbosity() -> Iterator[None]:
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def run(name: str, folder: Path, *more: str) -> dict[str, Any]:
    """What an example's main() returns with --tiny."""
    found: dict[str, Any] = importlib.import_module(f"examples.{name}").main(["--tiny", "--output", str(folder), *more])
    return found


def test_quickstart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("quickstart", tmp_path)
    assert found["losses"][-1] < 0.1 * found["losses"][0]
    assert found["right"] == 4  # the toy knows the answers, but at the wrong questions
    assert found["loaded"] == found["after"] != found["before"]
    assert (tmp_path / "reft_to_share" / "reft_config.json").is_file()
    said = capsys.readouterr().out
    assert "trainable intervention params: 516 || trainable model params: 0" in said
    assert "4 of 4 trained answers are right." in said


def test_memorisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("memorisation", tmp_path)
    assert (found["before"], found["after"], found["numbers"]) == (0.0, 1.0, 65)
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    assert (tmp_path / "1d_storage.pt").stat().st_size < 4096
    assert "\nA frozen language model knows far more than it says." in capsys.readouterr().out


def test_memorisation_without_training(tmp_path: Path) -> None:
    assert run("memorisation", tmp_path, "--epochs", "1")["after"] == 0.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_composition(tmp_path: Path, dtype: str) -> None:
    """An own intervention reads subspaces; each trained alone says its own answer to one question."""
    found = run("composition", tmp_path, "--epochs", "60", "--dtype", dtype)
    assert found["said"]["exclaim"] == ["The capital of France is Paris!"]
    assert found["said"]["brief"] == ["Paris."]
    assert found["marks"] == {name: marks(found["said"][name]) for name in ("base", "exclaim", "brief", "both")}


def marks(answers: list[str]) -> tuple[int, int, int]:
    (answer,) = answers
    exclaims, brief = "!" in answer, answer.count(" ") < 2
    return int(exclaims), int(brief), int(exclaims and brief)


def test_few_shot(tmp_path: Path) -> None:
    found = run("few_shot", tmp_path)
    assert found["losses"][-1] < 0.2 * found["losses"][0]
    assert found["trained"] == 1.0
    assert 0.0 <= found["in_context"] <= 1.0
    assert 0.0 <= found["others"] <= 1.0


def test_reft_with_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    found = run("reft_with_lora", tmp_path)
    assert found["losses"][-1] < 0.1 * found["losses"][0]
    assert found["right"] == 4
    assert found["loaded"] == found["after"] != found["before"]
    assert (tmp_path / "reft_to_share" / "base_trainable.safetensors").is_file()
    assert "trainable intervention params: 516 || trainable model params: 512" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "packages"), [("reft_with_lora", ["peft"]), ("patch_an_installed_pyreft", ["pyreft", "pyvene"])]
)
def test_a_missing_package_is_named(
    name: str, packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"needs {' and '.join(packages)}: "):
        run(name, tmp_path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"examples.{name}").main(["--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m examples.{name} [-h] [--tiny]")


@pytest.mark.parametrize("name", SCRIPTS)
def test_names_are_pyrefts(name: str) -> None:
    used = set()
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "reft_kernels":
            used |= {alias.name for alias in node.names}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pyreft":
            used.add(node.attr)
    assert used
    assert used <= PYREFT | ({"patch_pyreft"} if name == "patch_an_installed_pyreft" else set())
    assert used <= set(reft_kernels.__all__)


def test_readme_lists_every_script() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"[{name}.py]({name}.py)" not in text] == []

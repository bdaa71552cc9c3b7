"""The examples with the import changed back: they run on the authors' pyreft, and learn there what they learn here."""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from reft_kernels import patch_pyreft, unpatch_pyreft

FOLDER = Path(__file__).resolve().parents[2] / "examples"
# What each of them learns with --tiny.
LEARNT = {"quickstart": ("right", 4), "few_shot": ("trained", 1.0), "memorisation": ("after", 1.0)}
# pyreft's own trainers run on the transformers that it pins, ours on those that came later.
PINNED = transformers.__version__.startswith("4.45.")


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    unpatch_pyreft()
    logging.set_verbosity(level)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def of_pyreft(name: str) -> Any:
    """An example as a module that imports pyreft."""
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    changed = source.replace("\nimport reft_kernels as pyreft\n", "\nimport pyreft\n")
    changed = changed.replace("\nfrom reft_kernels import (\n", "\nfrom pyreft import (\n")
    assert changed.count("\nfrom pyreft import ") + changed.count("\nimport pyreft\n") == 1
    assert "reft_kernels" not in changed
    module = types.ModuleType(f"{name}_of_pyreft")
    exec(compile(changed, f"{name}.py", "exec"), vars(module))
    return module


def run(example: Any, folder: Path, *more: str) -> dict[str, Any]:
    found: dict[str, Any] = example.main(["--tiny", "--output", str(folder), *more])
    assert found["losses"][-1] < 0.5 * found["losses"][0]
    return found


@pytest.mark.skipif(PINNED, reason="our trainers need transformers 4.57")
@pytest.mark.parametrize("name", LEARNT)
def test_a_patched_pyreft_learns_what_is_learnt_here(name: str, tmp_path: Path) -> None:
    ours = run(importlib.import_module(f"examples.{name}"), tmp_path / "ours")
    patch_pyreft()
    patched = run(of_pyreft(name), tmp_path / "patched")
    # The same start in the same order; pyreft's W is bfloat16.
    assert patched["losses"] == pytest.approx(ours["losses"], rel=0.1)
    key, value = LEARNT[name]
    assert patched[key] == ours[key] == value


@pytest.mark.skipif(not PINNED, reason="pyreft's trainers need transformers 4.45")
@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("name", ["quickstart", "few_shot"])  # memorisation has a line for pyvene before 0.1.7
def test_pyreft_learns_it_where_its_trainers_run(name: str, patched: bool, tmp_path: Path) -> None:
    if patched:
        patch_pyreft()
    key, value = LEARNT[name]
    assert run(of_pyreft(name), tmp_path)[key] == value


def test_composition(tmp_path: Path) -> None:
    """Its data set trains pyreft's edits one token before the prompt's last, so what is said at the last is another."""
    patch_pyreft()
    run(of_pyreft("composition"), tmp_path, "--epochs", "60")


def test_patch_an_installed_pyreft(tmp_path: Path) -> None:
    found = run(importlib.import_module("examples.patch_an_installed_pyreft"), tmp_path)
    assert found["right"] == LEARNT["quickstart"][1]
    assert not found["report"].skipped

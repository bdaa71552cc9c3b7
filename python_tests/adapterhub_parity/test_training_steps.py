"""The benchmark of training steps with all of its sides, pyreft and AdapterHub among them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import training_steps
from benchmarks.training_sides import BUILDERS

pytest.importorskip("pyreft")


def test_a_tiny_run_with_the_peers(tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    words = ["--tiny", "--rounds", "2", "--batches", "2", "--warmup", "0", "--out", str(out)]
    assert training_steps.main(words) == 0
    for job in json.loads(out.read_text())["jobs"].values():
        sides, losses = job["sides"], job["first_loss"]
        # Without peft, and without a GPU.
        assert set(BUILDERS) - set(sides) <= {"lora", "reft_kernels_graphs"}
        assert losses["pyreft"] == pytest.approx(losses["reft_kernels"], rel=1e-5)
        assert losses["adapters"] != pytest.approx(losses["floor"], rel=1e-4)
        assert sides["pyreft"]["parameters"] == sides["adapters"]["parameters"] == sides["reft_kernels"]["parameters"]

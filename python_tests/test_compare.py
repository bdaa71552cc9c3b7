"""Comparisons: cells in processes of their own, resumed, failed ones noted; the table and the picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from in_process import run_cells_here
from training_support import rows, save_model, write_rows

from reft_kernels.cli import main
from reft_kernels.jobs import compare as comparing
from reft_kernels.jobs.compare import Cell, cells, compare, summary, table
from reft_kernels.jobs.comparison_plot import draw
from reft_kernels.jobs.errors import UserError
from reft_kernels.recipes import JobSettings


def log_of(cell: Cell, accuracy: float, **more: Any) -> dict[str, Any]:
    return {
        "settings": {**cell.settings.as_dict(), "model": "somewhere", "dtype": "auto"},
        "parameters": {"trained": 1000 + len(cell.method), "head": 1000, "base": 10**6},
        "results": {"boolq": {"accuracy": accuracy, "unanswered": 0.5, "rows": 10, "seconds": 1.0}},
        "ms_per_step": 20.0,
        "seconds": 3.0,
        "peak_memory_gib": 1.5,
        "device": "cpu",
        "versions": {},
        "base_class": "Model",
        "finished": True,
        **more,
    }


def test_cells_take_turns_and_have_settings_of_their_own(tmp_path: Path) -> None:
    plan = cells(JobSettings(), ["loreft", "lora"], [1, 2], {"lora": {"lr": 3e-4, "rank": 4}}, tmp_path)
    assert [(cell.method, cell.seed) for cell in plan] == [("loreft", 1), ("lora", 1), ("loreft", 2), ("lora", 2)]
    assert [(cell.settings.lr, cell.settings.rank) for cell in plan[:2]] == [(9e-4, 8), (3e-4, 4)]
    assert len({cell.folder for cell in plan}) == 4
    with pytest.raises(UserError, match=r"--set red:\.\.\.: red is not among --methods \(loreft, lora\)"):
        cells(JobSettings(), ["loreft", "lora"], [1], {"red": {"lr": 1.0}}, tmp_path)
    for name, value in (("seed", 3), ("method", "red")):
        with pytest.raises(UserError, match=f"--set lora:{name}=...: --methods and --seeds say"):
            cells(JobSettings(), ["lora"], [1], {"lora": {name: value}}, tmp_path)
    assert cells(JobSettings(), ["loreft", "lora", "loreft"], [1, 2, 1], {}, tmp_path) == [
        *cells(JobSettings(), ["loreft", "lora"], [1, 2], {}, tmp_path)
    ]


def test_summary_table_and_picture(tmp_path: Path) -> None:
    plan = cells(JobSettings(), ["loreft", "frozen"], [1, 2], {}, tmp_path)
    logs = [(cell, log_of(cell, 0.5 + 0.1 * k), "") for k, cell in enumerate(plan)]
    logs[3] = (plan[3], None, "out of memory")
    found = summary(logs)
    assert found["methods"]["loreft"]["parameters"] == 6
    assert found["methods"]["loreft"]["scores"]["boolq"] == {"metric": "accuracy", "values": [0.5, 0.7]}
    assert found["methods"]["frozen"]["failed"] == {"2": "out of memory"}
    lines = table(found).splitlines()
    assert lines[0] == "| method | parameters | boolq (accuracy) | ms/step | peak GiB | seeds |"
    assert lines[2] == "| loreft | 6 | 0.600 ± 0.141 | 20 | 1.50 | 1, 2 |"
    assert lines[3] == "| frozen | 6 | 0.600 | 20 | 1.50 | 1 |"
    assert lines[-1] == "- frozen, seed 2: out of memory"
    renamed = json.loads(json.dumps(found).replace("boolq", r"$a_{|<b>"))
    assert table(renamed).splitlines()[0].startswith(r"| method | parameters | $a\_{\|&lt;b&gt; (accuracy) |")
    assert draw(renamed, tmp_path / "picture.png")
    assert draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert not draw({"methods": {}}, tmp_path / "nothing.png")


def test_what_is_finished_is_not_run_again_and_what_failed_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cells(JobSettings(), ["loreft", "lora", "frozen"], [1], {}, tmp_path)
    ran: list[list[str]] = []

    def process(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        ran.append(words)
        cell = next(cell for cell in plan if str(cell.folder) in words)
        if cell.method == "lora":
            return subprocess.CompletedProcess(words, 2, "", "warning\nreft_kernels train: error: no such module\n")
        cell.folder.mkdir(exist_ok=True)
        (cell.folder / "train_log.json").write_text(json.dumps(log_of(cell, 0.5)))
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(comparing.subprocess, "run", process)
    said: list[str] = []
    for _ in range(2):
        found = compare(plan, "somewhere", [], tmp_path, show=False, say=said.append)
        assert found["methods"]["lora"]["failed"] == {"1": "lora, seed 1: reft_kernels train: error: no such module"}
        assert found == json.loads((tmp_path / "comparison.json").read_text())
        assert (tmp_path / "comparison.md").read_text() == table(found)
    assert [words[0] for words in ran] == [sys.executable] * 4
    assert [Path(words[words.index("--output") + 1]).name for words in ran] == [
        "loreft-1",
        "lora-1",
        "frozen-1",
        "lora-1",
    ]
    log = json.loads((tmp_path / "loreft-1" / "train_log.json").read_text())
    del log["settings"]["step_graphs"]  # a version without that setting
    (tmp_path / "loreft-1" / "train_log.json").write_text(json.dumps(log))
    compare(plan[:1], "somewhere", [], tmp_path, show=False, say=said.append)
    assert len(ran) == 4
    other = cells(JobSettings(lr=1.0), ["loreft"], [1], {}, tmp_path)
    compare(other, "somewhere", [], tmp_path, show=False, say=said.append)
    assert len(ran) == 5
    assert "--overwrite" in ran[-1]
    compare(plan[2:], "elsewhere", [], tmp_path, show=False, say=said.append)
    compare(plan[2:], "somewhere", ["--dtype", "bfloat16"], tmp_path, show=False, say=said.append)
    assert len(ran) == 7
    (plan[2].folder / "train_log.json").write_text("[]")
    with pytest.raises(UserError, match=r"frozen-1/train_log\.json: expected a JSON object"):
        compare(plan[2:], "somewhere", [], tmp_path, show=False, say=said.append)
    with pytest.raises(UserError, match="every run failed; the first: lora, seed 1"):
        compare(plan[1:2], "somewhere", [], tmp_path, show=False, say=said.append)


def test_nothing_to_compare_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "--model", "m", "--data", "rows.jsonl", "--output", str(tmp_path / "out")]
    assert main(argv) == 2
    assert "no data is named and --held-out keeps no rows: nothing to compare the methods by" in capsys.readouterr().err
    assert main([*argv, "--task", "classification", "--glue", "sst2", "--held-out", "glue"]) == 2
    assert "nothing to compare the methods by" in capsys.readouterr().err
    assert main([*argv, "--eval-data", "rows.jsonl", "--evaluation", "none"]) == 2
    assert "--evaluation none: leaves nothing to compare the methods by" in capsys.readouterr().err


@pytest.mark.slow
def test_methods_are_compared_by_held_out_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cells_here(monkeypatch)
    model, data = save_model(tmp_path / "model"), write_rows(tmp_path / "boxes.jsonl", rows(12))
    argv = ["compare", "--model", model, "--data", data, "--held-out", "last:5", "--output", tmp_path / "out"]
    argv += ["--evaluation", "loss", "--max-steps", 6, "--batch-size", 4, "--rank", 2, "--positions", "l2"]
    assert main([str(word) for word in [*argv, "--lr", 0.02, "--methods", "loreft", "frozen"]]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    losses = {name: entry["scores"]["held_out"]["values"][0] for name, entry in found.items()}
    assert losses["loreft"] < losses["frozen"]
    logged = json.loads((tmp_path / "out" / "loreft-42" / "train_log.json").read_text())
    assert logged["results"]["held_out"]["rows"] == 5
    assert logged["held_out"][-1]["eval_loss"] == pytest.approx(losses["loreft"], rel=0.1)


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = save_model(tmp_path / "model")
    train, test = (write_rows(tmp_path / f"{name}.jsonl", rows(8)) for name in ("train", "boxes"))
    argv = ["compare", "--model", model, "--data", train, "--eval-data", test, "--output", tmp_path / "out"]
    argv += ["--evaluation", "loss", "--max-steps", 6, "--batch-size", 4, "--rank", 2, "--positions", "l2"]
    argv += ["--methods", "loreft", "frozen", "--set", "loreft:lr=0.02", "--seeds", "7"]
    assert main([str(word) for word in argv]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())["methods"]
    losses = {name: entry["scores"]["boxes"]["values"][0] for name, entry in found.items()}
    assert losses["loreft"] < losses["frozen"]
    assert found["loreft"]["parameters"] == 2 * (2 * 2 * 32 + 2)
    assert found["loreft"]["peak_memory_gib"]
    assert f"| loreft | 260 | {losses['loreft']:.3f} |" in said
    assert (tmp_path / "out" / "comparison.png").is_file()
    settings = json.loads((tmp_path / "out" / "loreft-7" / "train_log.json").read_text())["settings"]
    assert (settings["lr"], settings["seed"]) == (0.02, 7)

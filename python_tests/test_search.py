"""Searches: spaces, halving, the frontier, going on where one was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_support import rows, save_model, write_rows

from reft_kernels.cli import main
from reft_kernels.jobs.search import best_trial, frontier, table
from reft_kernels.jobs.search_plot import draw
from reft_kernels.jobs.search_space import Choices, Range, read_space
from reft_kernels.recipes import find_recipe


def test_spaces() -> None:
    space = read_space(["rank=1,4", "lr=1e-4..3e-3", "batch-size=2..8", "layers=all,0;2", "tied=true,false"], 12)
    assert space["rank"] == Choices((1, 4))
    assert space["lr"] == Range(1e-4, 3e-3, whole=False)
    assert space["batch_size"] == Range(2, 8, whole=True)
    assert space["layers"] == Choices(("all", "0;2"))
    assert space["tied"] == Choices((True, False))
    usual = read_space([], 12)
    assert set(usual) == {"rank", "layers", "positions", "lr"}
    assert usual["layers"] == Choices(("all", "0;3;6;9", "0;1;2;3;4;5", "6;7;8;9;10;11", "6"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank", "expected name=a,b,c or name=low..high, got 'rank'"),
        ("rnak=1,2", "unknown setting 'rnak'; near: rank"),
        ("rank=0,2", "rank must be at least 1, got 0"),
        ("lr=3..1", r"lr: the range 3\.\.1 is empty"),
        ("data=a,b", "data holds several values at once"),
        ("method=lora,prefix", "method must be one of"),
    ],
)
def test_spaces_that_are_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_space([text], 12)


def test_the_frontier_is_what_none_beats() -> None:
    trials = [
        {"number": 0, "value": 0.5, "parameters": 100},
        {"number": 1, "value": 0.7, "parameters": 200},
        {"number": 2, "value": 0.7, "parameters": 300},  # as good as 1, and dearer
        {"number": 3, "value": 0.4, "parameters": 50},
        {"number": 4, "value": 0.3, "parameters": 60},  # beaten by 3
        {"number": 5, "value": 0.6, "parameters": 200},  # beaten by 1
    ]
    assert frontier(trials, "parameters", 1) == [3, 0, 1]
    assert frontier(trials, "parameters", -1) == [3, 4]


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    pytest.importorskip("optuna")
    model, data = save_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", rows(20))
    words = ["search", "--model", model, "--data", data, "--output", tmp_path / "out", "--evaluation", "loss"]
    words += ["--epochs", 3, "--batch-size", 4, "--device", "cpu", "--positions", "l2"]
    words += ["--over", "rank=1,2", "lr=1e-4..5e-2"]
    return [str(word) for word in words]


def test_the_command(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv, "--trials", "6"]) == 0
    said = capsys.readouterr().out
    found: dict[str, Any] = json.loads((tmp_path / "out" / "search.json").read_text())
    assert found["metric"] == "eval_loss"
    states = [trial["state"] for trial in found["trials"]]
    assert len(states) == 6
    assert states.count("pruned") >= 1
    assert states.count("complete") >= 1
    assert all(trial["epochs"] < 3 for trial in found["trials"] if trial["state"] == "pruned")
    finished = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert all(trial["parameters"] == 2 * trial["settings"]["rank"] * (2 * 32 + 1) for trial in finished)
    best = min(finished, key=lambda trial: trial["value"])
    recipe = find_recipe(str(tmp_path / "out" / "best.json"))
    assert {name: recipe.values[name] for name in best["settings"]} == best["settings"]
    assert table(found) in said
    assert not list((tmp_path / "out").glob("trial-*"))
    assert draw(found, tmp_path / "picture.png")

    assert main([*argv, "--trials", "8"]) == 0
    again = json.loads((tmp_path / "out" / "search.json").read_text())["trials"]
    assert again[:6] == found["trials"]
    assert len(again) == 8
    assert len({trial["settings"]["lr"] for trial in again}) == 8  # what was drawn is not drawn again
    other = save_model(tmp_path / "other")
    assert main([word if word != str(tmp_path / "model") else str(other) for word in argv]) == 2
    assert "holds a search of another model" in capsys.readouterr().err
    assert main([*argv, "--trials", "8", "--rank", "2", "--lr", "1"]) == 2
    assert "holds a search of another model, other settings or another space" in capsys.readouterr().err


def test_a_trial_that_keeps_its_best_epoch_is_judged_by_it(argv: list[str], tmp_path: Path) -> None:
    words = [*argv[: argv.index("--over")], "--lr", "3", "--scheduler", "constant", "--warmup", "0"]
    values = {}
    for name in ("no-best-epoch", "best-epoch"):
        words[words.index("--output") + 1] = str(tmp_path / name)
        assert main([*words, f"--{name}", "--over", "rank=2", "--trials", "1"]) == 0
        (trial,) = json.loads((tmp_path / name / "search.json").read_text())["trials"]
        values[name] = trial["value"]
    assert values["best-epoch"] < values["no-best-epoch"]


def test_a_trial_is_not_given_up_after_its_last_step(argv: list[str], tmp_path: Path) -> None:
    words = [*argv[: argv.index("--over")], "--max-steps", "2", "--over", "lr=1e-2,1e-9", "rank=1..4"]
    assert main([*words, "--trials", "5"]) == 0
    states = [trial["state"] for trial in json.loads((tmp_path / "out" / "search.json").read_text())["trials"]]
    assert states == ["complete"] * 5


@pytest.mark.parametrize("sign", [1, -1])
def test_the_best_is_the_cheapest_of_equal_ones(sign: int) -> None:
    trials = [
        {"number": k, "value": sign * value, "parameters": parameters, "ms_per_step": ms}
        for k, (value, parameters, ms) in enumerate([(0.5, 9, 1.0), (0.7, 8, 1.5), (0.7, 5, 2.0), (0.7, 4, 1.0)])
    ]
    assert best_trial(trials, sign)["number"] == 3
    assert all(3 in frontier(trials, cost, sign) for cost in ("parameters", "ms_per_step"))


def test_tables_hold_settings_as_text() -> None:
    trial = {"number": 0, "state": "complete", "value": 0.5, "settings": {"template": "<b>|%s\n"}, "parameters": 1,
             "ms_per_step": 1.0}  # fmt: skip
    found = table({"metric": "eval_loss", "more_is_better": False, "trials": [trial], "frontier": {"parameters": [0]}})
    assert found.splitlines()[2] == "| 0.5000 | &lt;b&gt;\\|%s⏎ | 1 | 1 |"


def test_trials_that_fail_are_counted(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*argv[: argv.index("--over")], "--over", "layers=7,9"]
    assert main([*argv, "--trials", "2"]) == 2
    assert "no trial was finished; the first failed: " in capsys.readouterr().err
    states = [trial["state"] for trial in json.loads((tmp_path / "out" / "search.json").read_text())["trials"]]
    assert states == ["fail", "fail"]
    argv[argv.index("--output") + 1] = str(tmp_path / "frozen")
    argv[argv.index("--over") :] = ["--over", "method=frozen", "--trials", "1"]
    assert main(argv) == 2
    assert "no trial was finished; the first failed: held-out rows gave no eval_loss" in capsys.readouterr().err

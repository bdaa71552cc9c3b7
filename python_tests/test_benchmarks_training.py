"""Benchmarks of training: steps per second, memorisation and the paper's tasks, on tiny models."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import run_cells_here
from recorded_graph import recorded_capture

from benchmarks import (
    memorisation,
    paper_task_rates,
    paper_task_report,
    paper_task_sets,
    paper_tasks,
    training_sides,
    training_steps,
)
from benchmarks.paper_task_sets import TASK_SETS, Budget, settings_of
from benchmarks.tiny import tiny_llama, tiny_tokenizer
from reft_kernels.recipes import find_recipe
from reft_kernels.training.collators import LOCATIONS

OURS = ("reft_kernels", "reft_kernels_polar", "reft_kernels_targets", "reft_kernels_cached")


def job_of(positions: str = "l3", lr: float = 0.02) -> training_sides.Job:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randint(3, 320, (n + 4,), generator=generator), n) for n in (9, 12, 7, 10)]
    base = tiny_llama().requires_grad_(False)
    return training_sides.Job(base, training_steps.make_batches(pairs, positions, 2, 2), positions, 4, lr)


# Steps per second.


def test_a_tiny_run_of_the_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    out = tmp_path / "steps.json"
    words = ["--tiny", "--rounds", "3", "--batches", "2", "--warmup", "0", "--out", str(out)]
    assert training_steps.main(words) == 0
    report = json.loads(out.read_text())
    assert list(report["jobs"]) == ["l7", "f7+l7"]
    printed = capsys.readouterr().out
    for job in report["jobs"].values():
        sides, losses = job["sides"], job["first_loss"]
        assert set(sides) | set(job["missing"]) == set(training_sides.BUILDERS)
        assert {"forward", "floor", "floor_targets", *OURS} <= set(sides)
        assert all(losses[name] == pytest.approx(losses["reft_kernels"], rel=1e-4) for name in OURS)
        assert losses["reft_kernels"] != pytest.approx(losses["floor"], rel=1e-4)
        for name, row in sides.items():
            assert len(row["samples_ms"]) == 3
            assert row["quartiles"][0] <= row["ms"] <= row["quartiles"][1]
            assert row["steps_per_second"] == pytest.approx(1e3 / row["ms"])
            assert f"\n{name} " in printed
        assert sides["floor"]["over_floor"] == 1.0
        assert sides["floor"]["parameters"] == 0
        # Two layers of R, W [8, 32] and b [8].
        assert sides["reft_kernels"]["parameters"] == 2 * (2 * 8 * 32 + 8)
    saved = {name: job["sides"]["reft_kernels_cached"]["saved_fraction"] for name, job in report["jobs"].items()}
    assert saved["l7"] > 0.9 > saved["f7+l7"] == 0.5  # the first of two layers
    assert out.with_suffix(".png").stat().st_size > 5000


def test_sides_train_the_adapter_alone_and_alike() -> None:
    job = job_of()
    before = {name: weight.clone() for name, weight in job.base.named_parameters()}
    torch.manual_seed(0)
    sides, _ = training_steps.build(job, without=["forward"])
    training_steps.compare_losses(sides, "float32")
    losses = {name: [float(side.step(k % 2)) for k in range(8)] for name, side in sides.items()}
    for name in ("floor", "floor_targets"):
        assert losses[name][0] == pytest.approx(losses[name][-2])
    for name in OURS:
        assert losses[name][-2] < losses[name][0]
    for name in ("reft_kernels_targets", "reft_kernels_cached"):
        assert losses[name] == pytest.approx(losses["reft_kernels"], rel=1e-3)
    assert all(torch.equal(weight, before[name]) for name, weight in job.base.named_parameters())
    R = sides["reft_kernels_polar"].edits[0].rotate_layer.weight
    torch.testing.assert_close(R.mT @ R, torch.eye(4), atol=1e-5, rtol=0)


def test_the_side_with_step_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of()
    with pytest.raises(training_sides.Unavailable, match="for CUDA devices, got 'cpu'"):
        training_sides.reft_kernels_graphs(job)
    monkeypatch.setattr("reft_kernels.training.step_graphs.cuda_capture", recorded_capture)
    torch.manual_seed(0)
    sides, _ = training_steps.build(job, without=["lora"])
    training_steps.compare_losses(sides, "float32")
    curves = [
        [float(sides[name].step(k % 2)) for k in range(8)] for name in ("reft_kernels_targets", "reft_kernels_graphs")
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[1][-2] < curves[1][0]


def test_losses_that_differ_are_found() -> None:
    sides, _ = training_steps.build(job_of(), without=["lora"])
    with torch.no_grad():
        sides["reft_kernels_polar"].edits[1].learned_source.bias.add_(1.0)
    with pytest.raises(RuntimeError, match="reft_kernels_polar computes another loss"):
        training_steps.compare_losses(sides, "float32")


def test_edits_that_do_nothing_are_found() -> None:
    sides, _ = training_steps.build(job_of(), without=["lora"])
    for name in OURS:
        sides[name].loss = sides["floor"].loss
    with pytest.raises(RuntimeError, match="the edits of reft_kernels change nothing"):
        training_steps.compare_losses(sides, "float32")


def test_batches_by_hand() -> None:
    pairs = [(torch.arange(10, 18), 5), (torch.arange(20, 30), 7)]
    (batch,) = training_steps.make_batches(pairs, "f1+l2", 2, 2)
    assert batch["labels"][0].tolist() == [-100] * 5 + [15, 16, 17] + [-100] * 2
    assert batch["attention_mask"].sum(1).tolist() == [8, 10]
    assert batch[LOCATIONS].tolist() == [[[0, 3, 4]] * 2, [[0, 5, 6]] * 2]
    cut = training_sides.for_targets(batch)
    assert cut["logits_to_keep"].tolist() == [4, 5, 6, 7, 8]  # column j predicts the label of j + 1
    assert cut["shift_labels"][1].tolist() == [-100, -100, 27, 28, 29]
    with pytest.raises(SystemExit, match="only 5 tokens"):
        training_steps.make_batches(pairs, "f3+l3", 2, 2)


def test_the_steps_refuse_what_they_cannot_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--tiny", "--without", "floor"], "floor and reft_kernels"),
        (["--tiny", "--rounds", "1"], "at least 2"),
        (["--data", str(tmp_path / "none.jsonl")], "no such file"),
    ):
        with pytest.raises(SystemExit):
            training_steps.main(words)
        assert message in capsys.readouterr().err


# Memorisation.

RECITES = ["--tiny", "--ranks", "4", "--methods", "loreft", "--lr", "0.05", "--epochs", "60", "--layers", "0"]


def test_a_tiny_model_recites_and_the_rest_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    out = tmp_path / "recited.json"
    assert memorisation.main([*RECITES, "--lengths", "1", "--out", str(out)]) == 0
    (cell,) = json.loads(out.read_text())["cells"].values()
    assert cell["recited"] == cell["right_tokens"] == 1
    assert 1 < cell["epochs"] < 60
    assert cell["frozen_blocks"] == 1
    assert cell["parameters"] == 2 * 4 * 32 + 4
    learned = []
    learn = memorisation.learn

    def counted(*arguments: Any) -> dict[str, Any]:
        learned.append(arguments[3])
        return learn(*arguments)

    monkeypatch.setattr(memorisation, "learn", counted)
    assert memorisation.main([*RECITES, "--lengths", "1", "60", "--out", str(out)]) == 0
    assert [one.length for one in learned] == [60]
    cells = json.loads(out.read_text())["cells"]
    assert len(cells) == 2
    long = cells["loreft rank 4 layer 0 tokens 60"]
    assert long["recited"] < 60
    assert long["epochs"] == 60
    assert "loreft, rank 4, layer 0" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"were run with \{'lr': 0.05\}, not \{'lr': 0.1\}"):
        memorisation.main([*RECITES, "--lr", "0.1", "--lengths", "1", "--out", str(out)])


def test_what_is_recited_is_what_generation_says() -> None:
    base, tokenizer = tiny_llama().requires_grad_(False), tiny_tokenizer()
    target = tokenizer("A")["input_ids"]
    arguments: Any = type("Arguments", (), {"seed": 1, "lr": 0.05, "epochs": 60, "generate": True})
    assert memorisation.recite(base, tokenizer, memorisation.PROMPT, target).length == 0
    found = memorisation.learn(base, tokenizer, target, memorisation.Cell("loreft", 4, 0, 1), arguments)
    assert found["recited"] == 1
    # The hooks are gone: the frozen model says something else.
    assert memorisation.recite(base, tokenizer, memorisation.PROMPT, target).length == 0


def test_later_layers_and_shorter_texts_cost_less() -> None:
    costs = [memorisation.cost(memorisation.Cell("consreft", 1, *one), 30, 49152, 576) for one in ((5, 64), (25, 64))]
    assert costs[0] > costs[1] > memorisation.cost(memorisation.Cell("consreft", 1, 25, 32), 30, 49152, 576)


def test_a_picture_of_ranks_and_methods(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    cells = {
        str((method, rank, layer, length)): {
            "method": method, "rank": rank, "layer": layer, "length": length, "recited": min(length, 20 * rank + layer),
            "parameters": 577 * rank,
        }
        for method in ("consreft", "loreft") for rank in (1, 2) for layer in (5, 15) for length in (16, 32, 64)
    }  # fmt: skip
    report = {
        "cells": cells, "settings": {"model": "m", "prompt": "p", "epochs": 3, "lr": 4e-3},
        "environment": {"device": "d", "commit": "c"},
    }  # fmt: skip
    memorisation.plot(report, tmp_path / "made_up.png")
    assert (tmp_path / "made_up.png").stat().st_size > 20000


def test_memorisation_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--layers", "2"], "layers 0 to 1"),
        (["--lengths", "100000"], "another one: --text FILE"),
        (["--text", str(tmp_path / "none.txt")], "no such file"),
        (["--epochs", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            memorisation.main(["--tiny", *words])
        assert message in capsys.readouterr().err


# The paper's tasks.


@pytest.mark.parametrize("name", list(TASK_SETS))
def test_a_set_keeps_its_recipe(name: str) -> None:
    one = TASK_SETS[name]
    settings, changes = settings_of(name, Path("train"), [Path("test")], paper_task_sets.METHODS, one.budget)
    recipe = find_recipe(one.recipe).settings
    for key in ("style", "positions", "rank", "layers", "lr", "dropout", "warmup", "weight_decay", "scheduler", "glue"):
        assert getattr(settings, key) == getattr(recipe, key), key
    assert settings.data == ("train",)
    assert settings.eval_data == ("test",)
    assert settings.max_steps == one.budget.steps
    direft = settings.changed({**changes["nodireft"], "method": "nodireft"})
    wanted = find_recipe(one.direft[0]).settings
    for key in ("dropout", "weight_decay", "warmup", *([] if one.encoder else ["lr"])):
        assert getattr(direft, key) == getattr(wanted, key), key
    assert direft.batch_size == settings.batch_size
    lora = settings.changed({**changes["lora"], "method": "lora"})
    assert one.encoder or 2e-4 <= lora.lr <= 3e-4
    assert lora.cache_frozen == "none"
    assert set(one.tests).isdisjoint([one.train])
    rates = {method: changed.get("lr") for method, changed in changes.items()}
    if one.encoder:
        assert rates == paper_task_sets.GLUE_RATES[name]
        assert settings.held_out == "share:0.1"
    assert set(changes["frozen"]) == ({"lr"} if one.encoder else set())


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    data = paper_tasks.write_tiny_data(tmp_path / "data")
    train, (test,) = paper_tasks.files_of("ultrafeedback", data, tmp_path, Budget(8, 2, 5))
    kept, held_out = (path.read_text().splitlines() for path in (train, test))
    assert len(held_out) == 5
    with gzip.open(data / TASK_SETS["ultrafeedback"].train, "rt") as file:
        assert [*kept, *held_out] == file.read().splitlines()
    with pytest.raises(FileNotFoundError, match="24 rows, 24 are to be held out"):
        paper_tasks.files_of("ultrafeedback", data, tmp_path, Budget(8, 2, 24))


def made_up_report() -> dict[str, Any]:
    scores = {"loreft": {42: 0.7, 43: 0.8}, "frozen": {42: 0.5, 43: 0.5}}
    losses = {"loreft": {42: 2.0}, "frozen": {42: 2.5}}
    entry = {"seeds": [42, 43], "failed": {}, "seconds": [10.0, 12.0], "parameters": 1234, "cache_frozen": True}
    frozen = {**entry, "seconds": [], "parameters": 0, "failed": {"44": "out of memory"}}
    result = paper_task_report.method_result
    return {
        "environment": {"device": "d", "commit": "c"}, "models": {"language": "m"},
        "sets": {
            "quiz": {"metric": "accuracy", "rows": 100,
                     "methods": {name: result("accuracy", one, 100) for name, one in scores.items()}},
            "chat": {"metric": "loss", "rows": 9,
                     "methods": {name: result("loss", one, 9) for name, one in losses.items()}},
        },
        "trainings": {"quiz": {"budget": {"examples": 8, "steps": 2}, "methods": {"loreft": entry, "frozen": frozen}}},
        "samples": {"chat": [{"instruction": "say\nsomething", "said": {"loreft": "word " * 200}}]},
    }  # fmt: skip


def test_the_table(tmp_path: Path) -> None:
    text = paper_task_report.table(made_up_report())
    lines = text.splitlines()
    assert lines[0] == "| data set | rows | seeds | metric | LoReFT | frozen |"
    # sqrt(0.75 * 0.25 / 100) and the deviation of 0.7 and 0.8
    assert lines[2] == "| quiz | 100 | 2 | accuracy | 0.750 ± 0.043 (0.071) | 0.500 ± 0.050 (0.000) |"
    assert lines[3] == "| chat | 9 | 1 | loss | 2.000 | 2.500 |"
    assert "| quiz | 8 | 2 | 1,234; 11 s* | 0 |" in lines
    assert "- quiz, frozen, seed 44: out of memory" in lines
    assert "> say something" in lines
    assert max(map(len, lines)) < 450


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    paper_task_report.plot(made_up_report(), tmp_path / "tasks.png")
    assert (tmp_path / "tasks.png").stat().st_size > 10000


def test_the_standard_error() -> None:
    assert paper_task_report.standard_error("accuracy", 0.8, 400) == pytest.approx(0.02)
    assert paper_task_report.standard_error("matthews_correlation", 0.8, 400) is None


def test_sets_without_files_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out.json")]
    assert paper_tasks.main([*words, "--only", "sst2", "gsm8k"]) == 1
    said = capsys.readouterr().err
    assert "left out: no glue/sst2/train.jsonl.gz in the data folder" in said
    assert "nothing was run" in said
    with pytest.raises(SystemExit):
        paper_tasks.main(["--data", str(tmp_path / "none")])
    assert "no such folder" in capsys.readouterr().err


def test_the_rate_with_the_best_held_out_accuracy_is_chosen() -> None:
    epochs = [
        {"eval_accuracy": 0.6, "eval_loss": 0.7}, {"eval_accuracy": 0.8, "eval_loss": 0.6},
        {"eval_accuracy": 0.8, "eval_loss": 0.5}, {"eval_runtime": 3.0},
    ]  # fmt: skip
    assert paper_task_rates.held_out_score({"held_out": epochs}, "accuracy") == {"accuracy": 0.8, "loss": 0.5}
    runs = {
        "loreft": {"0.001": {"pearson": 0.8, "loss": 0.4}, "0.01": {"pearson": 0.8, "loss": 0.3}},
        "lora": {"0.001": {"pearson": 0.7, "loss": 0.4}, "0.01": {"pearson": 0.5, "loss": 0.3}},
    }
    assert paper_task_rates.choose(runs, "pearson") == {"loreft": 0.01, "lora": 0.001}


@pytest.mark.slow
def test_a_tiny_run_of_the_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    run_cells_here(monkeypatch)
    out = tmp_path / "rates.json"
    words = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(out), "--methods", "frozen", "--max-steps", "2"]
    assert paper_task_rates.main([*words, "--only", "sst2", "--rates", "0.001", "0.1"]) == 0
    assert paper_task_rates.main([*words, "--only", "stsb"]) == 0
    sets = json.loads(out.read_text())["sets"]
    assert set(sets["sst2"]["runs"]["frozen"]) == {"0.001", "0.1"}  # the second call kept them
    assert sets["sst2"]["chosen"]["frozen"] in (0.001, 0.1)
    assert sets["stsb"]["metric"] == "pearson"
    assert set(sets["stsb"]["runs"]["frozen"]) == {f"{rate:g}" for rate in paper_task_rates.RATES["frozen"]}
    assert paper_task_rates.main([*words, "--only", "sst2", "--rates", "0.01", "--max-steps", "1"]) == 0
    again = json.loads(out.read_text())["sets"]["sst2"]
    assert (again["steps"], set(again["runs"]["frozen"])) == (1, {"0.01"})  # of other steps nothing is compared
    logs = sorted((tmp_path / "work" / "rates").glob("*/*/frozen-42/train_log.json"))
    assert [json.loads(log.read_text())["settings"]["eval_data"] for log in logs] == [[]] * 5
    with pytest.raises(SystemExit):
        paper_task_rates.main(["--data", str(tmp_path)])
    assert "glue/sst2/train.jsonl.gz" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_run_of_the_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("matplotlib", "sklearn"):
        pytest.importorskip(package)
    run_cells_here(monkeypatch)
    out = tmp_path / "tasks.json"
    words = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(out), "--methods", "loreft", "frozen"]
    words += ["--only", "ARC-Easy", "gsm8k", "ultrafeedback", "sst2"]
    assert paper_tasks.main(words) == 0
    report = json.loads(out.read_text())
    assert report["left_out"] == {}
    assert {name: one["trained_on"] for name, one in report["sets"].items()} == {
        "ARC-Easy": "ARC-Easy", "gsm8k": "gsm8k", "SVAMP": "gsm8k", "ultrafeedback": "ultrafeedback", "sst2": "sst2",
    }  # fmt: skip
    for one in report["sets"].values():
        assert one["rows"] == 8
        assert set(one["methods"]) == {"loreft", "frozen"}
        assert all(math.isfinite(found["mean"]) for found in one["methods"].values())
    assert report["sets"]["ultrafeedback"]["metric"] == "loss"
    assert [set(one["said"]) for one in report["samples"]["ultrafeedback"]] == [{"loreft", "frozen"}] * 3
    assert str(tmp_path) not in out.read_text()
    table = out.with_suffix(".md").read_text()
    assert "| SVAMP | 8 | 1 | accuracy |" in table
    assert out.with_suffix(".png").stat().st_size > 10000
    # A second call runs nothing anew and finds the same.
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "work").glob("*/*/train_log.json"))]
    assert len(before) == 8
    capsys.readouterr()
    assert paper_tasks.main(words) == 0
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "work").glob("*/*/train_log.json"))] == before
    assert json.loads(out.read_text())["sets"] == report["sets"]
    assert out.with_suffix(".md").read_text() == table
    # Another seed of one of them, beside the others.
    words[words.index("--only") + 1 :] = ["sst2", "--seeds", "42", "43", "--add"]
    assert paper_tasks.main(words) == 0
    joined = json.loads(out.read_text())["sets"]
    assert list(joined) == list(report["sets"])
    assert set(joined["sst2"]["methods"]["loreft"]["values"]) == {"42", "43"}
    assert {**joined, "sst2": None} == {**report["sets"], "sst2": None}


def test_the_budget_can_be_given() -> None:
    given = {"tiny": False, "max_examples": None, "max_steps": 7, "eval_rows": None}
    arguments: Any = type("Arguments", (), given)
    own = TASK_SETS["piqa"].budget
    assert paper_tasks.budget_of(TASK_SETS["piqa"], arguments) == replace(own, steps=7)

"""The commands end to end on a tiny model: train, resume, eval, generate, info."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_support import rows, save_model, write_rows

from reft_kernels.cli import main


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl.gz", rows(24))


def run(*argv: Any) -> int:
    return main([str(word) for word in argv])


def train(model: Path, data: Path, output: Path, *more: Any) -> int:
    return run(
        *("train", "--model", model, "--data", data, "--output", output, "--device", "cpu", "--no-progress"),
        *("--rank", 2, "--positions", "f2+l2", "--batch-size", 4, "--log-steps", 1),
        *more,
    )


@pytest.fixture(scope="module")
def trained(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert train(model_folder, data_file, output, "--max-steps", 40, "--lr", 0.02, "--save-steps", 30) == 0
    return output


def test_train_writes_an_adapter_a_log_and_checkpoints(model_folder: Path, data_file: Path, trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "adapter.safetensors",
        "reft_config.json",
        "train_log.json",
        "report.html",
        "report.png",
        "README.md",
        "checkpoint-30",
        "checkpoint-40",
    }
    log = json.loads((trained / "train_log.json").read_text(encoding="utf-8"))
    assert log["finished"] is True
    assert log["steps"] == 40
    assert log["settings"]["model"] == str(model_folder)
    assert log["settings"]["data"] == [str(data_file)]
    assert log["settings"]["lr"] == 0.02
    assert log["settings"]["style"] == "plain"
    assert log["parameters"]["trained"] == 2 * (2 * 2 * 32 + 2)
    assert log["examples"] == {"used": 24, "left_out": 0, "held_out": 0, "skipped": None}
    losses = [entry["loss"] for entry in log["history"]]
    assert len(losses) == 40
    assert losses[-1] < 0.9 * losses[0]
    files = ("adapter.safetensors", "reft_config.json")
    assert log["adapter_bytes"] == sum((trained / name).stat().st_size for name in files)
    final, last = (load_file(folder / "adapter.safetensors") for folder in (trained, trained / "checkpoint-40"))
    assert final.keys() == last.keys()
    assert all(torch.equal(final[name], last[name]) for name in final)


def test_train_says_what_it_does(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model_folder, data_file, tmp_path / "all", "--max-steps", 1) == 0
    assert "layers   0-1 (block_output)" in capsys.readouterr().out
    more = ("--max-steps", 2, "--max-examples", 5, "--no-tied", "--layers", "1", "--method", "nodireft")
    assert train(model_folder, data_file, tmp_path / "run", *more) == 0
    said = capsys.readouterr().out
    assert "method   nodireft, rank 2, positions f2+l2, untied" in said
    assert "layers   1 (block_output)" in said
    assert f"trained  {2 * (2 * 2 * 32 + 2)} of " in said
    assert "5 examples" in said
    assert "in 2 steps" in said
    assert "ms/step" in said
    size = sum((tmp_path / "run" / name).stat().st_size for name in ("adapter.safetensors", "reft_config.json"))
    assert f"adapter  {size:,} bytes" in said


def test_resume_gives_the_adapter_of_an_uninterrupted_run(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--max-steps", 6, "--save-steps", 3, "--dropout", 0.1, "--keep-checkpoints", 5)
    assert train(model_folder, data_file, tmp_path / "whole", *steps) == 0
    assert train(model_folder, data_file, tmp_path / "cut", *steps) == 0
    for name in ("adapter.safetensors", "reft_config.json"):
        (tmp_path / "cut" / name).unlink()
    # As after a crash in the middle of writing the last checkpoint.
    (tmp_path / "cut" / "checkpoint-6" / "trainer_state.json").unlink()
    capsys.readouterr()
    assert train(model_folder, data_file, tmp_path / "cut", *steps, "--resume") == 0
    said = capsys.readouterr().out
    assert "checkpoint-3" in said
    assert "note" not in said
    whole, cut = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [json.loads((tmp_path / name / "train_log.json").read_text()) for name in ("whole", "cut")]
    assert [entry["loss"] for entry in logs[0]["history"]] == [entry["loss"] for entry in logs[1]["history"]]


def test_resume_says_which_settings_differ(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model_folder, data_file, tmp_path / "run", "--max-steps", 2, "--save-steps", 1) == 0
    assert train(model_folder, data_file, tmp_path / "run", "--max-steps", 3, "--lr", 0.5, "--resume") == 0
    said = capsys.readouterr().out
    assert "--max-steps 2, this one has 3" in said
    assert "--lr 0.0009, this one has 0.5" in said
    assert "--rank" not in said


def test_overwrite_replaces_the_run_and_leaves_other_files(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(model_folder, data_file, output, "--max-steps", 2, "--save-steps", 2) == 0
    before = (output / "adapter.safetensors").read_bytes()
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    assert train(model_folder, data_file, output, "--max-steps", 3, "--save-steps", 0, "--overwrite") == 0
    assert {path.name for path in output.iterdir()} == {
        "adapter.safetensors",
        "reft_config.json",
        "train_log.json",
        "report.html",
        "report.png",
        "README.md",
        "notes.txt",
    }
    assert (output / "adapter.safetensors").read_bytes() != before


def test_eval_of_the_base_model_and_of_the_adapter(
    model_folder: Path, data_file: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("--data", data_file, "--device", "cpu", "--no-progress", "--max-examples", 6, "--max-new-tokens", 12)
    predictions = {}
    for name, argv in {
        "base": ("--model", model_folder, "--adapter", "none"),
        "adapter": ("--adapter", trained),
        "checkpoint": ("--adapter", trained / "checkpoint-40"),
    }.items():
        assert run("eval", *argv, *common, "--out", tmp_path / f"{name}.jsonl") == 0
        said = capsys.readouterr().out
        lines = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        predictions[name] = [json.loads(line) for line in lines]
        correct = sum(row["correct"] for row in predictions[name])
        assert f"rows      accuracy {correct / 6:.4f}, unanswered " in said
        assert " (6 rows), " in said
    assert predictions["adapter"] == predictions["checkpoint"]
    assert [row["text"] for row in predictions["adapter"]] != [row["text"] for row in predictions["base"]]
    assert [row["gold"] for row in predictions["base"]] == [row["answer"] for row in rows(6)]
    assert set(predictions["base"][0]) == {"prompt", "text", "answer", "gold", "correct"}


def test_generate_continues_with_and_without_the_adapter(
    model_folder: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = rows(1)[0]["instruction"]
    said = []
    for argv in (("--adapter", trained), ("--model", model_folder)):
        assert run("generate", *argv, "--prompt", prompt, "--max-new-tokens", 8, "--device", "cpu") == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    assert run("generate", "--adapter", trained, "--max-new-tokens", 8, "--device", "cpu") == 0
    assert capsys.readouterr().out == said[0]


def test_generate_with_an_adapter_in_pyrefts_files(
    model_folder: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", trained, tmp_path / "theirs", "--to", "pyreft", "--model", model_folder) == 0
    capsys.readouterr()
    said = []
    for argv in (("--adapter", trained), ("--adapter", tmp_path / "theirs", "--model", model_folder)):
        assert (
            run("generate", *argv, "--prompt", rows(1)[0]["instruction"], "--max-new-tokens", 8, "--device", "cpu") == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_sampling_depends_on_the_seed(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for seed in (1, 1, 2):
        argv = ("--prompt", "red", "--temperature", 2.0, "--seed", seed, "--max-new-tokens", 20)
        assert run("generate", "--model", model_folder, "--device", "cpu", *argv) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_the_template_of_training_is_used_afterwards(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(model_folder, data_file, output, "--max-steps", 1, "--template", "Q: %s\\nA: ") == 0
    common = ("--data", data_file, "--device", "cpu", "--no-progress", "--max-examples", 1, "--max-new-tokens", 2)
    assert run("eval", "--adapter", output, *common, "--out", tmp_path / "own.jsonl") == 0
    assert json.loads((tmp_path / "own.jsonl").read_text())["prompt"] == f"Q: {rows(1)[0]['instruction']}\nA: "
    assert run("eval", "--adapter", output, *common, "--template", "%s!", "--out", tmp_path / "given.jsonl") == 0
    assert json.loads((tmp_path / "given.jsonl").read_text())["prompt"] == f"{rows(1)[0]['instruction']}!"


def test_info_names_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    from reft_kernels.functional import available_backends

    assert run("info", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["backends"] == available_backends()
    assert found["devices"][0].startswith("cpu")
    assert run("info") == 0
    said = capsys.readouterr().out
    for name, reason in available_backends().items():
        assert f"{name}: {reason}" in said


def test_as_a_module_in_a_process_of_its_own(tmp_path: Path) -> None:
    argv = ("train", "--model", "somewhere", "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path))
    done = subprocess.run([sys.executable, "-m", "reft_kernels", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    # Other packages may warn before, when they are imported.
    assert done.stderr.splitlines()[-1] == f"reft_kernels train: error: --data {tmp_path / 'rows.jsonl'}: no such file"
    assert "Traceback" not in done.stderr

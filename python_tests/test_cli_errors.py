"""What the user gets wrong: one sentence that names it, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from training_support import rows, save_model, write_rows

from reft_kernels.cli import main
from reft_kernels.jobs.run_folder import write_atomically


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows(6))


class Given:
    """Good arguments of `train`, of which a test spoils some."""

    def __init__(self, model: Path, data: Path, output: Path) -> None:
        self.options: dict[str, Any] = {
            "model": model,
            "data": data,
            "output": output,
            "device": "cpu",
            "max-steps": 1,
            "rank": 2,
        }

    def argv(self, **spoiled: Any) -> list[str]:
        options = {**self.options, **{name.replace("_", "-"): value for name, value in spoiled.items()}}
        words = ["train", "--no-progress"]
        for name, value in options.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words


@pytest.fixture
def given(model_folder: Path, data_file: Path, tmp_path: Path) -> Given:
    return Given(model_folder, data_file, tmp_path / "output")


def fails(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a command that must fail; returns its one line on standard error."""
    capsys.readouterr()
    try:
        code: Any = main(argv)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in said.err
    lines = [line for line in said.err.splitlines() if line]
    assert len(lines) == 1, said.err
    assert lines[0].startswith(f"reft_kernels {argv[0]}: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"method": "prompt"}, "--method: invalid choice: 'prompt'"),
        ({"positions": "first7"}, "--positions: positions must be .* got 'first7'"),
        ({"positions": "f0"}, "--positions: positions must be .* got 'f0'"),
        ({"layers": "0;9"}, r"layer.*9"),
        ({"layers": "zero"}, "--layers: layers must be .* got 'zero'"),
        ({"component": "nothing"}, "component.*nothing"),
        ({"rank": 0}, "--rank: must be at least 1, got 0"),
        ({"rank": 33}, "33"),
        ({"rank": "many"}, "--rank: expected a number, got 'many'"),
        ({"dropout": 1.5}, "dropout must be .* got 1.5"),
        ({"lr": "nan"}, "--lr: must be at least 0.0, got nan"),
        ({"epochs": -1}, "--epochs: must be at least 0.0, got -1"),
        ({"template": "no place"}, '--template: must hold "%s" exactly once'),
        ({"max_length": 2}, "--data: none of the 6 examples .* max_length=2"),
        ({"resume": True}, "--resume: no run to resume in .*output"),
        ({"scheduler": "none"}, "--scheduler: invalid choice"),
        ({"banana": 1}, "unrecognized arguments: --banana 1"),
    ],
)
def test_bad_options_are_named(
    given: Given, spoiled: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(given.argv(**spoiled), capsys)
    assert re.search(message, line), line
    assert not Path(given.options["output"]).exists()


def test_missing_model_folders_are_named(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere"
    assert fails(given.argv(model=missing), capsys).endswith(f"--model {missing}: no such folder")
    assert fails(given.argv(model="./nowhere"), capsys).endswith("--model ./nowhere: no such folder")
    (tmp_path / "empty").mkdir()
    assert "empty: the folder holds no config.json" in fails(given.argv(model=tmp_path / "empty"), capsys)
    assert "--model nobody/nothing: no folder here, and not to be had from the hub" in fails(
        given.argv(model="nobody/nothing"), capsys
    )
    assert not Path(given.options["output"]).exists()


def test_a_model_folder_that_is_cut_short(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_model(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert f"--model {folder}: " in fails(given.argv(model=folder), capsys)


def test_data_errors_name_file_line_and_field(given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(rows(1)[0]) + '\n{"instruction": "a"}\n', encoding="utf-8")
    assert f"{broken}, line 2: field 'output' is missing" in fails(given.argv(data=broken), capsys)
    missing = tmp_path / "nowhere.jsonl"
    assert fails(given.argv(data=missing), capsys).endswith(f"--data {missing}: no such file")
    assert fails(given.argv(data="nowhere.jsonl"), capsys).endswith("--data nowhere.jsonl: no such file")
    assert "--data: nobody/nothing: no file here, and not to be had from the hub" in fails(
        given.argv(data="nobody/nothing"), capsys
    )
    assert not Path(given.options["output"]).exists()


def test_an_output_folder_in_use_is_left_alone(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    output = Path(given.options["output"])
    output.mkdir()
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    assert "the folder is in use (it holds notes.txt)" in fails(given.argv(), capsys)
    assert "holds no run to replace" in fails(given.argv(overwrite=True), capsys)
    assert "--resume: no complete checkpoint in" in fails(given.argv(resume=True), capsys)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    (output / "notes.txt").unlink()
    output.rmdir()
    output.write_text("a file", encoding="utf-8")
    assert "exists and is no folder" in fails(given.argv(), capsys)


def test_a_failed_overwrite_keeps_the_earlier_run(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given.argv()) == 0
    before = {path.name: path.stat().st_mtime_ns for path in Path(given.options["output"]).iterdir()}
    fails(given.argv(overwrite=True, layers="7"), capsys)
    assert {path.name: path.stat().st_mtime_ns for path in Path(given.options["output"]).iterdir()} == before


def test_adapter_errors(
    given: Given, model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["eval", "--model", str(model_folder), "--data", str(data_file), "--device", "cpu"]
    missing = tmp_path / "nowhere"
    assert fails([*common, "--adapter", str(missing)], capsys).endswith(f"--adapter {missing}: no such folder")
    assert "holds no reft_config.json" in fails([*common, "--adapter", str(model_folder)], capsys)
    assert "--model is needed: no adapter is given" in fails(["eval", "--data", str(data_file)], capsys)
    assert main(given.argv(save_steps=1)) == 0
    output = Path(given.options["output"])
    weights = (output / "adapter.safetensors").read_bytes()
    (output / "adapter.safetensors").write_bytes(weights[:100])
    line = fails([*common, "--adapter", str(output)], capsys)
    assert f"--adapter {output}: " in line
    assert "adapter.safetensors" in line
    (output / "reft_config.json").unlink()
    assert "it holds checkpoint-1, name one of them" in fails([*common, "--adapter", str(output)], capsys)


def test_an_adapter_of_another_model_is_refused(
    given: Given, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from training_support import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    assert main(given.argv()) == 0
    wider = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(wider).save_pretrained(tmp_path / "wider")
    make_tokenizer().save_pretrained(tmp_path / "wider")
    argv = ["eval", "--model", tmp_path / "wider", "--data", data_file, "--adapter", given.options["output"]]
    assert f"--adapter {given.options['output']}: " in fails([*map(str, argv), "--device", "cpu"], capsys)


def test_eval_and_generate_refuse_what_they_cannot_use(
    model_folder: Path, tmp_path: Path, data_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rowless = tmp_path / "rows.jsonl"
    rowless.write_text('{"instruction": "a"}\n', encoding="utf-8")
    common = ["--model", str(model_folder), "--device", "cpu"]
    assert "fields 'answer' and 'output' are both missing" in fails(["eval", *common, "--data", str(rowless)], capsys)
    assert "--out" in fails(["eval", *common, "--data", str(data_file), "--out", str(tmp_path)], capsys)
    assert "the prompt is empty" in fails(["generate", *common, "--prompt", " "], capsys)


def test_cuda_where_there_is_none(
    given: Given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--step-graphs: needs a CUDA device and one process, got cpu and 1" in fails(
        [*given.argv(), "--step-graphs"], capsys
    )
    assert "--device cuda: torch " in fails(given.argv(device="cuda"), capsys)


def test_resuming_with_another_adapter_is_refused(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given.argv(save_steps=1)) == 0
    output = Path(given.options["output"])
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    for spoiled, message in (
        ({"rank": 3}, "low_rank_dimension of .* is 2 there and 3 here"),
        ({"method": "direft"}, "is LoreftIntervention there and DireftIntervention here"),
        ({"positions": "f1"}, r"positions of .* is f7\+l7 there and f1 here"),
        ({"dropout": 0.1}, "settings of "),
        ({"layers": "1"}, "has 2 interventions, this run has 1"),
    ):
        line = fails(given.argv(resume=True, max_steps=2, **spoiled), capsys)
        assert re.search(f"--resume: .*checkpoint-1 .*{message}", line), line
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_full_disk_ends_a_run_with_one_sentence(
    given: Given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reft_kernels.checkpoint.save_adapter", full)
    assert main(given.argv()) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in Path(given.options["output"]).iterdir()] == ["train_log.json"]


def test_interrupting_gives_130(
    given: Given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reft_kernels.jobs.rows.parse_rows", interrupt)
    assert main(given.argv()) == 130
    assert capsys.readouterr().err == "reft_kernels train: interrupted; nothing was written\n"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.json"
    write_atomically(path, "old")
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.json"]

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.json"]


@pytest.mark.parametrize("command", ["", "train", "eval", "generate", "info"])
def test_help_shows_every_option_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*([command] if command else []), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    if command == "train":
        for group in ("model:", "data:", "method:", "training:", "output:"):
            assert f"\n{group}\n" in said
        flat = " ".join(said.split())
        for option in ("(default: loreft)", "(default: f7+l7)", "(default: 0.0009)", "(default: 8)"):
            assert option in flat
        assert "on the edited row (default: 0.0)" in flat
        assert "None" not in said
        assert "(default: False)" not in said
    for name in ("train", "eval", "generate", "info") if not command else ():
        assert name in said

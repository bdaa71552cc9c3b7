"""Lines and bars that say how far a training is."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_support import make_llama, make_tokenizer, rows
from transformers import TrainingArguments

from reft_kernels import ReftConfig, get_reft_model
from reft_kernels.training import ReftTrainerForCausalLM, make_supervised_data_module
from reft_kernels.training.progress import ProgressLines, duration, show_progress
from reft_kernels.training.throughput import Throughput


def run(folder: Path, *, bar: bool, speed: bool = True) -> None:
    reft_model = get_reft_model(make_llama(), ReftConfig(method="loreft", layers="all", rank=2, positions="f2+l2"))
    made = rows(16)
    data = make_supervised_data_module(
        make_tokenizer(), reft_model, [row["instruction"] for row in made], [row["output"] for row in made]
    )
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=4, logging_steps=2, report_to="none", use_cpu=True,
        save_strategy="no", eval_strategy="steps", eval_steps=4, disable_tqdm=not bar,
    )  # fmt: skip
    trainer = ReftTrainerForCausalLM(
        reft_model, arguments, callbacks=[Throughput(show=False)] if speed else [],
        **{**data, "eval_dataset": data["train_dataset"]},
    )  # fmt: skip
    show_progress(trainer, bar=bar)
    trainer.train()


def test_lines_say_step_loss_speed_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, bar=False)
    lines = capsys.readouterr().out.splitlines()
    number = r"[\d,]+"
    expected = [
        rf"step 2/6 \(33.3 %\), loss \d+\.\d{{4}}, {number} tokens/s, \d+ s left",
        rf"step 4/6 \(66.7 %\), loss \d+\.\d{{4}}, {number} tokens/s, \d+ s left",
        r"step 4/6, held out: loss \d+\.\d+",
        rf"step 6/6 \(100.0 %\), loss \d+\.\d{{4}}, {number} tokens/s, 0 s left",
    ]
    # transformers 5 evaluates at the end too.
    if len(lines) == 5:
        expected.append(r"step 6/6, held out: loss \d+\.\d+")
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    run(tmp_path, bar=False, speed=False)
    assert "tokens/s" not in capsys.readouterr().out


def test_the_bar_has_the_loss_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, bar=True)
    said = capsys.readouterr()
    assert re.search(r"6/6 \[\d\d:\d\d<00:00, .*loss=\d+\.\d{4}, tokens/s=[\d,]+", said.err)
    assert "step 4, held out: loss" in said.out + said.err
    assert "{'loss'" not in said.out + said.err


def test_the_first_step_is_left_out_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 101.0, 104.0])
    monkeypatch.setattr("reft_kernels.training.progress.time.perf_counter", lambda: next(clock))
    lines = ProgressLines()
    state = SimpleNamespace(global_step=0, max_steps=10)
    lines.on_train_begin(None, state, None)
    state.global_step = 1
    lines.on_step_end(None, state, None)
    assert lines.seconds_left(state) == 101.0 * 9
    state.global_step = 5
    lines.on_step_end(None, state, None)
    assert lines.seconds_left(state) == 4.0 / 4 * 5


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 185, 3600, 7620, 360000)] == [
        "0 s", "59 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min", "100 h 00 min",
    ]  # fmt: skip

"""Jobs that are killed, interrupted, or run out of disk go on from the last good checkpoint."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from job_processes import NOT_PERMITTED, begin, small_disk, stopping, wait_for
from training_support import rows, save_model, write_rows

from reft_kernels.cli import main
from reft_kernels.training.checkpoints import last_complete_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs signals")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows(24))


def train_words(model: Path, data: Path, output: Path, *more: Any) -> list[str]:
    words = ["train", "--model", model, "--data", data, "--output", output, "--device", "cpu", "--no-progress",
             "--no-report", "--rank", 2, "--positions", "f2+l2", "--batch-size", 4, "--log-steps", 1, "--lr", 0.02,
             "--max-steps", 12, "--save-steps", 3, "--keep-checkpoints", 9, *more]  # fmt: skip
    return [str(word) for word in words]


def losses(output: Path) -> list[float]:
    log = json.loads((output / "train_log.json").read_text(encoding="utf-8"))
    assert log["finished"]
    return [entry["loss"] for entry in log["history"]]


@pytest.mark.slow
def test_a_killed_command_goes_on_with_the_same_losses(model: Path, data: Path, tmp_path: Path) -> None:
    more = ("--dropout", 0.1, "--max-steps", 400, "--save-steps", 20)
    command = [sys.executable, "-m", "reft_kernels", *train_words(model, data, tmp_path / "cut", *more)]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "cut" / "checkpoint-40" / "trainer_state.json").exists():
            assert process.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "cut" / "adapter.safetensors").exists()
    resumed = begin([*train_words(model, data, tmp_path / "cut", *more), "--resume"], tmp_path)
    whole = begin(train_words(model, data, tmp_path / "whole", *more), tmp_path)
    assert (resumed.wait(), whole.wait()) == (0, 0)
    assert "resume   from " in resumed.said()
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--cache-frozen", "disk", "--positions", "l3"),
        ("--streaming", 8),
        ("--group-by-length",),
        ("--orthogonality", "polar", "--dropout", 0.1),
        ("--held-out", "count:4", "--best-epoch", "--evaluation", "loss", "--scheduler", "cosine"),
    ],
    ids=lambda more: more[0].strip("-"),
)
def test_kinds_of_runs_go_on_after_a_kill(model: Path, data: Path, tmp_path: Path, more: tuple[Any, ...]) -> None:
    """Killed in a step, with a checkpoint written before: every third step, or every epoch for the best of them."""
    assert main(train_words(model, data, tmp_path / "whole", *more)) == 0
    nth = 7 if "--best-epoch" in more else 4
    around = partial(stopping, "step", tmp_path / "there", nth=nth)
    command = begin(train_words(model, data, tmp_path / "cut", *more), tmp_path, around=around)
    wait_for(tmp_path / "there", command)
    assert command.end(signal.SIGKILL) == -signal.SIGKILL
    assert last_complete_checkpoint(tmp_path / "cut") is not None
    assert main([*train_words(model, data, tmp_path / "cut", *more), "--resume"]) == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["adapter", "optimizer", "state"])
def test_a_kill_in_the_middle_of_a_checkpoint(model: Path, data: Path, tmp_path: Path, place: str) -> None:
    assert main(train_words(model, data, tmp_path / "whole")) == 0
    around = partial(stopping, place, tmp_path / "there")
    command = begin(train_words(model, data, tmp_path / "cut"), tmp_path, around=around)
    wait_for(tmp_path / "there", command)
    assert command.end(signal.SIGKILL) == -signal.SIGKILL
    assert (tmp_path / "cut" / "checkpoint-6").is_dir()
    last = last_complete_checkpoint(tmp_path / "cut")
    assert last == tmp_path / "cut" / "checkpoint-3"
    assert main([*train_words(model, data, tmp_path / "cut"), "--resume"]) == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "cut").iterdir()} == names


@pytest.mark.slow
@pytest.mark.parametrize("place", ["loading", "step", "optimizer", "scoring"])
def test_an_interrupted_run_says_where_to_go_on(model: Path, data: Path, tmp_path: Path, place: str) -> None:
    more = ("--eval-data", data, "--evaluation", "loss")
    output = tmp_path / "run"
    command = begin(
        train_words(model, data, output, *more), tmp_path, around=partial(stopping, place, tmp_path / "there")
    )
    wait_for(tmp_path / "there", command)
    assert command.end(signal.SIGINT) == 130
    if place == "loading":
        assert command.errors() == ["reft_kernels train: interrupted; nothing was written"]
        assert not output.exists()
        return
    last = output / f"checkpoint-{12 if place == 'scoring' else 3}"
    assert command.errors() == [
        f"reft_kernels train: interrupted; the last checkpoint is {last}; --resume goes on from there"
    ]
    kept = {"train_log.json", *(f"checkpoint-{n}" for n in ((3, 6, 9, 12) if place == "scoring" else (3,)))}
    finished = {"adapter.safetensors", "reft_config.json"} if place == "scoring" else set()
    assert {path.name for path in output.iterdir()} == kept | finished
    assert main([*train_words(model, data, output, *more), "--resume"]) == 0
    assert len(losses(output)) == 12
    assert json.loads((output / "train_log.json").read_text())["results"]


def test_an_interruption_before_the_first_checkpoint(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reft_kernels.training.trainer import ReftTrainer

    def interrupt(*_args: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ReftTrainer, "training_step", interrupt)
    assert main(train_words(model, data, tmp_path / "run")) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    wanted = f"interrupted; no checkpoint had been written to {tmp_path / 'run'}; --overwrite starts anew"
    assert said == f"reft_kernels train: {wanted}"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"train_log.json"}
    monkeypatch.undo()
    assert main([*train_words(model, data, tmp_path / "run", "--max-steps", 1), "--overwrite"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 60, 92])
def test_a_small_disk(model: Path, data: Path, tmp_path: Path, size: int) -> None:
    """A real one: whatever comes when it is full is one sentence, and the checkpoints before it are whole."""
    (tmp_path / "disk").mkdir()
    output = tmp_path / "disk" / "run"
    around = partial(small_disk, tmp_path / "disk", f"{size}k", tmp_path / "copy")
    command = begin(train_words(model, data, output), tmp_path, around=around)
    if (code := command.wait()) == NOT_PERMITTED:
        pytest.skip("this system mounts no file system for a user")
    assert code == 2
    (line,) = command.errors()
    assert line.startswith(f"reft_kernels train: error: --output {output}: ")
    assert "No space left" in line or "is the disk full" in line
    found = tmp_path / "copy" / "run"
    last = last_complete_checkpoint(found)
    kept = range(3, int(last.name.removeprefix("checkpoint-")) + 1, 3) if last is not None else ()
    assert bool(kept) == (size >= 60)
    assert {path.name for path in found.iterdir()} == {"train_log.json", *(f"checkpoint-{n}" for n in kept)}
    if not kept:
        return
    assert main([*train_words(model, data, found), "--resume"]) == 0
    assert main(train_words(model, data, tmp_path / "whole")) == 0
    assert losses(found) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


@pytest.mark.slow
def test_a_search_goes_on(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    words = ["search", "--model", model, "--data", data, "--output", tmp_path / "search", "--device", "cpu",
             "--trials", 3, "--over", "rank=1,2,4", "--positions", "f2", "--evaluation", "loss", "--epochs", 1,
             "--batch-size", 4]  # fmt: skip
    for number in (signal.SIGINT, signal.SIGKILL):
        mark = tmp_path / f"there-{number}"
        command = begin(words, tmp_path, around=partial(stopping, "step", mark, nth=8))
        wait_for(mark, command)
        if number == signal.SIGINT:
            assert command.end(number) == 130
            assert command.errors() == [
                "reft_kernels search: interrupted; 1 of 3 trials are done; the same command goes on"
            ]
            assert not list((tmp_path / "search").glob("trial-*"))
        else:
            assert command.end(number) == -number
    begun = [line for line in command.said().splitlines() if line.startswith("[")]
    command = begin(words, tmp_path)
    assert command.wait() == 0
    found = json.loads((tmp_path / "search" / "search.json").read_text())
    assert [entry["state"] for entry in found["trials"]] == ["complete"] * 3
    # What was killed is what comes first now.
    assert command.said().splitlines()[0].partition("] ")[2] == begun[-1].partition("] ")[2]
    assert not list((tmp_path / "search").glob("trial-*"))


def test_a_comparison_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def here(words: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        if len(ran) == 1:
            ran.append("interrupted")
            raise KeyboardInterrupt
        ran.append(Path(words[words.index("--output") + 1]).name)
        return subprocess.CompletedProcess(words, main(words[3:]), "", "")

    monkeypatch.setattr("reft_kernels.jobs.compare.subprocess.run", here)
    words = ["compare", "--model", model, "--data", data, "--output", tmp_path / "all", "--device", "cpu", "--methods",
             "loreft", "direft", "--seeds", 1, "--positions", "f2", "--evaluation", "loss", "--max-steps", 2,
             "--eval-data", data]  # fmt: skip
    argv = [str(word) for word in words]
    assert main(argv) == 130
    stop = capsys.readouterr().err.splitlines()[-1]
    assert stop == "reft_kernels compare: interrupted; 1 of 2 runs are done; the same command goes on"
    assert main(argv) == 0
    assert ran == ["loreft-1", "interrupted", "direft-1"]
    assert set(json.loads((tmp_path / "all" / "comparison.json").read_text())["methods"]) == {"loreft", "direft"}


@pytest.mark.parametrize(
    "written",
    [r"run/train_log", r"run/\.+adapter-", r"\.saving/report\.html", r"predictions/\.?rows", r"\.saving/README"],
)
def test_a_full_disk_is_one_sentence(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    written: str,
) -> None:  # fmt: skip
    """One file after the other cannot be flushed."""
    usual = os.fsync
    hit: list[str] = []

    def full(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if re.search(written, path.replace("/.train_log", "/train_log")):
            hit.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(handle)

    monkeypatch.setattr(os, "fsync", full)
    words = train_words(model, data, tmp_path / "run", "--max-steps", 3, "--eval-data", data, "--max-new-tokens", 2)
    words.remove("--no-report")
    assert main(words) == 2
    assert hit
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line == f"reft_kernels train: error: --output {tmp_path / 'run'}: [Errno 28] No space left on device"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]
    if "train_log" not in written:
        assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"


def test_a_checkpoint_that_torch_cannot_write(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    usual = torch.save
    monkeypatch.setattr(
        torch, "save", lambda thing, path: usual(thing, "/dev/full" if "checkpoint-6" in str(path) else path)
    )
    assert main(train_words(model, data, tmp_path / "run")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "torch.save could not write a file to its end (is the disk full?)" in line
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-3"
    assert not (tmp_path / "run" / "checkpoint-6").exists()

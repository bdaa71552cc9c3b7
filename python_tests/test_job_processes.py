"""Jobs in two processes (gloo) train and evaluate as one does with batches of twice the size, and fail together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from job_processes import Command, begin, split_on_cpu, stopping, wait_for
from safetensors.torch import load_file
from training_support import rows, save_encoder, save_model, sentences, write_rows
from two_processes import WORLD, free_port

from reft_kernels.cli import main
from reft_kernels.jobs import processes
from reft_kernels.training.checkpoints import last_complete_checkpoint

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs torch.distributed with gloo")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    quiz = [
        {
            "instruction": f"Please choose the colour of box {'very ' * (k % 4)}{k}\n\nAnswer format: red/green/blue",
            "output": "the correct answer is red",
            "answer": ("red", "green", "blue")[k % 3],
        }
        for k in range(7)
    ]
    made = {"boxes": rows(24), "more": rows(7, first=30), "quiz": quiz,
            "sentences": sentences(48), "others": sentences(23, first=50)}  # fmt: skip
    undropped = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    found = {"llama": save_model(folder / "llama"), "encoder": save_encoder(folder / "encoder", **undropped)}
    return found | {name: write_rows(folder / f"{name}.jsonl", content) for name, content in made.items()}


def train_words(files: dict[str, Path], output: Path, *more: Any, model: str = "llama", together: int) -> list[str]:
    """`train` with batches of 4 in all of the processes."""
    words = ["train", "--model", files[model], "--data", files["boxes"], "--output", output, "--device", "cpu",
             "--no-progress", "--no-report", "--rank", 2, "--positions", "f2+l2", "--batch-size", 4 // together,
             "--log-steps", 1, "--lr", 0.02, "--max-steps", 8, "--max-new-tokens", 6, "--eval-batch-size", 3,
             *more]  # fmt: skip
    return [str(files.get(str(word), word)) for word in words]


def launch(words: list[str], folder: Path, around: Any = None) -> list[Command]:
    """The command in two processes, with the environment that torchrun makes."""
    port = free_port()
    return [
        begin(
            words,
            folder,
            environment={
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            },
            around=around,
        )
        for rank in range(WORLD)
    ]  # fmt: skip


def ended(commands: Sequence[Command]) -> list[int]:
    return [command.wait() for command in commands]


def log_of(output: Path) -> dict[str, Any]:
    log: dict[str, Any] = json.loads((output / "train_log.json").read_text(encoding="utf-8"))
    assert log["finished"]
    return log


def assert_trained_alike(one: Path, two: Path) -> None:
    """Losses, held-out rows and results are those of one process, and so are the weights, to rounding."""
    alone, joint = log_of(one), log_of(two)
    assert (alone["processes"], joint["processes"]) == (1, WORLD)
    wanted, found = ([entry["loss"] for entry in log["history"]] for log in (alone, joint))
    assert found == pytest.approx(wanted, rel=1e-4)
    for before, after in zip(alone["held_out"], joint["held_out"], strict=True):
        metrics = [name for name in before if not name.endswith(("_runtime", "_per_second", "_time"))]
        assert [after[name] for name in metrics] == pytest.approx([before[name] for name in metrics], rel=1e-3)
    for name, metrics in alone["results"].items():
        del metrics["seconds"], joint["results"][name]["seconds"]
        assert joint["results"][name] == pytest.approx(metrics, rel=1e-4)
    for path in (one / "predictions").glob("*.jsonl"):
        there, here = ((folder / "predictions" / path.name).read_text().splitlines() for folder in (two, one))
        rows = [[json.loads(line) for line in lines] for lines in (there, here)]
        assert len(rows[0]) == len(rows[1]) > 0
        for name in ("prompt", "text", "answer", "gold", "correct"):
            assert [row.get(name) for row in rows[0]] == [row.get(name) for row in rows[1]]
    first, second = (load_file(folder / "adapter.safetensors") for folder in (one, two))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-4)


def launchers() -> dict[str, list[list[str]]]:
    """The first words of the commands that start two processes; "two machines" are two commands."""
    port = str(free_port())
    torchrun, accelerate = (str(Path(sys.executable).parent / name) for name in ("torchrun", "accelerate"))
    machine = [torchrun, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", port,
               "--rdzv-endpoint", f"localhost:{port}"]  # fmt: skip
    return {
        "torchrun": [[torchrun, "--nproc-per-node", "2", "--master-port", port]],
        # Also without a GPU: with --cpu it would start one process alone.
        "accelerate": [[accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]],
        "two machines": [machine, machine],
    }  # fmt: skip


@slow
@pytest.mark.parametrize("launcher", list(launchers()))
def test_the_launchers(files: dict[str, Path], tmp_path: Path, launcher: str) -> None:
    more = ("--eval-data", "more", "--held-out", "count:4", "--save-steps", 4)
    assert main(train_words(files, tmp_path / "one", *more, together=1)) == 0
    words = ["-m", "reft_kernels", *train_words(files, tmp_path / "two", *more, together=2)]
    started = [
        subprocess.Popen(
            [*start, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for start in launchers()[launcher]
    ]  # fmt: skip
    try:
        printed = [one.communicate(timeout=240) for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0] * len(started), printed
    said, complained = ("".join(part) for part in zip(*printed, strict=True))
    assert said.count("step 8/8 (100.0 %)") == 1
    assert said.count("eval     more: ") == 1
    assert "processes 2, each with batches of 2: 4 examples a step" in said
    assert "find_unused_parameters" not in complained
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    kept = {path.name for path in (tmp_path / "two" / "checkpoint-8").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= kept


@slow
@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("llama", ("--evaluation", "loss", "--eval-data", "more", "--cache-frozen", "disk", "--positions", "l3",
                   "--held-out", "count:4")),
        ("llama", ("--evaluation", "rank", "--eval-data", "quiz", "--group-by-length", "--orthogonality", "polar")),
        ("llama", ("--evaluation", "recite", "--eval-data", "more", "--streaming", 8, "--gradient-checkpointing")),
        ("encoder", ("--task", "classification", "--glue", "cola", "--data", "sentences", "--eval-data", "others",
                     "--held-out", "glue", "--best-epoch", "--positions", "f3", "--max-steps", 24)),
        ("llama", ("--method", "lora", "--evaluation", "loss", "--eval-data", "more")),
    ],
    ids=["loss", "rank", "recite", "classification", "lora"],
)  # fmt: skip
def test_kinds_of_jobs(files: dict[str, Path], tmp_path: Path, model: str, more: tuple[Any, ...]) -> None:
    for word, package in (("lora", "peft"), ("classification", "sklearn")):
        if word in more:
            pytest.importorskip(package)
    assert main(train_words(files, tmp_path / "one", *more, model=model, together=1)) == 0
    commands = launch(train_words(files, tmp_path / "two", *more, model=model, together=2), tmp_path)
    assert ended(commands) == [0, 0], commands[0].complained() + commands[1].complained()
    assert commands[1].said() == ""
    assert_trained_alike(tmp_path / "one", tmp_path / "two")


@slow
@pytest.mark.parametrize(
    "more",
    [
        ("--dropout", 0.1, "--evaluation", "generate", "--held-out", "count:4"),
        (
            "--component",
            "mlp_input",
            "--evaluation",
            "rank",
            "--eval-data",
            "quiz",
            "--orthogonality",
            "polar",
            "--gradient-checkpointing",
        ),
    ],
    ids=["block", "mlp"],
)
def test_a_split_model_is_trained_as_a_whole_one(files: dict[str, Path], tmp_path: Path, more: tuple[Any, ...]) -> None:
    """Both processes see the whole batches; the adapter that is saved is the whole one, and resumes."""
    more = ("--eval-data", "more", "--save-steps", 4, "--accumulation", 2, *more)
    assert main(train_words(files, tmp_path / "one", *more, together=1)) == 0
    words = [*train_words(files, tmp_path / "two", *more, together=1), "--tensor-parallel"]
    commands = launch(words, tmp_path, around=split_on_cpu)
    assert ended(commands) == [0, 0], commands[0].complained()
    assert "processes 2, each with a part of the model: 8 examples a step" in commands[0].said()
    before = [entry["loss"] for entry in log_of(tmp_path / "two")["history"]]
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "checkpoint-8" / "trainer_state.json").unlink()
    assert ended(launch([*words, "--resume"], tmp_path, around=split_on_cpu)) == [0, 0]
    assert [entry["loss"] for entry in log_of(tmp_path / "two")["history"]] == pytest.approx(before, abs=1e-6)


@slow
@pytest.mark.parametrize(
    "more",
    [
        ("--evaluation", "generate", "--held-out", "count:4", "--best-epoch", "--max-steps", 10),
        (
            "--method",
            "nodireft",
            "--evaluation",
            "rank",
            "--eval-data",
            "quiz",
            "--gradient-checkpointing",
            "--accumulation",
            2,
        ),
    ],
    ids=["generate", "rank"],
)
def test_a_sharded_model_is_trained_as_a_whole_one(
    files: dict[str, Path], tmp_path: Path, more: tuple[Any, ...]
) -> None:
    """Checkpoints hold the adapter, whole, and nothing of the base model; the run resumes from them."""
    more = ("--eval-data", "more", "--save-steps", 4, *more)
    assert main(train_words(files, tmp_path / "one", *more, together=1)) == 0
    words = [*train_words(files, tmp_path / "two", *more, together=2), "--shard"]
    commands = launch(words, tmp_path, around=split_on_cpu)
    assert ended(commands) == [0, 0], commands[0].complained()
    before = [entry["loss"] for entry in log_of(tmp_path / "two")["history"]]
    assert_trained_alike(tmp_path / "one", tmp_path / "two")
    last = last_complete_checkpoint(tmp_path / "two")
    assert last is not None
    assert sum(path.stat().st_size for path in last.iterdir()) < 100_000  # of the base model: 144,000
    (last / "trainer_state.json").unlink()
    assert ended(launch([*words, "--resume"], tmp_path, around=split_on_cpu)) == [0, 0]
    assert [entry["loss"] for entry in log_of(tmp_path / "two")["history"]] == pytest.approx(before, abs=1e-6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tensor-parallel",), "--tensor-parallel: needs several processes"),
        (("--shard",), "--shard: needs several processes"),
        (("--tensor-parallel", "--method", "lora"), "settings: tensor_parallel does not go with method 'lora'"),
        (("--shard", "--cache-frozen", "memory"), "settings: shard does not go with cache_frozen 'memory'"),
        (("--shard", "--orthogonality", "polar"), "settings: shard does not go with orthogonality 'polar'"),
        (("--shard", "--tensor-parallel"), "settings: shard does not go with tensor_parallel"),
        (("--shard", "--step-graphs"), "settings: shard does not go with step_graphs True"),
    ],
)
def test_where_a_model_cannot_be_split(
    files: dict[str, Path], tmp_path: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(train_words(files, tmp_path / "run", *more, together=1)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@slow
@pytest.mark.parametrize("option", ["--tensor-parallel", "--shard"])
def test_a_model_is_split_on_gpus_alone(files: dict[str, Path], tmp_path: Path, option: str) -> None:
    commands = launch([*train_words(files, tmp_path / "run", together=1), option], tmp_path)
    assert ended(commands) == [2, 2]
    (line,) = commands[0].errors()
    assert line.startswith(f"reft_kernels train: error: {option}: needs GPUs")
    assert commands[1].errors() == []


@slow
def test_eval_shares_the_rows(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(train_words(files, tmp_path / "run", together=1)) == 0
    words = ["eval", "--adapter", tmp_path / "run", "--data", files["more"], "--device", "cpu", "--no-progress"]
    assert main([str(word) for word in (*words, "--out", tmp_path / "one.jsonl")]) == 0
    commands = launch([str(word) for word in (*words, "--out", tmp_path / "two.jsonl")], tmp_path)
    assert ended(commands) == [0, 0], commands[0].complained()
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    scores = [line.rpartition(",")[0] for line in commands[0].said().splitlines() if line.startswith("more")]
    assert scores == [
        line.rpartition(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("more")
    ]
    assert commands[1].said() == ""


@slow
def test_a_kill_of_two_goes_on(files: dict[str, Path], tmp_path: Path) -> None:
    more = ("--dropout", 0.1, "--save-steps", 2, "--keep-checkpoints", 9)
    words = train_words(files, tmp_path / "whole", *more, together=2)
    assert ended(launch(words, tmp_path)) == [0, 0]
    words = train_words(files, tmp_path / "cut", *more, together=2)
    commands = launch(words, tmp_path, around=partial(stopping, "step", tmp_path / "there", nth=6))
    for command in commands:
        wait_for(tmp_path / "there", command)
    assert {command.end(signal.SIGKILL) for command in commands} == {-signal.SIGKILL}
    assert last_complete_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-4"
    again = launch([*words, "--resume"], tmp_path)
    if transformers.__version__.startswith("4."):
        assert ended(again) == [2, 2]
        assert "--resume: of several processes on CPUs needs transformers 5" in again[0].complained()
        return
    assert ended(again) == [0, 0]
    whole, cut = ([entry["loss"] for entry in log_of(tmp_path / name)["history"]] for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, abs=1e-6)


@slow
@pytest.mark.parametrize("wrong", ["folder", "rows", "arguments", "scored rows"])
def test_an_error_is_said_once_and_ends_all(files: dict[str, Path], tmp_path: Path, wrong: str) -> None:
    write_rows(tmp_path / "bad.jsonl", [{"instruction": 3}])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    output, more, message = {
        "folder": ("used", (), "the folder is in use"),
        "rows": ("run", ("--data", tmp_path / "bad.jsonl"), "line 1: field 'instruction' must be text"),
        "arguments": ("run", ("--rank", 0), "must be at least 1"),
        "scored rows": ("run", ("--eval-data", "more", "--evaluation", "rank"), "expected 'Answer format"),
    }[wrong]
    commands = launch(train_words(files, tmp_path / output, *more, together=2), tmp_path)
    assert ended(commands) == [2, 2]
    (line,) = commands[0].errors()
    assert message in line
    assert commands[1].errors() == []
    assert not (tmp_path / "run").exists()


@slow
@pytest.mark.parametrize("survivor", [0, 1])
def test_a_process_that_is_left_alone_ends(files: dict[str, Path], tmp_path: Path, survivor: int) -> None:
    """Without a launcher that would end it."""
    commands = []
    port = free_port()
    for rank in range(WORLD):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        around = None if rank == survivor else partial(stopping, "step", tmp_path / "there", nth=5)
        words = train_words(files, tmp_path / "run", "--save-steps", 2, together=2)
        commands.append(begin(words, tmp_path, environment=environment, around=around))
    killed = commands[1 - survivor]
    wait_for(tmp_path / "there", killed)
    assert killed.end(signal.SIGKILL) == -signal.SIGKILL
    assert commands[survivor].wait() == 2
    said = ["reft_kernels train: error: another process of this job has ended"] if survivor == 0 else []
    assert commands[survivor].errors() == said
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_what_runs_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["compare", "--model", "m", "--output", "o"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == ["reft_kernels compare: error: runs in one process; train and eval run in several"]


def test_one_process_shares_with_nobody() -> None:
    assert processes.share([3, 1, 2], lambda part: [2 * item for item in part]) == [6, 2, 4]
    assert processes.gather("mine") == ["mine"]
    with pytest.raises(KeyError, match="x"), processes.together():
        raise KeyError("x")


@pytest.mark.parametrize("block", [1, 2, 5])
def test_each_item_is_scored_once(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """By three processes, of which one after the other is played here."""
    items, lengths = list("abcdefgh"), [3, 1, 4, 1, 5, 9, 2, 6]
    parts: list[list[str]] = []
    dealt: list[list[str]] = []

    def score(part: list[str]) -> list[str]:
        dealt.append(part)
        return [item.upper() for item in part]

    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "together", nullcontext)
    for rank in range(3):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(processes, "gather", lambda value: _keep(parts, value))
        with pytest.raises(StopIteration):
            processes.share(items, score, lengths=lambda: lengths, block=block)
    assert sorted(item for part in dealt for item in part) == items
    longest = sorted(items, key=lambda item: -lengths[items.index(item)])
    wanted = [longest[start : start + block] for start in range(0, 3 * block, block)]
    assert [part[:block] for part in dealt] == [part for part in wanted if part]
    monkeypatch.setattr(processes, "gather", lambda _: parts)
    assert processes.share(items, score, lengths=lambda: lengths, block=block) == [item.upper() for item in items]


def _keep(parts: list[list[str]], value: list[str]) -> None:
    parts.append(value)
    raise StopIteration

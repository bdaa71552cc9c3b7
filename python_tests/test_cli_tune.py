"""`tune`: which configuration it chooses, what it believes, and the table that it leaves. Times are made up."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reft_kernels import reference
from reft_kernels.cli import build_parser, main, tune
from reft_kernels.jobs.errors import UserError
from reft_kernels.triton import config_tables, launch_configs
from reft_kernels.triton.config_tables import Config, Entry, Key, format_table, make_config, misfit, read_table
from reft_kernels.tuning import MAX_NAMED_ROWS, Variant, candidates, default_variant, mismatch
from reft_kernels.tuning_bench import DeviceBench, _poisoned, draw, heuristic, run

CPU = torch.device("cpu")
VARIANTS = [Variant(rebuild, scale) for rebuild in (False, True) for scale in (False, True)]
HEADER = dict.fromkeys(config_tables.HEADER, "1.0") | {"device": "cpu"}
SMALL = ("--d", "64", "--r", "4", "--n", "32", "448", "--op", "edit_forward")


class Clock:
    """Time that passes only when a bench says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeBench:
    """Takes ten seconds a run; the time is a function of the key, the configuration and the number of the call."""

    def __init__(self, key: Key, clock: Clock, us: Callable[[Key, Config, int], float]) -> None:
        self.key, self.clock, self.us = key, clock, us
        self.calls: dict[Config, int] = {}

    def results(self, config: Config, variant: Variant) -> Mapping[str, torch.Tensor]:
        return {"y": torch.ones(4)}

    def time(self, config: Config) -> float:
        self.clock.now += 10
        self.calls[config] = self.calls.get(config, 0) + 1
        return self.us(self.key, config, self.calls[config])

    def check(self) -> None:
        """The device is well."""


def arguments(folder: Path, *argv: str) -> Any:
    parser, _ = build_parser()
    return parser.parse_args(["tune", "--out", str(folder), *argv])


def tuned(
    folder: Path, *argv: str, us: Callable[[Key, Config, int], float], bench: type[FakeBench] = FakeBench
) -> dict[Key, Entry]:
    """Runs the command with a fake bench; the table that it left."""
    clock = Clock()
    tune.run(arguments(folder, *SMALL, *argv), device=CPU, make_bench=lambda key, _: bench(key, clock, us), clock=clock)
    return read_table(folder / "cpu.json").entries


def forward(n: int) -> Key:
    return Key("edit_forward", "bfloat16", "float32", True, 64, 4, n)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["tune", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("reft_kernels tune: error: needs a CUDA device")
    assert said.out == ""
    assert not (tmp_path / "out").exists()


def test_a_dry_run_lists_the_candidates_and_writes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["tune", "--dry-run", *SMALL, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    total = 0
    for n in (32, 448):
        todo = candidates(forward(n), heuristic(forward(n), CPU))
        total += len(todo)
        block = said.partition(f"{forward(n)}: {len(todo)} candidates\n")[2].splitlines()[: len(todo)]
        assert block[0].endswith("(heuristic)")
        assert len(set(block)) == len(todo)
        assert all(re.match(r"  METHOD=\w+ BLOCK_N=\d+ BLOCK_D=\d+ STAGES=\d num_warps=\d", line) for line in block)
    assert said.endswith(f"2 cases, {total} candidates\n")
    assert list(tmp_path.iterdir()) == []


def test_the_fastest_is_kept_and_the_gain_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [forward(32), forward(448)]
    best = {key: candidates(key, heuristic(key, CPU))[5] for key in keys}
    entries = tuned(tmp_path, us=lambda key, config, _: 4.0 if config == best[key] else 10.0 + config.num_warps)
    assert entries == {key: Entry(best[key], 4.0) for key in keys}
    said = capsys.readouterr().out
    slow = 10 + heuristic(keys[0], CPU).num_warps
    assert f"[1/2] {keys[0]}: {slow:.2f} -> 4.00 us ({slow / 4:.2f}x), " in said
    (header,) = [line for line in said.splitlines() if line.startswith("op ")]
    row = said.splitlines()[said.splitlines().index(header) + 1]
    assert row.split()[:10] == [
        *("edit_forward", "32", "64", "4", "bfloat16", "float32", "yes", f"{slow:.2f}", "4.00", f"{slow / 4:.2f}x"),
    ]
    assert row.endswith(" ".join(f"{name}={value}" for name, value in best[keys[0]]._asdict().items()))
    assert f"2 entries written to {tmp_path / 'cpu.json'}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]
    table = read_table(tmp_path / "cpu.json")
    assert table.header["device"] == "cpu"
    assert table.header["torch"] == torch.__version__


def test_a_lookup_finds_what_was_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFT_KERNELS_CONFIG_DIR", str(tmp_path))
    launch_configs.reload()
    wanted = candidates(forward(448), heuristic(forward(448), CPU))[3]
    tuned(tmp_path, us=lambda key, config, _: 1.0 if config == wanted else 2.0)
    found = launch_configs.lookup(
        "edit_forward", "cpu", N=400, d=64, r=4, h=torch.bfloat16, parameters=torch.float32, linear=True
    )
    launch_configs.reload()
    assert found == wanted


def test_what_computes_something_else_or_does_not_compile_is_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = candidates(forward(32), heuristic(forward(32), CPU))
    wrong, broken, good = todo[1], todo[2], todo[3]

    class Bench(FakeBench):
        def results(self, config: Config, variant: Variant) -> Mapping[str, torch.Tensor]:
            if config == broken:
                raise RuntimeError("PassManager::run failed\nwith details")
            return {"y": torch.ones(4) + (0.1 if config == wrong else 0)}

    speed = {wrong: 1.0, broken: 1.0, good: 3.0}
    entries = tuned(tmp_path, "--n", "32", us=lambda _, config, __: speed.get(config, 5.0), bench=Bench)
    assert entries == {forward(32): Entry(good, 3.0)}
    said = capsys.readouterr()
    assert f"{len(todo)} of {len(todo)} candidates" in said.out
    dropped = said.err.splitlines()
    assert len(dropped) == 2
    assert dropped[0].endswith("y is off by 0.1 beyond its rounding, its largest element is 1")
    assert dropped[1].endswith("RuntimeError: PassManager::run failed")


@pytest.mark.parametrize("bad", VARIANTS, ids=str)
@pytest.mark.parametrize("raises", [True, False])
def test_what_fails_in_one_variant_of_the_edit_is_not_chosen(
    bad: Variant, raises: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    todo = candidates(forward(32), heuristic(forward(32), CPU))
    tempting, good, slow = todo[1:4]
    asked: dict[Config, list[Variant]] = {}

    class Bench(FakeBench):
        def results(self, config: Config, variant: Variant) -> Mapping[str, torch.Tensor]:
            asked.setdefault(config, []).append(variant)
            if config == tempting and variant == bad:
                if raises:
                    raise RuntimeError("out of resource: shared memory, Required: 262144")
                return {"y": torch.zeros(4)}
            return {"y": torch.ones(4)}

    speed = {tempting: 1.0, good: 3.0, slow: 4.0}
    entries = tuned(tmp_path, "--n", "32", us=lambda _, config, __: speed.get(config, 5.0), bench=Bench)
    assert entries == {forward(32): Entry(good, 3.0)}
    (dropped,) = capsys.readouterr().err.splitlines()
    assert f": {bad}: {'RuntimeError: out of resource' if raises else 'y is off by 1'}" in dropped
    for config in (todo[0], good):
        assert sorted(asked[config]) == VARIANTS
    assert asked[slow] == [default_variant(forward(32))]


def test_the_default_variant_is_timed() -> None:
    backward = forward(32)._replace(op="edit_backward")
    assert default_variant(backward) == Variant(rebuild=False, scale=False)
    assert default_variant(backward._replace(N=MAX_NAMED_ROWS)) == Variant(rebuild=False, scale=False)
    assert default_variant(backward._replace(N=MAX_NAMED_ROWS + 1)) == Variant(rebuild=True, scale=False)
    for n in (32, MAX_NAMED_ROWS + 1):
        assert default_variant(forward(n)) == Variant(rebuild=True, scale=False)


@pytest.mark.parametrize("where", ["results", "time", "time again"])
def test_an_error_of_the_heuristic_ends_its_case_alone(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Bench(FakeBench):
        def results(self, config: Config, variant: Variant) -> Mapping[str, torch.Tensor]:
            if where == "results" and self.key.N == 32:
                raise torch.OutOfMemoryError("CUDA out of memory.\nwith details")
            return super().results(config, variant)

    def us(key: Key, config: Config, call: int) -> float:
        own = config == heuristic(key, CPU)
        if key.N == 32 and own and (where, call) in (("time", 1), ("time again", 2)):
            raise torch.OutOfMemoryError("CUDA out of memory.\nwith details")
        return 5.0 if own else 1.0

    entries = tuned(tmp_path, us=us, bench=Bench)
    assert list(entries) == [forward(448)]
    said = capsys.readouterr()
    what = "timing the fastest again" if where == "time again" else "the heuristic's configuration"
    assert said.err.splitlines()[0] == (
        f"[1/2] {forward(32)}: not measured: {what}: OutOfMemoryError: CUDA out of memory."
    )
    assert "1 entries written" in said.out
    assert "1 cases could not be measured, the reasons stand above" in said.out
    assert "were over" not in said.out


def test_a_device_that_the_heuristic_lost_ends_the_run(tmp_path: Path) -> None:
    class Bench(FakeBench):
        def results(self, config: Config, variant: Variant) -> Mapping[str, torch.Tensor]:
            raise RuntimeError("an illegal memory access was encountered")

        def check(self) -> None:
            raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        tuned(tmp_path, us=lambda *_: 1.0, bench=Bench)


def test_a_lost_device_ends_the_run(tmp_path: Path) -> None:
    class Bench(FakeBench):
        def results(self, config: Config, variant: Variant) -> Mapping[str, torch.Tensor]:
            if config != heuristic(self.key, CPU):
                raise RuntimeError("an illegal memory access was encountered")
            return super().results(config, variant)

        def check(self) -> None:
            raise RuntimeError("the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        tuned(tmp_path, us=lambda *_: 1.0, bench=Bench)


def test_a_result_that_is_not_finite_is_no_yardstick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Bench(FakeBench):
        def results(self, config: Config, variant: Variant) -> Mapping[str, torch.Tensor]:
            return {"y": torch.full((4,), float("nan") if variant.scale else 1.0)}

    with pytest.raises(UserError, match="none of the cases could be measured"):
        tuned(tmp_path, us=lambda *_: 1.0, bench=Bench)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert all(re.search(r"N=\d+: not measured: .*scale=True: y not finite$", line) for line in said)


@pytest.mark.parametrize(("again", "kept"), [(9.9, False), (9.0, True)])
def test_the_fastest_has_to_win_twice_and_by_more_than_noise(tmp_path: Path, again: float, kept: bool) -> None:
    lucky = candidates(forward(32), heuristic(forward(32), CPU))[4]
    entries = tuned(
        tmp_path, "--n", "32", us=lambda _, config, call: (5.0 if call == 1 else again) if config == lucky else 10.0
    )
    expected = Entry(lucky, again) if kept else Entry(heuristic(forward(32), CPU), 10.0)
    assert entries == {forward(32): expected}


def test_the_time_is_shared_equally_and_what_was_not_measured_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(tmp_path, "--seconds", "200", us=lambda _, config, __: 5.0)
    said = capsys.readouterr().out
    # Ten seconds a run: for the first case ten runs of the hundred seconds, for the second one the rest.
    tried = [int(n) for n in re.findall(r"(\d+) of \d+ candidates", said)]
    assert tried == [10, 10]
    entries = tuned(tmp_path / "short", "--seconds", "10", us=lambda _, config, __: 5.0)
    assert list(entries) == [forward(32)]
    said = capsys.readouterr().out
    assert "1 entries written" in said
    assert "1 cases not measured: --seconds 10 were over" in said


def test_an_existing_table_is_added_to(tmp_path: Path) -> None:
    config = heuristic(forward(32), CPU)._replace(num_warps=16)
    old = {forward(n): Entry(config, 99.0) for n in (32, 9000)}
    (tmp_path / "cpu.json").write_text(format_table(HEADER, old))
    entries = tuned(tmp_path, us=lambda *_: 5.0)
    assert set(entries) == {forward(32), forward(448), forward(9000)}
    assert entries[forward(9000)] == old[forward(9000)]
    assert entries[forward(32)] == Entry(heuristic(forward(32), CPU), 5.0)


def test_a_broken_table_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"the table that is to be added to: .*cpu.json: expected JSON"):
        tuned(tmp_path, us=lambda *_: 5.0)
    assert path.read_text() == "{"


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(format_table(HEADER, {}))
    before = path.read_bytes()
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target) == path:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=f"--out {tmp_path}: .*No space left"):
        tuned(tmp_path, us=lambda *_: 5.0)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["cpu.json"]


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    def interrupted(key: Key, config: Config, call: int) -> float:
        if key.N == 448:
            raise KeyboardInterrupt
        return 5.0

    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, us=interrupted)
    assert list(read_table(tmp_path / "cpu.json").entries) == [forward(32)]


def test_a_folder_that_cannot_be_written_is_found_out_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = []
    with pytest.raises(UserError, match=f"--out {tmp_path / 'file'}"):
        tune.run(arguments(tmp_path / "file", *SMALL), device=CPU, make_bench=lambda key, _: made.append(key))
    assert made == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--r", "65"), "--r 65: expected at most 64 for --d 4096"),
        (("--r", "9", "--d", "8"), "--r 9: expected at most 8 for --d 8"),
        (("--n", "0"), "--n: must be at least 1, got 0"),
        (("--seconds", "0"), "--seconds: must be at least 1"),
        (("--dtype", "float64"), "--dtype: invalid choice: 'float64'"),
        (("--activation", "gelu"), "--activation: invalid choice: 'gelu'"),
    ],
)
def test_misused_options(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(["tune", "--dry-run", *argv])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.startswith("reft_kernels tune: error: ")
    assert message in said.err


KEYS = [
    Key(op, h, parameters, linear, d, r, n)
    for op in config_tables.CONFIGS
    for h, parameters in (("bfloat16", "float32"), ("float32", "float32"), ("float16", "float16"))
    for linear in (True, False)
    for d, r in ((1, 1), (64, 4), (768, 8), (4096, 4), (4097, 16), (4096, 64), (16384, 8), (20000, 4))
    for n in (1, 32, 448, 65536)
]


def test_the_heuristic_and_all_candidates_are_configurations_that_a_table_may_hold() -> None:
    for key in KEYS:
        first = heuristic(key, CPU)
        todo = candidates(key, first)
        assert todo[0] == first
        assert 4 <= len(todo) <= 300, (key, len(todo))
        assert len(set(todo)) == len(todo)
        for config in todo:
            assert make_config(key.op, config._asdict()) == config
            assert misfit(config, key.d) is None, (key, config)


def test_candidates_come_by_how_little_they_differ_from_the_heuristic() -> None:
    key = forward(448)._replace(d=4096)
    todo = candidates(key, heuristic(key, CPU))
    differing = [sum(a != b for a, b in zip(config, todo[0], strict=True)) for config in todo]
    assert differing[1:4] == [1, 1, 1]
    assert {config.METHOD for config in todo} == {"rows", "weights", "tiles"}
    assert todo[1].METHOD == todo[0].METHOD


def test_rounding_is_no_mismatch_and_a_wrong_edit_is() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        h, edit = torch.randn(64, 512), 0.05 * torch.randn(64, 512)
        exact = (h + edit).to(dtype)
        assert mismatch({"y": exact}, {"y": exact.clone()}) is None
        noise = 1e-6 * torch.randn(64, 512)
        assert mismatch({"y": exact}, {"y": (h + edit + noise).to(dtype)}) is None
        for wrong in (h, h + 1.5 * edit, h.index_fill(0, torch.tensor([63]), 0) + edit):
            found = mismatch({"y": exact}, {"y": wrong.to(dtype)})
            assert found is not None
            assert re.match(r"y is off by \S+ beyond its rounding, its largest element is \S+$", found)
        poisoned = exact.clone()
        poisoned[3, 5] = float("nan")
        assert "y is off by nan" in str(mismatch({"y": exact}, {"y": poisoned}))
    assert mismatch({"s": torch.empty(0)}, {"s": torch.empty(0)}) is None


def test_a_rebuilt_element_may_be_rounded_to_its_neighbour() -> None:
    h, gs = torch.randn(1, 512).bfloat16(), torch.randn(4, 1)
    neighbour = torch.where(torch.arange(512) == h.abs().argmax(), h * (1 + 2**-8), h).float()
    for name in ("dW", "dh"):
        expected, got = {name: gs @ h.float()}, {name: gs @ neighbour}
        assert mismatch(expected, got) is not None
        assert (mismatch(expected, got, torch.bfloat16) is None) == (name == "dW")
    assert mismatch({"dW": gs @ h.float()}, {"dW": 1.02 * gs @ h.float()}, torch.bfloat16) is not None


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("linear", [True, False])
def test_the_bench_runs_the_edit_of_its_key(linear: bool, variant: Variant) -> None:
    pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    for op in config_tables.CONFIGS:
        key = Key(op, "float32", "float32", linear, 24, 3, 9)
        before = draw(key._replace(op="edit_forward"), CPU, 0, variant).problem.h
        problem, rebuild, grad, _, _ = draw(key, CPU, 0, variant)
        assert rebuild == variant.rebuild
        assert (problem.scale is not None) == variant.scale
        settings = {"positions": problem.positions, "activation": problem.activation, "scale": problem.scale}
        leaves = [t.clone().requires_grad_() for t in (before, problem.R[0], problem.W[0], problem.b[0])]
        y = reference.edit(*leaves, **settings)
        found = DeviceBench(key, CPU).results(heuristic(key, CPU), variant)
        if grad is None:
            assert set(found) == {"y", "delta"} | (set() if linear else {"s"}) | (set() if rebuild else {"before"})
            torch.testing.assert_close(found["y"], y.detach())
            assert (y - before).abs().max() > 0.1
            if not rebuild:
                assert torch.equal(found["before"], before[0, problem.positions[0]])
        else:
            assert torch.equal(problem.h, before) != rebuild
            gradients = torch.autograd.grad(y, leaves, grad)
            for name, gradient in zip(("dh", "dR", "dW", "db"), gradients, strict=True):
                torch.testing.assert_close(found[name].reshape(gradient.shape), gradient, rtol=1e-4, atol=1e-5)


def test_operands_depend_on_the_seed_and_edits_in_place_stay_bounded() -> None:
    pytest.importorskip("triton")
    if os.environ["TRITON_INTERPRET"] != "1":
        pytest.skip("needs TRITON_INTERPRET=1")
    for op in config_tables.CONFIGS:
        key = Key(op, "bfloat16", "float32", True, 32, 2, 5)
        one, same, other = (draw(key, CPU, seed, default_variant(key)) for seed in (1, 1, 2))
        assert torch.equal(one.problem.h, same.problem.h)
        assert not torch.equal(one.problem.h, other.problem.h)
        for _ in range(30):
            found = run(key, one)
        assert found["y" if "y" in found else "dh"].abs().max() < 100


def test_memory_that_was_not_written_shows() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with _poisoned():
        assert torch.empty(5).isnan().all()
        assert torch.ones(5, dtype=torch.bfloat16).new_empty(5).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == before


def test_info_names_the_table_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA L4"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda index: SimpleNamespace(name=names[index], major=9, minor=0, total_memory=2**30),
    )  # fmt: skip
    monkeypatch.setenv("REFT_KERNELS_CONFIG_DIR", str(tmp_path))
    path = tmp_path / "nvidia_h100_pcie.json"
    path.write_text(format_table(HEADER, {forward(32): Entry(heuristic(forward(32), CPU), 5.0)}))
    (tmp_path / "nvidia_l4.json").write_text("{")
    launch_configs.reload()
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"configs       cuda:0: {path}, 1 entries of 1.0, Triton 1.0\n" in said
    assert "configs       cuda:1: heuristic (no table for this device)\n" in said
    assert f"configs       cuda:2: {tmp_path / 'nvidia_l4.json'}: expected JSON" in said
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["launch_configs"]
    assert list(found) == ["cuda:0", "cuda:1", "cuda:2"]
    launch_configs.reload()


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ("--d", "512", "--r", "4", "--n", "32", "2048", "--activation", "linear", "other")
    assert main(["tune", *shapes, "--seconds", "180", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    entries = read_table(path).entries
    assert len(entries) == 8
    assert all(0.5 < entry.us < 1000 for entry in entries.values())
    assert "8 entries written" in capsys.readouterr().out

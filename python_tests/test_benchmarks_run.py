"""The microbenchmark: its formula of bytes, its store, its gate against wrong results, and a quick run as a whole."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import run
from benchmarks.ops import ceilings, check, counting, operands, peers, plots, programs, store, table, timing, workloads
from benchmarks.ops.peers import Chain, Ours, Peer, Plain, Prepared
from benchmarks.ops.workloads import MODES, Workload, minimum_bytes

CPU = torch.device("cpu")
SMALL = Workload("indexed", 3, 16, 4, 32, 2, h="float32", core=True)


class Wrong(Plain):
    """y is right and dW is not."""

    name = "wrong"

    def prepare(self, workload: Workload, operands: operands.Operands) -> Prepared:
        right = super().prepare(workload, operands)
        right.wanted["W"].register_hook(lambda grad: grad * 1.01)
        return right


class Elsewhere(Plain):
    """Writes a row that is not named."""

    name = "elsewhere"

    def prepare(self, workload: Workload, operands: operands.Operands) -> Prepared:
        right = super().prepare(workload, operands)
        free = next(i for i in range(workload.B * workload.S) if i not in operands.rows.tolist())
        mask = torch.zeros(workload.B, workload.S, 1)
        mask.view(-1)[free] = 1e-3
        return Prepared(lambda h: right.apply(h) + mask, right.wanted)


class Absent(Peer):
    name, about = "absent", "never there"

    def absent(self, device: torch.device) -> str:
        return "it was sold"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def row(**changes: Any) -> dict[str, Any]:
    key = {"op": "edit", "workload": "w", "peer": "p", "mode": "forward", "heat": "cold"}
    return {**key, "status": "ok", **changes}


# The fewest bytes.


def test_bytes_by_hand():
    # N = 6 rows of d = 8, r = 2. Forward: 6*8*2 read, as much written, R and W 2*2*8*4, u 6*2*4.
    w = Workload("indexed", 2, 10, 3, 8, 2)
    assert minimum_bytes(w, "forward") == 96 + 96 + 128 + 48
    # g and h read, dh written; R and W read; dR and dW written; u read, R g written.
    assert minimum_bytes(w, "backward") == 3 * 96 + 128 + 128 + 2 * 48
    assert minimum_bytes(w, "both") == minimum_bytes(w, "forward") + minimum_bytes(w, "backward")


def test_bytes_of_what_is_not_the_usual_choice():
    w = Workload("indexed", 2, 10, 3, 8, 2, G=3, h="float32", params="bfloat16", activation="gelu", inplace=False)
    # The forward copies 14 rows that are not named; Wh + b is kept beside u.
    assert minimum_bytes(w, "forward") == 2 * 192 + 2 * 3 * 2 * 8 * 2 + 48 + 48 + 2 * 14 * 8 * 4
    assert minimum_bytes(w, "backward") == 3 * 192 + 4 * 3 * 2 * 8 * 2 + 96 + 48
    every_token = Workload("all", 2, 10, 0, 8, 2, inplace=False)
    assert minimum_bytes(every_token, "forward") == 2 * 20 * 8 * 2 + 128 + 160


@pytest.mark.parametrize(
    ("N", "d", "r", "forward", "backward"),
    [(448, 4096, 4, 7.48, 11.29), (4096, 4096, 8, 67.50, 101.45), (65536, 4096, 64, 1092.62, 1648.36)],
)
def test_bytes_of_known_shapes_in_megabytes(N: int, d: int, r: int, forward: float, backward: float):
    w = Workload("all", 1, N, 0, d, r)
    assert minimum_bytes(w, "forward") / 1e6 == pytest.approx(forward, abs=0.006)
    assert minimum_bytes(w, "backward") / 1e6 == pytest.approx(backward, abs=0.006)


def test_bytes_of_an_unknown_mode():
    with pytest.raises(ValueError, match="forward, backward, both"):
        minimum_bytes(SMALL, "sideways")


# The registry.


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_workloads_have_names_of_their_own_and_fit(device: str, quick: bool):
    found = workloads.workloads(device, quick)
    assert len({w.name for w in found}) == len(found)
    assert found[0].core
    for w in found:
        assert w.P <= w.S
        assert len({p.name for p in peers.peers()}) == len(peers.peers())
    if device == "cuda" and not quick:
        shapes = {(w.N, w.d, w.r) for w in found if w.family == "indexed"}
        assert shapes >= {(N, d, r) for N in (1, 32, 448, 4096) for d in (2048, 4096, 8192) for r in (1, 4, 8, 32, 64)}
        assert {(65536, 4096, r) for r in (4, 8, 64)} <= {
            (w.N, w.d, w.r) for w in found if w.family == "all" and w.core
        }


def test_sets_share_no_row_and_enough_of_them_leave_the_cache():
    sets = operands.make_sets(SMALL, 6, CPU)
    for buffer in {id(one.h): one.h for one in sets}.values():
        rows = torch.cat([one.rows for one in sets if one.h is buffer])
        assert len(rows) == len(rows.unique())
    for one in sets:
        torch.testing.assert_close(one.R @ one.R.T, torch.eye(SMALL.r))
    assert workloads.touched_bytes(SMALL) == 12 * 32 * 4 + 2 * 2 * 32 * 4
    assert (workloads.sets_needed(SMALL, 1 << 20) - 1) * workloads.touched_bytes(SMALL) >= 2 << 20
    # One that copies h goes through all of it, and needs fewer.
    assert Plain().cold_sets(SMALL, 1 << 20) < Ours("eager").cold_sets(SMALL, 1 << 20)


def test_every_backend_of_the_package_is_a_peer():
    import reft_kernels as rk

    assert [p.name for p in peers.peers()][: len(rk.available_backends())] == list(rk.available_backends())


# Checks.


@pytest.mark.parametrize("changes", [{}, {"P": 0}, {"activation": "gelu"}, {"inplace": False}, {"h": "bfloat16"}])
@pytest.mark.parametrize("peer", [Ours("eager"), Chain(), Plain(), peers.Oracle()], ids=lambda p: p.name)
def test_right_peers_pass(peer: Peer, changes: dict[str, Any]):
    workload = replace(SMALL, **changes)
    one = operands.make_sets(workload, 1, CPU)[0]
    check.check(peer, workload, one, check.expected(workload, one))


@pytest.mark.parametrize(
    ("peer", "message"), [(Wrong(), "dW: largest error"), (Elsewhere(), "rows that are not named")]
)
def test_wrong_peers_are_found_out(peer: Peer, message: str):
    one = operands.make_sets(SMALL, 1, CPU)[0]
    with pytest.raises(AssertionError, match=message):
        check.check(peer, SMALL, one, check.expected(SMALL, one))


def test_an_owned_gradient_reaches_the_edit():
    one = operands.make_sets(SMALL, 1, CPU)[0]
    step = programs.Step(Ours("eager").prepare(SMALL, one), one.h, one.grad)
    step()
    assert step.dh is not None
    assert step.dh.data_ptr() == one.grad.data_ptr()


def test_aten_calls_leave_views_out():
    x = torch.ones(2, 3)
    assert counting.aten_calls(lambda: (x.view(6) + 1).mul_(2)) == 2


# Timing.


def test_percentiles():
    assert timing.percentile([3.0, 1.0, 2.0], 0.5) == 2
    assert timing.percentile([0.0, 10.0], 0.2) == pytest.approx(2)
    assert timing.percentile([7.0], 0.8) == 7
    with pytest.raises(ValueError, match="at least one"):
        timing.percentile([], 0.5)
    found = timing.summary(list(map(float, range(11))), "perf_counter")
    assert (found.p20, found.p50, found.p80, found.samples) == (2, 5, 8, 11)


def test_programs_take_turns_and_go_through_all_calls():
    seen: list[str] = []

    def call(name: str) -> programs.Call:
        return lambda: seen.append(name) or torch.ones(400, 400) @ torch.ones(400, 400)

    effort = timing.Effort(seconds=60.0, least=4, most=4)
    found = timing.time_cpu({"a": [call("a1"), call("a2")], "b": [call("b")]}, effort)
    assert set(found) == {"a", "b"}
    assert {"a1", "a2", "b"} <= set(seen)
    assert abs(seen.count("a1") - seen.count("a2")) <= 1
    for one in found.values():
        assert 0 < one.p20 <= one.p50 <= one.p80
        assert one.samples == 4


class PretendGPU:
    """Stands for torch.cuda: a clock that calls move on by their own microseconds, and graphs that hold calls."""

    def __init__(self, monkeypatch: Any, refuses_capture: bool = False) -> None:
        self.now, self.replay_costs, self.captured = 0.0, 5.0, []
        gpu = self
        self.recording: list[float] | None = None

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) / 1e3

        class Graph:
            def capture_begin(self) -> None:
                gpu.recording = []

            def capture_end(self) -> None:
                self.work, gpu.recording = gpu.recording, None
                if refuses_capture:
                    raise RuntimeError("operation not permitted when stream is capturing")
                gpu.captured.append(len(self.work))

            def replay(self) -> None:
                gpu.now += gpu.replay_costs + sum(self.work)

            def reset(self) -> None:
                self.work = []

        for name, value in {"Event": Event, "CUDAGraph": Graph, "synchronize": lambda: None}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, microseconds: float) -> programs.Call:
        """A call that keeps the GPU busy for so long; outside a graph the host adds 30."""

        def run_it() -> None:
            if self.recording is None:
                self.now += microseconds + 30
            else:
                self.recording.append(microseconds)

        return run_it


def test_a_graph_holds_a_millisecond_of_calls(monkeypatch: Any):
    gpu = PretendGPU(monkeypatch)
    found = timing.time_cuda([gpu.call(3.0), gpu.call(5.0)], timing.Effort(least=5, most=5))
    assert found.method == "graph"
    per_replay = gpu.captured[-1]
    assert 2 * 70 < per_replay <= 500  # 2 * ceil(1000 / 13)
    assert found.note == f"{per_replay} calls a replay"
    assert found.p50 == pytest.approx(4 + 5 / per_replay)
    assert found.p50 < 4.05


def test_a_long_call_is_captured_once(monkeypatch: Any):
    gpu = PretendGPU(monkeypatch)
    found = timing.time_cuda([gpu.call(4000.0)], timing.Effort(least=5, most=5))
    assert gpu.captured == [1]
    assert found.p50 == pytest.approx(4005)


@pytest.mark.parametrize("reason", ["", "it reads the clock"])
def test_what_no_graph_holds_is_timed_by_events(monkeypatch: Any, reason: str):
    gpu = PretendGPU(monkeypatch, refuses_capture=True)
    found = timing.time_cuda([gpu.call(3.0), gpu.call(5.0)], timing.Effort(least=5, most=5), reason)
    assert found.method == "events"
    assert found.p50 == pytest.approx(34)
    assert found.note == "no graph: " + (reason or "operation not permitted when stream is capturing")
    assert gpu.recording is None


def test_cpu_time_counts_no_waiting():
    effort = timing.Effort(seconds=0.0, least=2, most=2, cpu_time=True)
    found = timing.time_cpu({"sleeps": [lambda: time.sleep(0.02)]}, effort)["sleeps"]
    assert found.method == "thread_time"
    assert found.p80 < 2000
    assert timing.time_cpu({"": [lambda: time.sleep(0.002)]}, replace(effort, cpu_time=False))[""].p20 >= 2000


def test_slow_programs_are_sampled_less():
    effort = timing.Effort(seconds=0.1, least=7, most=60)
    assert not timing._enough(6, 0.4, effort)
    assert timing._enough(3, 0.5, effort)
    assert not timing._enough(2, 50.0, effort)
    assert not timing._enough(7, 0.05, effort)
    assert timing._enough(7, 0.1, effort)
    assert timing._enough(60, 0.01, effort)


# The store.


def test_upsert_replaces_the_same_key_and_keeps_the_others(tmp_path: Path):
    path = tmp_path / "ops.csv"
    store.upsert(path, [row(p50_us="1"), row(peer="q", p50_us="2")])
    store.upsert(path, [row(p50_us="3"), row(heat="hot", p50_us="4")])
    found = {(r["peer"], r["heat"]): r["p50_us"] for r in rows_of(path)}
    assert found == {("p", "cold"): "3", ("q", "cold"): "2", ("p", "hot"): "4"}
    assert [r["peer"] for r in rows_of(path)] == ["p", "q", "p"]


def test_upsert_refuses_what_it_does_not_know(tmp_path: Path):
    path = tmp_path / "ops.csv"
    with pytest.raises(ValueError, match="p90_us"):
        store.upsert(path, [row(p90_us="1")])
    with pytest.raises(ValueError, match="incomplete key"):
        store.upsert(path, [row(mode="")])
    assert not path.exists()
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected the columns"):
        store.upsert(path, [row()])
    assert path.read_text() == "a,b\n1,2\n"


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "ops.csv"
    store.upsert(path, [row(p50_us="1")])
    before = path.read_bytes()

    def breaks(partial: Path) -> None:
        partial.write_text("half a ro")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="full"):
        store.replace_file(path, breaks)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["ops.csv"]


# The command line.


def quick(folder: Path, *arguments: str, registry: list[Peer] | None = None) -> int:
    return run.main(["--quick", "--device", "cpu", "--out", str(folder), *arguments], registry)


def test_a_wrong_peer_fails_the_run_and_is_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    registry = [Chain(), Wrong(), Absent()]
    assert quick(tmp_path, "--only", "timings", "--filter", "^all", registry=registry) == 1
    printed = capsys.readouterr().out
    assert "FAILED: all-N256-d256-r8-fp32 wrong: dW: largest error" in printed
    assert "absent: absent: it was sold" in printed
    assert "2 pairs checked against the oracle, 1 failed" in printed
    rows = rows_of(next(tmp_path.glob("ops_cpu*.csv")))
    assert {r["status"] for r in rows if r["peer"] == "wrong"} == {"failed"}
    assert all(r["p50_us"] == "" and "dW" in r["note"] for r in rows if r["peer"] == "wrong")
    assert all(float(r["p50_us"]) > 0 for r in rows if r["peer"] == "addmm chain")


def test_right_results_replace_a_failure_in_the_store(tmp_path: Path):
    for peer, status in ((Wrong(), "failed"), (Plain(), "ok")):
        peer.name = "torch"
        quick(tmp_path, "--only", "timings", "--filter", "^all.* forward cold", registry=[peer])
        rows = rows_of(next(tmp_path.glob("ops_cpu*.csv")))
        assert [(r["peer"], r["status"]) for r in rows] == [("torch", status)]


def test_a_quick_run_as_a_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    registry = [Ours("triton"), Ours("eager"), Chain(), peers.LeftOut(peers.Compiled())]
    assert quick(tmp_path, "--filter", "G2|N32|^all", registry=registry) == 0
    captured = capsys.readouterr()
    assert "absent: triton: " in captured.out
    assert "absent: torch.compile: left out by --quick" in captured.out
    assert "left out: addmm chain: one weight set only" in captured.out
    assert "indexed-N32-d256-r4-fp32" in captured.out
    assert "[3/3]" in captured.err
    rows = rows_of(next(tmp_path.glob("ops_cpu*.csv")))
    assert {r["mode"] for r in rows} == set(MODES)
    assert {r["heat"] for r in rows if r["workload"].startswith("indexed-N32")} == {"cold", "hot"}
    measured = json.loads(next(tmp_path.glob("ceilings_cpu*.json")).read_text())
    copy = measured["ceilings"]["copy"]["value"]
    for r in rows:
        assert r["status"] == "ok"
        assert r["method"] == "perf_counter"
        assert float(r["p20_us"]) <= float(r["p50_us"]) <= float(r["p80_us"])
        rate = int(r["bytes_min"]) / float(r["p50_us"]) / 1e3
        assert float(r["gb_per_s"]) == pytest.approx(rate, abs=0.06)
        assert float(r["share_of_copy"]) == pytest.approx(rate / copy, rel=0.02, abs=1e-3)
        assert int(r["aten_calls"]) > 0
        assert r["commit"]
        assert r["date"]
        assert r["torch"] == torch.__version__
        if r["peer"] == "eager" and r["workload"].startswith("indexed-N32"):
            assert r["grad_inplace"] == ("" if r["mode"] == "forward" else "yes")
    pictures = sorted(p.name.rsplit("_", 1)[1] for p in tmp_path.glob("*.png"))
    assert pictures == ["bytes.png", "share.png"]  # one N alone makes no picture against N
    assert not list(tmp_path.glob(".*"))


def test_plots_come_from_the_csv_alone(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    path = tmp_path / "ops_somewhere.csv"
    facts = {"device": "some GPU", "torch": "2", "commit": "abc", "date": "2026-01-01 00:00", "status": "ok"}
    rows = []
    for N in (32, 448):
        w = Workload("indexed", N, 16, 1, 64, 4)
        for mode in MODES:
            shape = {"N": N, "d": 64, "r": 4, "G": 1, "h_dtype": "bfloat16", "param_dtype": "float32"}
            numbers = {
                "p50_us": N / 10,
                "bytes_min": minimum_bytes(w, mode),
                "copy_gb_per_s": 3000,
                "share_of_copy": 0.5,
            }
            rows.append(
                row(workload=w.name, mode=mode, peer="triton", activation="linear", **shape, **numbers, **facts)
            )
    store.upsert(path, rows)
    assert [p.name for p in plots.draw(path)] == [f"ops_somewhere_{name}.png" for name in ("rows", "share", "bytes")]
    assert all(p.stat().st_size > 5000 for p in tmp_path.glob("*.png"))


def test_plots_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra bench)")
    assert plots.draw(tmp_path / "none.csv") == []
    assert "no timings" in capsys.readouterr().out
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert plots.draw(tmp_path / "none.csv") == []
    assert "matplotlib is not installed" in capsys.readouterr().out


def test_the_table_without_rich(capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    rows = [
        row(p50_us="12.345", share_of_copy="0.5"),
        row(peer="q", status="failed"),
        row(mode="both", p50_us="1234.5"),
    ]
    table.show([{k: str(v) for k, v in r.items()} for r in rows], ["q", "p"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["workload", "mode", "heat", "q", "p"]
    assert lines[1] == ["w", "forward", "cold", "FAILED", "12.3", "(50%)"]
    assert lines[2] == ["w", "both", "cold", "-", "1,234"]


def test_the_filter_and_the_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert quick(tmp_path, "--only", "checks", "--filter", "^all.*addmm", registry=[Chain(), Plain()]) == 0
    assert "1 pairs checked" in capsys.readouterr().out
    assert quick(tmp_path, "--only", "checks", "--filter", "nothing of the kind") == 1
    assert "nothing was run" in capsys.readouterr().out
    assert quick(tmp_path, "--filter", "(") == 2
    assert quick(tmp_path, "--cpu-time") == 2
    assert not list(tmp_path.iterdir())


def test_a_budget_names_what_it_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quick(tmp_path, "--only", "checks", "--budget", "1e-9", registry=[Chain()])
    assert "--budget is used up" in capsys.readouterr().out


def test_a_list_of_workloads_and_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert quick(tmp_path, "--list", registry=[Chain(), Absent()]) == 0
    printed = capsys.readouterr().out
    assert "absent: it was sold" in printed
    assert "indexed-N12-d256-r4-fp32" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(capsys: pytest.CaptureFixture[str]):
    assert run.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_ceilings_of_the_cpu(tmp_path: Path):
    found = ceilings.measure(tmp_path, CPU, timing.Effort(seconds=0.0, least=2, most=2), quick=True)
    assert set(found) == {"copy", "empty_call", "harness"}
    assert all(one["value"] > 0 for one in found.values())
    assert ceilings.copy_bandwidth(ceilings.read(tmp_path, CPU)) == found["copy"]["value"]


def test_a_ceiling_that_fails_is_stored_with_its_error(tmp_path: Path, monkeypatch: Any):
    def breaks() -> dict[str, Any]:
        raise RuntimeError("no such barrier")

    monkeypatch.setattr(ceilings, "_cpu_parts", lambda effort, quick: {"copy": breaks})
    found = ceilings.measure(tmp_path, CPU, timing.Effort(), quick=True)
    assert found["copy"] == {"value": None, "error": "RuntimeError: no such barrier"}
    assert ceilings.copy_bandwidth(ceilings.read(tmp_path, CPU)) is None


def test_a_step_without_an_edit_is_the_harness_alone():
    step = programs.bare_step("cpu")
    before: Tensor = step.h.clone()
    assert step() == ()
    assert torch.equal(step.h, before)

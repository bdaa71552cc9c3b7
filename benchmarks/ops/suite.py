"""Checks and times the workloads, one after the other, and stores every row as soon as there is one."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import ceilings, counting, machine, store
from benchmarks.ops.check import Expected, check, expected
from benchmarks.ops.operands import Operands, make_sets
from benchmarks.ops.peers import Peer
from benchmarks.ops.programs import Call, Step, bare_step, calls
from benchmarks.ops.timing import Effort, Timing, host_microseconds, time_cpu, time_cuda
from benchmarks.ops.workloads import MODES, Workload, minimum_bytes

MOST_SETS = {"cuda": 1024, "cpu": 512}
# A graph of more operations than this takes long to capture and to instantiate.
MOST_OPERATIONS = 40_000


@dataclass
class Outcome:
    """What a run found, for its table and its exit status."""

    rows: list[store.Row] = field(default_factory=list)
    checked: int = 0
    failures: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    refused: dict[str, list[str]] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """What to run. ``pattern`` is searched in "workload peer mode heat"; ``budget`` in seconds, 0 for none."""

    device: torch.device
    folder: Path
    workloads: Sequence[Workload]
    peers: Sequence[Peer]
    effort: Effort
    timings: bool
    pattern: re.Pattern[str]
    budget: float = 0.0
    every_peer: bool = False

    @property
    def csv(self) -> Path:
        """Where the rows go."""
        return self.folder / f"ops_{machine.slug(self.device)}.csv"

    def wants(self, workload: Workload, peer: Peer, mode: str = "", heat: str = "") -> bool:
        """Whether the pattern asks for this; with part of the name, whether it asks for any of its rows."""
        modes, heats = ([mode] if mode else MODES), ([heat] if heat else HEATS)
        return any(self.pattern.search(f"{workload.name} {peer.name} {m} {t}") for m in modes for t in heats)


HEATS = ("cold", "hot")


def run(plan: Plan) -> Outcome:
    """Runs a plan. A pair of workload and peer that computes something else is stored as failed, and not timed."""
    outcome = Outcome()
    present = []
    for peer in plan.peers:
        reason = peer.absent(plan.device)
        if reason is None:
            present.append(peer)
        else:
            outcome.absent[peer.name] = reason
    limits = ceilings.copy_bandwidth(ceilings.read(plan.folder, plan.device))
    todo = _steps(plan, present)
    start = time.monotonic()
    with timing_stream(plan.device):
        for index, (workload, chosen) in enumerate(todo):
            spent = time.monotonic() - start
            if plan.budget and spent > plan.budget:
                outcome.not_run = [f"{w.name} ({', '.join(p.name for p in some)})" for w, some in todo[index:]]
                break
            _say(f"[{index + 1}/{len(todo)}] {workload.name} ({spent:.0f} s)")
            _run_workload(plan, workload, chosen, limits, outcome)
            gc.collect()
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
    return outcome


def _steps(plan: Plan, present: Sequence[Peer]) -> list[tuple[Workload, list[Peer]]]:
    """Workloads and their peers in the order of their worth, for a run that may end early.

    On a GPU the peers that are for the core workloads alone, slow or slow to compile, come after the others; on the
    CPU all peers of a workload take turns.
    """
    core = [w for w in plan.workloads if w.core]
    rest = [w for w in plan.workloads if not w.core]
    common = [p for p in present if not p.core_only]
    special = [p for p in present if p.core_only]
    groups = [(core, common), (core, special)] if plan.device.type == "cuda" else [(core, list(present))]
    groups.append((rest, list(present) if plan.every_peer else common))
    steps = [(w, [p for p in some if plan.wants(w, p)]) for several, some in groups for w in several]
    return [(w, some) for w, some in steps if some]


@contextlib.contextmanager
def timing_stream(device: torch.device) -> Iterator[None]:
    """On a GPU a stream of its own, since the default one cannot be captured; forward and backward stay on it."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


def _run_workload(plan: Plan, workload: Workload, peers: Sequence[Peer], limit: float | None, outcome: Outcome) -> None:
    cache = machine.cache_bytes(plan.device)
    needed = max(peer.cold_sets(workload, cache) for peer in peers) if plan.timings else 1
    sets = make_sets(workload, min(needed, MOST_SETS[plan.device.type]), plan.device)
    wanted = expected(workload, sets[0])
    able = []
    for peer in peers:
        reason = peer.refuses(workload, sets[0])
        if reason is not None:
            outcome.refused.setdefault(f"{peer.name}: {reason}", []).append(workload.name)
            continue
        problem = _checked(peer, workload, sets[0], wanted)
        outcome.checked += 1
        if problem is None:
            able.append(peer)
            continue
        status, note = problem
        _say(f"  {peer.name}: {status.upper()}: {note}")
        if status == "failed":
            outcome.failures.append(f"{workload.name} {peer.name}: {note}")
        rows = [
            _row(plan, workload, peer, mode, heat, status=status, note=note)
            for mode in MODES
            for heat in HEATS
            if plan.wants(workload, peer, mode, heat)
        ]
        _keep(plan, outcome, rows)
    del wanted
    if not plan.timings:
        return
    for mode in MODES:
        for heat, chosen in _heats(workload, sets, cache):
            timed = [peer for peer in able if plan.wants(workload, peer, mode, heat)]
            if timed:
                rows = _time(plan, workload, timed, mode, heat, chosen, limit, outcome)
                _keep(plan, outcome, rows)


def _heats(workload: Workload, sets: list[Operands], cache: int) -> list[tuple[str, list[Operands]]]:
    """The rotation; for core workloads also the first set alone, unless that is larger than the cache anyway."""
    rows = 2 * workload.N * workload.d * sets[0].h.element_size()
    return [("cold", sets), ("hot", sets[:1])] if workload.core and rows < 2 * cache else [("cold", sets)]


def _checked(peer: Peer, workload: Workload, operands: Operands, wanted: Expected) -> tuple[str, str] | None:
    """None if the peer is right, else a status and what is wrong."""
    try:
        check(peer, workload, operands, wanted)
    except Exception as error:  # a peer that raises must neither end the run nor pass
        return _what_happened(error)
    return None


def _what_happened(error: Exception) -> tuple[str, str]:
    """A row's status and note: a device that is too small is nobody's fault."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, torch.OutOfMemoryError):
        gc.collect()
        torch.cuda.empty_cache()
        return "no memory", lines[0]
    if isinstance(error, AssertionError):
        return "failed", lines[0]
    return "failed", f"{type(error).__name__}: {lines[0]}"


def _time(
    plan: Plan, workload: Workload, peers: Sequence[Peer], mode: str, heat: str, sets: list[Operands],
    limit: float | None, outcome: Outcome,
) -> list[store.Row]:  # fmt: skip
    """One row a peer. On the CPU peers take turns; on a GPU they follow each other, each at steady clocks."""
    facts: dict[str, dict[str, Any]] = {}
    programs: dict[str, list[Call]] = {}
    timings: dict[str, Timing] = {}
    for peer in peers:
        try:
            facts[peer.name] = _facts(plan.device, calls(peer, workload, sets[:1], mode)[0], mode, workload.core)
            needed = peer.cold_sets(workload, machine.cache_bytes(plan.device))
            used = sets[: max(1, min(needed, MOST_OPERATIONS // max(facts[peer.name]["aten_calls"], 1)))]
            facts[peer.name] |= {"sets": len(used), "needed": needed}
            program = calls(peer, workload, used, mode)
            if plan.device.type == "cpu":
                programs[peer.name] = program
            else:
                timings[peer.name] = time_cuda(program, plan.effort, peer.no_graph)
                facts[peer.name]["host_us"] = f"{host_microseconds(program):.1f}"
        except Exception as error:  # the others' rows are worth having; this one's says what happened
            facts[peer.name] = {"error": error}
        program = []
    if programs:
        timings = time_cpu(programs, plan.effort)
    clocks = machine.clocks(plan.device)
    rows = []
    for peer in peers:
        fact, timing = facts[peer.name], timings.get(peer.name)
        if "error" in fact:
            status, note = _what_happened(fact["error"])
            _say(f"  {mode:<8} {heat:<4} {peer.name:<16} {status.upper()}: {note}")
            if status == "failed":
                outcome.failures.append(f"{workload.name} {peer.name} {mode}, in timing: {note}")
            rows.append(_row(plan, workload, peer, mode, heat, status=status, note=note))
            continue
        assert timing is not None
        notes = [timing.note] if timing.note else []
        needed = fact.pop("needed")
        if heat == "cold" and fact["sets"] < needed:
            notes.append(f"rotates among {fact['sets']} of {needed} sets: partly cached")
        fact |= {"note": "; ".join(notes), "clocks_mhz": clocks}
        rows.append(_row(plan, workload, peer, mode, heat, timing=timing, limit=limit, **fact))
        _say(f"  {mode:<8} {heat:<4} {peer.name:<16} {timing.p50:10.2f} us  {timing.method}")
    return rows


def _facts(device: torch.device, call: Call, mode: str, in_full: bool) -> dict[str, Any]:
    """Counts for one call, which may be made again and again."""
    call()
    facts: dict[str, Any] = {"aten_calls": counting.aten_calls(call) - _harness_calls(mode)}
    step = call if isinstance(call, Step) else getattr(call, "__self__", None)
    if isinstance(step, Step) and step.dh is not None:
        facts["grad_inplace"] = "yes" if step.dh.data_ptr() == step.grad.data_ptr() else "no"
    if device.type == "cuda":
        facts["peak_mib"] = f"{counting.peak_mib(call):.2f}"
        if in_full:
            facts["launches"] = len(counting.kernel_names(call))
    return facts


@functools.cache
def _harness_calls(mode: str) -> int:
    """ATen calls of the nodes around a timed edit."""
    if mode == "forward":
        return 0
    step = bare_step("cpu")
    step()
    if mode == "both":
        return counting.aten_calls(step)
    step.forward()
    return counting.aten_calls(step.backward)


def _row(
    plan: Plan, workload: Workload, peer: Peer, mode: str, heat: str, *, timing: Timing | None = None,
    limit: float | None = None, status: str = "ok", **more: Any,
) -> store.Row:  # fmt: skip
    w = workload
    row: dict[str, Any] = {
        "op": "edit", "workload": w.name, "peer": peer.name, "mode": mode, "heat": heat, "status": status,
        "N": w.N, "B": w.B, "S": w.S, "d": w.d, "r": w.r, "G": w.G, "h_dtype": w.h, "param_dtype": w.params,
        "activation": w.activation, "inplace": "yes" if peer.inplace(w) else "no",
        "bytes_min": minimum_bytes(w, mode), **machine.environment(plan.device), **more,
    }  # fmt: skip
    if timing is not None:
        rate = minimum_bytes(w, mode) / timing.p50 / 1e3
        row |= {"p20_us": f"{timing.p20:.3f}", "p50_us": f"{timing.p50:.3f}", "p80_us": f"{timing.p80:.3f}"}
        row |= {"samples": timing.samples, "method": timing.method, "gb_per_s": f"{rate:.1f}"}
        if limit:
            row |= {"copy_gb_per_s": f"{limit:.1f}", "share_of_copy": f"{rate / limit:.4f}"}
    return {name: str(value) for name, value in row.items()}


def _keep(plan: Plan, outcome: Outcome, rows: list[store.Row]) -> None:
    outcome.rows += rows
    if plan.timings:
        store.upsert(plan.csv, rows)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""One LoReFT edit on a CPU: our backends, a hand-written chain, pyreft's module, and a copy of as many bytes.

    python -m benchmarks.cpu_edit [--threads 2] [--cpu-time] [--seconds 1.0] [--only REGEX]

All sides of a workload take turns in one process, forward, backward and both, each on rows that the last level of cache
does not hold (two to four sets that share no row). Every side is checked against the oracle first, as in
``benchmarks.run``, whose peers, checks and timers these are. "copy" is ``copy_`` of a buffer such that as many bytes
are read and written as the edit must at least (``workloads.minimum_bytes``): what memory alone would take. Times are
medians; ratios are those of medians of one run. pyreft takes part in the first four workloads. On a busy machine
``--threads 1 --cpu-time`` counts what the thread has computed, not what passed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import machine, store
from benchmarks.ops.check import check, expected
from benchmarks.ops.operands import make_sets
from benchmarks.ops.peers import Chain, Ours, Peer, Pyreft, Rewritten
from benchmarks.ops.programs import calls
from benchmarks.ops.timing import Effort, Timing, time_cpu
from benchmarks.ops.workloads import MODES, Workload, minimum_bytes

RESULTS = machine.ROOT / "benchmarks" / "results" / "cpu_edit.json"
OURS = "cpu"
SETS = 4

_BASE = Workload("indexed", 32, 128, 14, 4096, 8, h="float32", core=True)
WORKLOADS = (
    _BASE,
    Workload("indexed", 32, 128, 14, 576, 8, h="float32", core=True),
    Workload("indexed", 32, 128, 14, 768, 1, h="float32", core=True),
    Workload("indexed", 32, 128, 14, 4096, 8, h="bfloat16", core=True),
    Workload("indexed", 32, 128, 14, 4096, 64, h="float32"),
    Workload("indexed", 32, 128, 1, 4096, 8, h="float32"),
    Workload("indexed", 1, 128, 1, 4096, 8, h="float32"),
    Workload("all", 4, 128, 0, 576, 8, h="float32"),
    Workload("all", 4, 512, 0, 4096, 8, h="float32"),
    Workload("all", 4, 512, 0, 4096, 8, h="bfloat16"),
)


def sides() -> list[Peer]:
    """Who takes part, where installed."""
    return [Ours(OURS), Ours("eager"), Chain(), Rewritten(), Pyreft()]


def copy_of(moved: int) -> list[Callable[[], object]]:
    """Copies that read and write ``moved`` bytes in all, between several pairs of buffers."""
    elements = max(1, moved // 8)
    pairs = [(torch.randn(elements), torch.empty(elements)) for _ in range(SETS)]
    return [lambda source=source, target=target: target.copy_(source) for source, target in pairs]


def measure(workload: Workload, peers: list[Peer], effort: Effort) -> dict[str, Any]:
    """Median, 20th and 80th percentile in microseconds, of every side in every mode, and the ratios to ours."""
    sets = make_sets(workload, SETS, torch.device("cpu"))
    oracle = expected(workload, sets[0], seed=1)
    taking_part = []
    for peer in peers:
        if peer.refuses(workload, sets[0]) is not None or (peer.core_only and not workload.core):
            continue
        try:
            check(peer, workload, sets[0], oracle)
        except AssertionError as error:
            if peer.name == OURS:
                raise
            print(f"{workload.name}: {peer.name} is left out, as it is wrong: {error}", flush=True)
            continue
        taking_part.append(peer)
    found: dict[str, Any] = {"N": workload.N, "d": workload.d, "r": workload.r, "h": workload.h, "modes": {}}
    for mode in MODES:
        programs: dict[str, Any] = {"copy": copy_of(minimum_bytes(workload, mode))}
        for peer in taking_part:
            own = sets if not isinstance(peer, Rewritten) else sets[:2]  # each holds a matrix [d, d]
            programs[peer.name] = calls(peer, workload, own, mode)
        times = time_cpu(programs, effort)
        ours = times[OURS].p50
        found["modes"][mode] = {
            name: {**_rounded(timing), "times_ours": round(timing.p50 / ours, 3)} for name, timing in times.items()
        }
        shown = "  ".join(f"{name} {t.p50:,.0f} us ({t.p50 / ours:.2f})" for name, t in times.items())
        print(f"{workload.name:32} {mode:9} {shown}", flush=True)
    return found


def _rounded(timing: Timing) -> dict[str, float]:
    return {"p20_us": round(timing.p20, 1), "p50_us": round(timing.p50, 1), "p80_us": round(timing.p80, 1)}


def main() -> int:
    """Measures and writes benchmarks/results/cpu_edit.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_edit", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each side and mode (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="the thread's own time; with --threads 1")
    parser.add_argument("--only", default="", metavar="REGEX", help="searched in the workload's name")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time needs --threads 1")
    torch.set_num_threads(options.threads)
    effort = Effort(options.seconds, least=9, most=200, cpu_time=options.cpu_time)
    device = torch.device("cpu")
    absent = {peer.name: peer.absent(device) for peer in sides()}
    if absent[OURS] is not None:
        print(f"error: backend {OURS}: {absent[OURS]}", file=sys.stderr)
        return 2
    peers = [peer for peer in sides() if absent[peer.name] is None]
    chosen = [w for w in WORKLOADS if re.search(options.only, w.name)]
    results = {w.name: measure(w, peers, effort) for w in chosen}
    left_out = {name: reason for name, reason in absent.items() if reason is not None}
    store.write_json(options.out, {"environment": machine.environment(device), "absent": left_out, "edits": results})
    print(json.dumps(left_out))
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

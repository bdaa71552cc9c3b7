"""Checks and times the package's ops against their peers, measures what the machine can do at best, draws the results.

    python -m benchmarks.run --suite ops --device auto --out benchmarks/results
    python -m benchmarks.run --list
    python -m benchmarks.run --only checks --filter 'indexed.* triton'

Everything is written into one folder: ``ops_<device>.csv`` (rows replaced by key, each as soon as it is measured),
``ceilings_<device>.json`` and three pictures drawn from the CSV. Exit status 1 if a peer computes something else than
the oracle; such a pair is not timed. benchmarks/README.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ops import ceilings, machine, plots, store, suite, table
from benchmarks.ops.peers import LeftOut, Peer, peers
from benchmarks.ops.timing import Effort
from benchmarks.ops.workloads import MODES, workloads

PIECES = ("ceilings", "checks", "timings", "plots")
RESULTS = machine.ROOT / "benchmarks" / "results"


def main(argv: list[str] | None = None, registry: list[Peer] | None = None) -> int:
    """Runs what is asked for; 0, 1 if a peer is wrong or nothing was found to run, 2 for a wrong command line."""
    options = _parser().parse_args(argv)
    try:
        device = machine.choose_device(options.device)
        pattern = re.compile(options.filter)
    except (ValueError, re.error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    registry = peers() if registry is None else registry
    if options.quick:
        registry = [LeftOut(peer) if peer.slow_start else peer for peer in registry]
    found = workloads(device.type, options.quick)
    if options.list:
        _list(device, registry, found)
        return 0
    pieces = options.only or list(PIECES)
    if options.cpu_time and (device.type != "cpu" or options.threads != 1):
        print("error: --cpu-time needs --device cpu and --threads 1", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    effort = Effort(seconds=0.02, least=3, most=10) if options.quick else Effort()
    effort = replace(effort, cpu_time=options.cpu_time)
    plan = suite.Plan(
        device=device, folder=options.out, workloads=found, peers=registry, effort=effort,
        timings="timings" in pieces, pattern=pattern, budget=options.budget, every_peer=options.every_peer,
    )  # fmt: skip
    # Before any work, so that a file of another version is no surprise at its end.
    try:
        store.read(plan.csv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    status = 0
    if "ceilings" in pieces:
        with suite.timing_stream(device):
            ceilings.measure(options.out, device, effort, options.quick)
    outcome = None
    if "checks" in pieces or plan.timings:
        outcome = suite.run(plan)
        if outcome.failures or not outcome.checked:
            status = 1
    pictures = plots.draw(plan.csv) if "plots" in pieces else []
    if outcome is not None:
        _report(plan, outcome, [peer.name for peer in registry])
    for path in [*([plan.csv] if plan.csv.exists() and plan.timings else []), *pictures]:
        print(path)
    return status


def _report(plan: suite.Plan, outcome: suite.Outcome, order: list[str]) -> None:
    print("\n{device}, torch {torch}, commit {commit}".format(**machine.environment(plan.device)))
    table.show(outcome.rows, order)
    for name, reason in outcome.absent.items():
        print(f"absent: {name}: {reason}")
    for reason, names in outcome.refused.items():
        print(f"left out: {reason} ({len(names)} workloads: {', '.join(names[:3])}{', ...' * (len(names) > 3)})")
    if outcome.not_run:
        print(f"not run, --budget is used up: {len(outcome.not_run)} workloads, from {outcome.not_run[0]} on")
    for failure in outcome.failures:
        print(f"FAILED: {failure}")
    if not outcome.checked:
        print("nothing was run: no workload and peer fit --filter")
    else:
        print(f"{outcome.checked} pairs checked against the oracle, {len(outcome.failures)} failed")


def _list(device: torch.device, registry: list[Peer], found: list) -> None:
    print(f"device: {machine.device_name(device)}\n\npeers:")
    for peer in registry:
        reason = peer.absent(device)
        scope = "" if not peer.core_only else " [core workloads]"
        print(f"  {peer.name:<17}{peer.about}{scope}" + (f"\n{'':<19}absent: {reason}" if reason else ""))
    print(f"\nmodes: {', '.join(MODES)}\n\nworkloads ({len(found)}, core ones first):")
    for workload in found:
        w = workload
        print(f"  {w.name:<40} h [{w.B}, {w.S}, {w.d}], {w.N} rows{'  core' * w.core}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=["ops"], default="ops", help="which benchmark (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--only", nargs="+", choices=PIECES, help="these pieces instead of all; timings check first")
    parser.add_argument("--filter", default="", metavar="REGEX", help='searched in "workload peer mode heat"')
    parser.add_argument("--quick", action="store_true", help="a few small workloads, few samples: seconds in all")
    parser.add_argument("--budget", type=float, default=0.0, metavar="SECONDS", help="start no workload after this")
    parser.add_argument("--every-peer", action="store_true", help="all peers on all workloads, not the core ones only")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own)")
    parser.add_argument("--cpu-time", action="store_true", help="count the thread's own time: for a busy machine")
    parser.add_argument("--list", action="store_true", help="list workloads and peers, and run nothing")
    return parser


if __name__ == "__main__":
    sys.exit(main())

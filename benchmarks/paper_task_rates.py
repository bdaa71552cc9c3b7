"""Learning rates for GLUE in a small budget, chosen on held-out training rows of each task.

    python -m benchmarks.paper_task_rates --data FOLDER [--only NAME ...] [--methods NAME ...] [--rates X ...]

The recipes' rates are for 20 to 60 epochs; in the few hundred steps of benchmarks.paper_tasks little is learned with
them. Every method is run at every rate on the training rows that the set trains on, less the tenth that is held out,
for as many steps, and the rate with the best score there is taken (of equal ones that with the smaller loss). No row
of an evaluation file is read. `benchmarks.paper_task_sets.GLUE_RATES` holds what came out; the results that are kept
are of 200 steps for SST-2, and RTE was not tried. Finished runs are not run again, and what `--out` holds of other
tasks, or of other methods and rates on the same model and in as many steps, stays in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from benchmarks.ops import machine, store
from benchmarks.paper_task_sets import METHODS, TASK_SETS, settings_of
from benchmarks.paper_tasks import budget_of, environment, model_of, say, write_tiny_data
from benchmarks.smollm2 import cache_root
from reft_kernels.jobs.compare import cells, compare
from reft_kernels.jobs.run_folder import LOG_FILE
from reft_kernels.training.glue import glue_task

RESULTS = machine.ROOT / "benchmarks" / "results" / "paper_tasks_rates_cpu.json"
GLUE_SETS = tuple(name for name, one in TASK_SETS.items() if one.encoder)
RATES = {
    "loreft": (3e-3, 1e-2), "nodireft": (3e-3, 1e-2), "lora": (3e-4, 1e-3, 3e-3), "frozen": (1e-1, 3e-1),
}  # fmt: skip


def held_out_score(log: dict[str, Any], metric: str) -> dict[str, float]:
    """Score and loss of the best epoch on the held-out training rows."""
    epochs = [entry for entry in log["held_out"] if f"eval_{metric}" in entry]
    best = max(epochs, key=lambda entry: (entry[f"eval_{metric}"], -entry["eval_loss"]))
    return {metric: best[f"eval_{metric}"], "loss": best["eval_loss"]}


def choose(runs: dict[str, dict[str, dict[str, float]]], metric: str) -> dict[str, float]:
    """The rate of each method, from scores by method and rate."""
    return {
        method: float(max(scores, key=lambda rate: (scores[rate][metric], -scores[rate]["loss"])))
        for method, scores in runs.items()
    }


def run_rates(name: str, arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Runs what is not finished of a set, and enters it in the report."""
    one = TASK_SETS[name]
    budget = budget_of(one, arguments)
    train = arguments.data / one.train
    model, name_of_model = model_of(one, arguments)
    metric = glue_task(name).best_metric
    about = {
        "model": name_of_model,
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "rows": f"the first {budget.examples} training rows, a tenth of them held out",
        "steps": budget.steps,
        "metric": metric,
    }
    found = report["sets"].get(name, {})
    if any(found.get(key) != value for key, value in about.items()):
        found = {**about, "runs": {}}
    found |= {"commit": report["environment"]["commit"], "utc": report["environment"]["utc"]}
    report["sets"][name] = found
    options = ["--dtype", arguments.dtype, "--device", arguments.device, "--save-steps", "0", "--no-report",
               "--no-progress"]  # fmt: skip
    settings, changes = settings_of(name, train, [], arguments.methods, budget)
    for method in arguments.methods:
        for rate in arguments.rates or RATES[method]:
            folder = arguments.work / "rates" / name / f"{rate:g}"
            plan = cells(settings, [method], [arguments.seed], {method: {**changes[method], "lr": rate}}, folder)
            say(f"{name}, {method}, learning rate {rate:g}")
            compare(plan, model, options, folder, show=False, say=lambda line: say(f"  {line}"))
            log = json.loads((plan[0].folder / LOG_FILE).read_text(encoding="utf-8"))
            found["runs"].setdefault(method, {})[f"{rate:g}"] = held_out_score(log, metric)
            found["chosen"] = choose(found["runs"], metric)
            store.write_json(arguments.out, report)


def report_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """A report of this run, with the tasks of the one before it."""
    kept = {}
    if arguments.out.is_file():
        kept = json.loads(arguments.out.read_text(encoding="utf-8"))["sets"]
    return {"environment": environment(arguments), "sets": kept}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_task_rates", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("REFT_KERNELS_DATA"), metavar="FOLDER")
    add("--only", nargs="+", choices=GLUE_SETS, default=list(GLUE_SETS), metavar="NAME", help=", ".join(GLUE_SETS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add("--rates", type=float, nargs="+", metavar="X", help="instead of those that each method is tried at by default")
    add("--seed", type=int, default=42)
    add("--max-examples", type=int, metavar="N", help="default: each set's own")
    add("--max-steps", type=int, metavar="N", help="default: each set's own")
    add("--encoder", type=Path, metavar="FOLDER", help="MiniLM-L6 by default")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--threads", type=int, default=1)
    add("--work", type=Path, metavar="FOLDER", help="for the runs (default: paper_tasks in the cache of reft_kernels)")
    add("--tiny", action="store_true", help="a random model and made-up rows, to see that all of it works")
    add("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    arguments.work = (arguments.work or cache_root() / "paper_tasks").resolve()
    arguments.eval_rows = None
    if arguments.tiny:
        arguments.data = write_tiny_data(arguments.work / "tiny_data")
    if arguments.data is None:
        parser.error("--data: no folder is named, nor by the environment variable REFT_KERNELS_DATA")
    arguments.data = Path(arguments.data).resolve()
    for name in arguments.only:
        if not (arguments.data / TASK_SETS[name].train).is_file():
            parser.error(f"--data: expected a folder that holds {TASK_SETS[name].train}, got {arguments.data}")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    report = report_of(arguments)
    for name in arguments.only:
        run_rates(name, arguments, report)
    for name, found in report["sets"].items():
        for method, scores in found["runs"].items():
            metric = found["metric"]
            told = ", ".join(f"{rate}: {one[metric]:.3f} (loss {one['loss']:.3f})" for rate, one in scores.items())
            print(f"{name:<6}{method:<10}{told}; chosen {found['chosen'][method]:g}")
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Learning rates for GLUE in a small budget, chosen on held-out training rows of SST-2.

    python -m benchmarks.paper_task_rates --data FOLDER [--rates 1e-3 3e-3 1e-2] [--max-steps 200]

The recipes' rates are for 20 to 60 epochs; in the few hundred steps of benchmarks.paper_tasks nothing is learned with
them. Every method is run at every rate on the training rows that the set trains on, less the tenth that is held out,
and the rate with the best accuracy there is taken (of equal ones that with the smaller loss). No row of an evaluation
file is read. `benchmarks.paper_task_sets.GLUE_RATES` holds what came out.
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

RESULTS = machine.ROOT / "benchmarks" / "results" / "paper_tasks_rates_cpu.json"
NAME = "sst2"


def held_out_score(log: dict[str, Any]) -> dict[str, float]:
    """Accuracy and loss of the best epoch on the held-out training rows."""
    epochs = [entry for entry in log["held_out"] if "eval_accuracy" in entry]
    best = max(epochs, key=lambda entry: (entry["eval_accuracy"], -entry["eval_loss"]))
    return {"accuracy": best["eval_accuracy"], "loss": best["eval_loss"]}


def choose(runs: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """The rate of each method, from scores by method and rate."""
    return {
        method: float(max(scores, key=lambda rate: (scores[rate]["accuracy"], -scores[rate]["loss"])))
        for method, scores in runs.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper_task_rates", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=os.environ.get("REFT_KERNELS_DATA"), metavar="FOLDER")
    add("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help=", ".join(METHODS))
    add("--seed", type=int, default=42)
    add("--max-examples", type=int, metavar="N")
    add("--max-steps", type=int, default=200, metavar="N")
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
    if arguments.data is None or not (train := Path(arguments.data).resolve() / TASK_SETS[NAME].train).is_file():
        parser.error(f"--data: expected a folder that holds {TASK_SETS[NAME].train}, got {arguments.data}")
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    budget = budget_of(TASK_SETS[NAME], arguments)
    model, model_name = model_of(TASK_SETS[NAME], arguments)
    report: dict[str, Any] = {
        "environment": environment(arguments), "model": model_name, "seed": arguments.seed,
        "rows": f"{NAME}, the first {budget.examples} training rows; a tenth held out", "steps": budget.steps,
        "runs": {},
    }  # fmt: skip
    options = ["--dtype", arguments.dtype, "--device", arguments.device, "--save-steps", "0", "--no-report",
               "--no-progress"]  # fmt: skip
    for rate in arguments.rates:
        settings, changes = settings_of(NAME, train, [], arguments.methods, budget)
        changes = {method: {**values, "lr": rate} for method, values in changes.items()}
        folder = arguments.work / "rates" / f"{rate:g}"
        plan = cells(settings, arguments.methods, [arguments.seed], changes, folder)
        say(f"learning rate {rate:g}")
        compare(plan, model, options, folder, show=False, say=lambda line: say(f"  {line}"))
        for cell in plan:
            log = json.loads((cell.folder / LOG_FILE).read_text(encoding="utf-8"))
            report["runs"].setdefault(cell.method, {})[f"{rate:g}"] = held_out_score(log)
        report["chosen"] = choose(report["runs"])
        store.write_json(arguments.out, report)
    for method, scores in report["runs"].items():
        told = ", ".join(f"{rate}: {one['accuracy']:.3f} (loss {one['loss']:.3f})" for rate, one in scores.items())
        print(f"{method:<10}{told}; chosen {report['chosen'][method]:g}")
    print(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Several methods and seeds under one budget: each in a process of its own, and one table and one picture of all.

A process of its own makes peak memory that of one method, and a cell that fails leaves the others. What is finished is
not run again, so that a comparison that was stopped goes on.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from reft_kernels.jobs.errors import UserError, user_errors
from reft_kernels.jobs.run_folder import LOG_FILE, model_source, read_log, write_atomically
from reft_kernels.recipes.settings import JobSettings
from reft_kernels.training import markdown

TABLE_FILE, RESULTS_FILE = "comparison.md", "comparison.json"


@dataclass(frozen=True)
class Cell:
    """One run: a method, a seed, the settings, and the folder that it writes."""

    method: str
    seed: int
    settings: JobSettings
    folder: Path


def cells(
    settings: JobSettings, methods: Sequence[str], seeds: Sequence[int], changes: Mapping[str, Mapping[str, Any]],
    folder: Path,
) -> list[Cell]:  # fmt: skip
    """The runs of a comparison, seeds outermost, so that every method has a number early.

    Args:
        changes: settings of single methods, by method.

    Raises UserError naming the method and the setting.
    """
    for name, values in changes.items():
        if name not in methods:
            raise UserError(f"--set {name}:...: {name} is not among --methods ({', '.join(methods)})")
        for setting in ("method", "seed"):
            if setting in values:
                raise UserError(f"--set {name}:{setting}=...: --methods and --seeds say which runs there are")
    found = []
    for seed in dict.fromkeys(seeds):
        for method in dict.fromkeys(methods):
            with user_errors(f"--methods {method}"):
                changed = settings.changed({**changes.get(method, {}), "method": method, "seed": seed})
            found.append(Cell(method, seed, changed, folder / f"{method}-{seed}"))
    return found


def run_cell(cell: Cell, model: str, options: Sequence[str], *, show: bool) -> dict[str, Any]:
    """The log of a cell, which is run in a new process unless it has been run with the same settings and model.

    Args:
        options: further words of the command `train`: dtype, device, and what it writes.

    Raises UserError where the process fails, with its last line.
    """
    finished = _finished(cell, model, options)
    if finished is not None:
        return finished
    recipe = cell.folder.with_suffix(".recipe.json")
    entry = {"title": cell.method, "settings": cell.settings.as_dict()}
    write_atomically(recipe, json.dumps({"recipes": {cell.folder.name: entry}}, indent=1) + "\n")
    words = [sys.executable, "-m", "reft_kernels", "train", "--recipe", str(recipe), "--model", model]
    words += ["--output", str(cell.folder), *options]
    if cell.folder.exists():
        words.append("--overwrite")
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=None if show else subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        last = [line for line in (done.stderr or done.stdout or "").splitlines() if line.strip()][-1:] or ["no message"]
        raise UserError(f"{cell.method}, seed {cell.seed}: {last[0].strip()}")
    return read_log(cell.folder / LOG_FILE)


def _finished(cell: Cell, model: str, options: Sequence[str]) -> dict[str, Any] | None:
    path = cell.folder / LOG_FILE
    if not path.is_file():
        return None
    log = read_log(path)
    # A log of an earlier version has fewer settings: those that came since were at their defaults.
    own = {**cell.settings.as_dict(), "model": model_source(model)}
    ran = {**JobSettings().as_dict(), **log.get("settings", {})}
    own |= {name: options[options.index(f"--{name}") + 1] for name in ("dtype", "device") if f"--{name}" in options}
    same = all(ran.get(name) == value for name, value in own.items())
    return log if log.get("finished") and same else None


def compare(
    plan: Sequence[Cell], model: str, options: Sequence[str], folder: Path, *, show: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run every cell and write `comparison.json` and `comparison.md` after each.

    A cell that fails is noted in the table with its message; the others are run all the same. Raises UserError where
    every cell has failed.
    """
    logs: list[tuple[Cell, dict[str, Any] | None, str]] = []
    for number, cell in enumerate(plan, start=1):
        say(f"[{number}/{len(plan)}] {cell.method}, seed {cell.seed}")
        try:
            log, message = run_cell(cell, model, options, show=show), ""
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{number - 1} of {len(plan)} runs are done; the same command goes on") from None
        except UserError as error:
            log, message = None, str(error)
            say(f"  failed: {message}")
        logs.append((cell, log, message))
        if log is not None:
            say("  " + "; ".join(f"{name}: {_scores(found)}" for name, found in log["results"].items()))
        results = summary(logs)
        write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
        write_atomically(folder / TABLE_FILE, table(results))
    if all(log is None for _, log, _ in logs):
        raise UserError(f"every run failed; the first: {logs[0][2]}")
    return results


def summary(logs: Sequence[tuple[Cell, Mapping[str, Any] | None, str]]) -> dict[str, Any]:
    """What the table and the picture show, by method: scores by data set, parameters, time and memory."""
    methods: dict[str, Any] = {}
    for cell, log, message in logs:
        entry = methods.setdefault(cell.method, {"seeds": [], "failed": {}, "scores": {}, "ms_per_step": [],
                                                 "peak_memory_gib": [], "seconds": []})  # fmt: skip
        if log is None:
            entry["failed"][str(cell.seed)] = message
            continue
        entry["seeds"].append(cell.seed)
        entry["parameters"] = log["parameters"]["trained"] - log["parameters"]["head"]
        for name in ("ms_per_step", "peak_memory_gib", "seconds"):
            if log.get(name) is not None:
                entry[name].append(log[name])
        for data, found in log["results"].items():
            metric, value = main_metric(found)
            entry["scores"].setdefault(data, {"metric": metric, "values": []})["values"].append(value)
    first = next((log for _, log, _ in logs if log is not None), None)
    where = {} if first is None else {name: first[name] for name in ("device", "versions", "base_class")}
    return {"methods": methods, **where}


def main_metric(found: Mapping[str, Any]) -> tuple[str, float]:
    """The first metric of an evaluation, which is the one that counts."""
    name = next(iter(found))
    return name, float(found[name])


def table(results: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table."""
    methods = results["methods"]
    data = list(dict.fromkeys(name for entry in methods.values() for name in entry["scores"]))
    metric = {name: entry["scores"][name]["metric"] for entry in methods.values() for name in entry["scores"]}
    named = [f"{markdown.cell(name)} ({metric[name]})" for name in data]
    head = ["method", "parameters", *named, "ms/step", "peak GiB", "seeds"]
    lines = [head, ["---"] * len(head)]
    for method, entry in methods.items():
        scores = [_spread(entry["scores"].get(name, {}).get("values", [])) for name in data]
        row = [method, f"{entry.get('parameters', 0):,}", *scores, _mean(entry["ms_per_step"], 0)]
        lines.append([*row, _mean(entry["peak_memory_gib"], 2), ", ".join(map(str, entry["seeds"])) or "none"])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    failed = [
        f"- {method}, seed {seed}: {markdown.plain(message)}\n"
        for method, entry in methods.items()
        for seed, message in entry["failed"].items()
    ]
    return text + ("\nFailed:\n\n" + "".join(failed) if failed else "")


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{mean(values):.{digits}f}" if values else "–"


def _scores(found: Mapping[str, Any]) -> str:
    name, value = main_metric(found)
    return f"{name} {value:.4f}" if not math.isnan(value) else f"{name} is not a number"

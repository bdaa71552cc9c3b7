"""What benchmarks.paper_tasks found, as one table and one picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.ops import store

COLOURS = {"loreft": "#2b6cb0", "nodireft": "#63b3ed", "lora": "#805ad5", "frozen": "#a0aec0"}
TITLES = {"loreft": "LoReFT", "nodireft": "DiReFT", "lora": "LoRA", "frozen": "frozen"}
LOWER_IS_BETTER = ("loss", "perplexity")


def standard_error(metric: str, value: float, rows: int) -> float | None:
    """Of an accuracy over so many rows, sqrt(p (1 - p) / n); None for another metric."""
    return math.sqrt(max(value * (1 - value), 0.0) / rows) if metric == "accuracy" else None


def method_result(metric: str, values: Mapping[int, float], rows: int) -> dict[str, Any]:
    """The scores of the seeds as the table and the picture show them."""
    found = {"values": {str(seed): value for seed, value in values.items()}, "mean": mean(values.values())}
    found["standard_error"] = standard_error(metric, found["mean"], rows)
    found["spread_of_seeds"] = stdev(values.values()) if len(values) > 1 else None
    return found


def table(report: Mapping[str, Any]) -> str:
    """Scores, then what was trained and how long, as Markdown."""
    sets, trainings = report["sets"], report["trainings"]
    methods = list(dict.fromkeys(method for one in sets.values() for method in one["methods"]))
    head = ["data set", "rows", "seeds", "metric", *(TITLES.get(method, method) for method in methods)]
    lines = [head, ["---", "---:", "---:", "---", *["---:"] * len(methods)]]
    for name, one in sets.items():
        cells = [_score(one["metric"], one["methods"].get(method)) for method in methods]
        lines.append([name, str(one["rows"]), str(_seeds(one)), one["metric"].replace("_", " "), *cells])
    text = _markdown(lines) + (
        "\n± is the standard error of an accuracy over its rows, sqrt(p (1 − p) / n); the seeds' standard deviation is "
        "in brackets. A loss is better when it is lower. On GLUE every method trains the classifier's head, the frozen "
        "model nothing else.\n\n"
    )
    lines = [["training", "rows", "steps", *(TITLES.get(method, method) for method in methods)]]
    lines.append(["---", "---:", "---:", *["---:"] * len(methods)])
    for name, one in trainings.items():
        cells = [_effort(one["methods"].get(method)) for method in methods]
        lines.append([name, str(one["budget"]["examples"]), str(one["budget"]["steps"]), *cells])
    text += _markdown(lines) + (
        "\nParameters trained, without a classifier's head, and seconds of training in the mean of the seeds. Times "
        "compare only methods that ran alike: those marked * kept what never changes (`--cache-frozen memory`, exact), "
        "which LoRA cannot. All language runs compute logits for the target columns alone.\n"
    )
    failed = [
        f"- {name}, {method}, seed {seed}: {message}\n"
        for name, one in trainings.items()
        for method, entry in one["methods"].items()
        for seed, message in entry["failed"].items()
    ]
    text += "\nFailed:\n\n" + "".join(failed) if failed else ""
    return text + _samples(report.get("samples", {}))


def _seeds(one: Mapping[str, Any]) -> int:
    return max(len(found["values"]) for found in one["methods"].values())


def _markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _score(metric: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    text = f"{found['mean']:.3f}"
    if found["standard_error"] is not None:
        text += f" ± {found['standard_error']:.3f}"
    if found["spread_of_seeds"] is not None:
        text += f" ({found['spread_of_seeds']:.3f})"
    return text


def _effort(entry: Mapping[str, Any] | None) -> str:
    if entry is None or not entry["seeds"]:
        return "–"
    if not entry["seconds"]:
        return "0"
    star = "*" if entry["cache_frozen"] else ""
    return f"{entry['parameters']:,}; {mean(entry['seconds']):.0f} s{star}"


def _samples(samples: Mapping[str, Any]) -> str:
    text = ""
    for name, prompts in samples.items():
        text += f"\nWhat each method says to held-out prompts of {name} (greedy, cut off):\n"
        for one in prompts:
            text += f"\n> {_one_line(one['instruction'], 300)}\n\n"
            text += "".join(
                f"- **{TITLES.get(method, method)}**: {_one_line(said, 400)}\n" for method, said in one["said"].items()
            )
    return text


def _one_line(text: str, longest: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else f"{flat[: longest - 1]}…"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """A panel for each data set: a bar with its standard error for each method, or a dot for a loss."""
    from matplotlib.figure import Figure

    sets = report["sets"]
    columns = min(4, len(sets))
    rows = -(-len(sets) // columns)
    figure = Figure(figsize=(max(2.9 * columns + 0.4, 7.5), 2.5 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (name, one) in zip(axes, sets.items(), strict=False):
        _panel(axis, one)
        seeds = _seeds(one)
        axis.set_title(f"{name} ({one['rows']} rows, {seeds} seed{'s' if seeds > 1 else ''})", fontsize=9)
    for axis in axes[len(sets) :]:
        axis.set_visible(False)
    about = report["environment"]
    figure.suptitle(
        f"{' and '.join(report['models'].values())}; {about['device']}\n"
        "one small budget for all methods; whiskers: standard error of an accuracy, else the spread of seeds",
        fontsize=8,
    )
    store.replace_file(path, lambda partial: figure.savefig(partial, format="png", dpi=150))


def _panel(axis: Any, one: Mapping[str, Any]) -> None:
    methods = list(one["methods"])
    found = [one["methods"][method] for method in methods]
    values = [entry["mean"] for entry in found]
    errors = [entry["standard_error"] or entry["spread_of_seeds"] or 0.0 for entry in found]
    colours = [COLOURS.get(method, "#4a5568") for method in methods]
    lower = one["metric"] in LOWER_IS_BETTER
    if lower:  # losses differ by little of what they are, so that no bar could start at 0
        axis.scatter(range(len(methods)), values, color=colours, s=30, zorder=3)
        axis.margins(y=0.3)
        axis.grid(axis="y", alpha=0.3)
    else:
        axis.bar(range(len(methods)), values, width=0.62, color=colours)
        axis.axhline(0, color="black", linewidth=0.8)
        highest = max(value + error for value, error in zip(values, errors, strict=True))
        axis.set_ylim(1.15 * min(0.0, *values), max(1.18 * highest, 0.1))  # room for the numbers, also above zeros
    if any(errors):
        axis.errorbar(range(len(methods)), values, yerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        top = value + error if lower else max(value, 0.0) + error
        axis.annotate(
            f"{value:.3f}", (place, top), (0, 4), textcoords="offset points", ha="center", fontsize=7,
        )  # fmt: skip
    axis.set_xlim(-0.6, len(methods) - 0.4)
    axis.set_xticks(range(len(methods)), [TITLES.get(method, method) for method in methods], fontsize=8)
    axis.set_ylabel(one["metric"].replace("_", " ") + (" (lower is better)" if lower else ""), fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)

"""The picture of a comparison: scores against trained parameters, and the time of a step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

# Of a palette that colour-blind readers can tell apart (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#F0E442")


def draw(results: Mapping[str, Any], path: Path) -> bool:
    """Write the picture; False, and nothing written, where matplotlib is not installed or nothing has been measured."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    methods = {name: entry for name, entry in results["methods"].items() if entry["seeds"]}
    data = list(dict.fromkeys(name for entry in methods.values() for name in entry["scores"]))
    if not methods or not data:
        return False
    colours = dict(zip(methods, _COLOURS * 2, strict=False))
    timed = {name: mean(entry["ms_per_step"]) for name, entry in methods.items() if entry["ms_per_step"]}
    figure, axes = pyplot.subplots(
        1, len(data) + bool(timed), figsize=(3.6 * (len(data) + bool(timed)), 3.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], data, strict=False):
        metric = ""
        for index, (method, entry) in enumerate(methods.items()):
            values = entry["scores"].get(name, {}).get("values", [])
            if not values:
                continue
            metric = entry["scores"][name]["metric"]
            error = stdev(values) if len(values) > 1 else None
            axis.errorbar([index], [mean(values)], yerr=error, fmt="o", color=colours[method], capsize=3)
        _name_methods(axis, methods)
        axis.set_title(name, parse_math=False)
        axis.set_ylabel(metric.replace("_", " "))
        axis.margins(y=0.2)
    if timed:
        axis = axes[0][-1]
        axis.bar(range(len(timed)), list(timed.values()), color=[colours[name] for name in timed], width=0.6)
        _name_methods(axis, {name: methods[name] for name in timed})
        axis.set_title("time of a step")
        axis.set_ylabel("ms")
    save(figure, path)
    return True


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG under a temporary name, rename it, and close it."""
    from matplotlib import pyplot

    descriptor, temporary = tempfile.mkstemp(suffix=".png", dir=path.parent)
    os.close(descriptor)
    try:
        figure.savefig(temporary, dpi=150)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        pyplot.close(figure)


def _name_methods(axis: Any, methods: Mapping[str, Any]) -> None:
    names = [f"{name}\n{short_count(entry.get('parameters', 0))}" for name, entry in methods.items()]
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=30 if len(names) > 4 else 0)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.3)


def short_count(count: int) -> str:
    """12,345 as "12.3k"."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)

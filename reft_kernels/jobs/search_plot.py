"""The picture of a search: held-out scores against parameters and against the time of a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_kernels.jobs.comparison_plot import save, short_count

_TITLES = {"parameters": "trained parameters", "ms_per_step": "ms a step"}


def draw(results: Mapping[str, Any], path: Path) -> bool:
    """Write the picture; False, and nothing written, where matplotlib is not installed or no trial is finished."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    finished = {trial["number"]: trial for trial in results["trials"] if trial["state"] == "complete"}
    if not finished:
        return False
    figure, axes = pyplot.subplots(1, len(_TITLES), figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, (cost, title) in zip(axes, _TITLES.items(), strict=True):
        axis.scatter(
            [trial[cost] for trial in finished.values()],
            [trial["value"] for trial in finished.values()],
            color="#999999",
            s=22,
            label="trials that were finished",
        )
        best = [finished[number] for number in results["frontier"][cost]]
        axis.plot([trial[cost] for trial in best], [trial["value"] for trial in best], "o-", color="#0072B2",
                  label="none is better and cheaper")  # fmt: skip
        axis.set_xlabel(title)
        if cost == "parameters" and min(trial[cost] for trial in finished.values()) > 0:
            axis.set_xscale("log")
            counts = sorted({trial[cost] for trial in finished.values()})
            shown = counts[:: max(1, len(counts) // 5)]
            axis.set_xticks(shown, [short_count(count) for count in shown])
            axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(results["metric"].removeprefix("eval_").replace("_", " ") + ", held out")
    axes[0].legend(fontsize=8, frameon=False)
    save(figure, path)
    return True

"""Pictures of one device's CSV, and of nothing else."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ops import store
from benchmarks.ops.store import Row
from benchmarks.ops.workloads import MODES

COLOURS = {
    "triton": "#2b6cb0", "cuda": "#2f855a", "cpu": "#2f855a", "eager": "#63b3ed", "addmm chain": "#dd6b20",
    "torch": "#a0aec0", "torch.compile": "#d69e2e", "reference": "#718096", "pyreft rewritten": "#b794f4",
    "pyreft": "#9b2c2c",
}  # fmt: skip
# Workloads in the picture of shares: the first of the CSV, which are the core ones.
MOST_BARS = 30
MARKERS = "os^Dv<>Pp*"


def draw(csv: Path) -> list[Path]:
    """Draws three pictures beside the CSV and returns their paths; none, saying so, without matplotlib or rows."""
    rows = [row for row in store.read(csv) if row["status"] == "ok" and row["op"] == "edit"]
    if importlib.util.find_spec("matplotlib") is None:
        print("plots: matplotlib is not installed; draw them elsewhere from the CSV with --only plots")
        return []
    if not rows:
        print(f"plots: no timings in {csv}")
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures: dict[str, Callable[[Any, Sequence[Row]], Any]] = {
        "rows": _against_rows, "share": _shares, "bytes": _against_bytes,
    }  # fmt: skip
    paths = []
    for name, picture in pictures.items():
        figure = picture(plt, rows)
        if figure is None:
            continue
        path = csv.with_name(f"{csv.stem}_{name}.png")
        store.replace_file(path, lambda partial, figure=figure: figure.savefig(partial, dpi=130))
        plt.close(figure)
        paths.append(path)
    return paths


def _title(rows: Sequence[Row]) -> str:
    """The device, and the commits of what is shown."""
    newest = max(rows, key=lambda row: row["date"])
    commits = sorted({row["commit"] for row in rows})
    named = newest["commit"] + (f" and {len(commits) - 1} more" if len(commits) > 1 else "")
    count = newest["threads"]
    threads = f", {count} thread{'s' * (count != '1')}" if count else ""
    return f"{newest['device']}{threads}  ·  torch {newest['torch']}  ·  commit {named}  ·  {newest['date'][:10]}"


def _limit(rows: Sequence[Row]) -> float | None:
    """The copy bandwidth measured last, GB/s."""
    known = [row for row in rows if row["copy_gb_per_s"]]
    return float(max(known, key=lambda row: row["date"])["copy_gb_per_s"]) if known else None


def _log_log(axis: Any) -> None:
    """Two logarithmic axes with plain numbers at 1 and 3."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set(xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(LogLocator(base=10, subs=(1.0, 3.0), numticks=20))
        side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
        side.set_minor_formatter(NullFormatter())
    axis.grid(True, which="major", color="#e2e8f0")
    axis.spines[["top", "right"]].set_visible(False)


def _peers(rows: Sequence[Row]) -> list[str]:
    known = [name for name in COLOURS if any(row["peer"] == name for row in rows)]
    return known + sorted({row["peer"] for row in rows} - set(known))


def _style(peer: str) -> dict[str, Any]:
    names = list(COLOURS)
    place = names.index(peer) if peer in names else len(names) - 1
    return {"color": COLOURS.get(peer, "#4a5568"), "marker": MARKERS[place % len(MARKERS)]}


def _against_rows(plt: Any, rows: Sequence[Row]) -> Any:
    """Time against N by peer, for the shape measured at most values of N; the floor is bytes over copy bandwidth."""
    families: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        usual = row["workload"].startswith("indexed") and row["G"] == "1" and row["activation"] == "linear"
        if usual and row["heat"] == "cold" and not row["workload"].endswith("copy"):
            families[row["d"], row["r"], row["h_dtype"], row["param_dtype"]].append(row)
    several = {key: found for key, found in families.items() if len({row["N"] for row in found}) > 1}
    if not several:
        return None
    key = max(several, key=lambda k: (len({row["N"] for row in several[k]}), len(several[k])))
    shown = several[key]
    limit = _limit(shown)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.4), sharey=True, layout="constrained")
    for axis, mode in zip(axes, MODES, strict=True):
        for peer in _peers(shown):
            points = sorted(
                (int(row["N"]), float(row["p50_us"])) for row in shown if row["mode"] == mode and row["peer"] == peer
            )
            if points:
                axis.plot(*zip(*points, strict=True), label=peer, **_style(peer), markersize=5, linewidth=1.6)
        if limit:
            floor = sorted(
                {(int(row["N"]), int(row["bytes_min"]) / limit / 1e3) for row in shown if row["mode"] == mode}
            )
            axis.plot(*zip(*floor, strict=True), color="black", linestyle=":", label="fewest bytes at copy bandwidth")
        axis.set(xlabel="edited rows N", title=mode)
        _log_log(axis)
        counts = sorted({int(row["N"]) for row in shown})
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel("median, microseconds")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    d, r, h, params = key
    figure.suptitle(
        f"Indexed edit, d = {d}, r = {r}, h {h}, weights {params}, caches cold\n{_title(shown)}", fontsize=10
    )
    return figure


def _shares(plt: Any, rows: Sequence[Row]) -> Any:
    """Share of copy bandwidth by workload: the fastest of our backends, and the fastest of the others."""
    shown = [row for row in rows if row["heat"] == "cold" and row["share_of_copy"] and row["mode"] != "both"]
    if not shown:
        return None
    names = list(dict.fromkeys(row["workload"] for row in shown))[:MOST_BARS]
    figure, axes = plt.subplots(
        1, 2, figsize=(13, 1.6 + 0.34 * len(names)), sharey=True, layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes[0], ("forward", "backward"), strict=True):
        for place, name in enumerate(names):
            found = [row for row in shown if row["workload"] == name and row["mode"] == mode]
            ours = [row for row in found if row["peer"] in ("triton", "cuda", "cpu", "eager")]
            others = [row for row in found if row not in ours]
            for offset, group in ((-0.19, ours), (0.19, others)):
                if not group:
                    continue
                best = max(group, key=lambda row: float(row["share_of_copy"]))
                share = 100 * float(best["share_of_copy"])
                axis.barh(place + offset, share, height=0.36, color=_style(best["peer"])["color"])
                axis.annotate(
                    f"{share:.0f}%  {best['peer']}", (share, place + offset), (4, 0), textcoords="offset points",
                    va="center", fontsize=7,
                )  # fmt: skip
        axis.axvline(100, color="black", linestyle=":", linewidth=1)
        axis.set_xlim(0, 1.25 * max(100.0, *(100 * float(row["share_of_copy"]) for row in shown)))
        axis.set(xlabel="percent of the copy bandwidth of the device", title=mode)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(
        f"Bandwidth by the fewest bytes an edit moves: the best of reft_kernels above, the best of the peers below\n"
        f"{_title(shown)}",
        fontsize=10,
    )
    return figure


def _against_bytes(plt: Any, rows: Sequence[Row]) -> Any:
    """Time against the fewest bytes, every workload, with the line of the copy bandwidth."""
    shown = [row for row in rows if row["heat"] == "cold" and row["mode"] != "both"]
    if not shown:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True, sharex=True, layout="constrained")
    limit = _limit(shown)
    for axis, mode in zip(axes, ("forward", "backward"), strict=True):
        of_mode = [row for row in shown if row["mode"] == mode]
        for peer in _peers(of_mode):
            own = [row for row in of_mode if row["peer"] == peer]
            axis.scatter(
                [int(row["bytes_min"]) / 1e6 for row in own], [float(row["p50_us"]) for row in own],
                label=peer, **_style(peer), s=26, alpha=0.85, linewidths=0,
            )  # fmt: skip
        if limit:
            ends = [f(int(row["bytes_min"]) for row in shown) for f in (min, max)]
            axis.plot(
                [n / 1e6 for n in ends], [n / limit / 1e3 for n in ends], color="black", linestyle=":",
                label=f"copy, {limit:,.0f} GB/s",
            )  # fmt: skip
        axis.set(xlabel="fewest bytes moved, MB", title=mode)
        _log_log(axis)
    axes[0].set_ylabel("median, microseconds")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.suptitle(f"Every workload, caches cold\n{_title(shown)}", fontsize=10)
    return figure

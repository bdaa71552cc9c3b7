"""The picture of a training run: what of its log is drawn, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, NamedTuple

from reft_kernels.training.logs import is_number, metrics_of, step_of, words

_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#b83280", "#4a5568")
# More points than this of a curve to be smoothed are drawn faintly, with their running mean over them.
_MANY = 60


class Curve(NamedTuple):
    """Values over optimiser steps."""

    label: str
    steps: list[int]
    values: list[float]


@dataclass
class Panel:
    """One pair of axes."""

    title: str
    unit: str
    curves: list[Curve]
    from_zero: bool = False
    logarithmic: bool = False
    smooth: bool = False


def panels_of(history: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """What of the history is drawn, in the order in which it is."""

    def curve(name: str, label: str, scale: float = 1.0) -> list[Curve]:
        # Of a step that was logged twice (a run went on from an earlier checkpoint) the last value counts.
        points = {step_of(entry): float(entry[name]) * scale for entry in history if is_number(entry.get(name))}
        steps = sorted(points)
        return [Curve(label, steps, [points[step] for step in steps])] if points else []

    def metric(name: str) -> list[Curve]:
        return curve(f"eval_{name}", words(name))

    metrics = sorted({name for entry in history for name in metrics_of(entry)} - {"loss"})
    shares = {name for name in metrics if all(-1 <= entry.get(f"eval_{name}", 0) <= 1 for entry in history)}
    panels = [
        Panel("Loss", "loss", [*curve("loss", "training"), *curve("eval_loss", "held out")], smooth=True),
        Panel("Metrics on held-out data", "", [c for name in metrics if name in shares for c in metric(name)]),
        *(
            Panel(f"{words(name).capitalize()} on held-out data", "", metric(name))
            for name in metrics
            if name not in shares
        ),
        Panel("Orthonormality of R", "max |R Rᵀ − I|", curve("orthonormality_error", "all layers"), logarithmic=True),
        Panel("Step time", "ms per optimiser step", curve("step_ms", "step"), from_zero=True),
        Panel(
            "Tokens",
            "tokens per second",
            [*curve("tokens_per_second", "real"), *curve("padded_tokens_per_second", "with padding")],
            from_zero=True,
        ),
        Panel("Model FLOP utilisation", "% of peak", curve("mfu", "MFU", 100), from_zero=True),
    ]
    return [panel for panel in panels if panel.curves]


def draw(history: Sequence[Mapping[str, Any]]) -> bytes | None:
    """The picture as PNG; None without matplotlib. Raises ValueError where the history has nothing to draw."""
    panels = panels_of(history)
    if not panels:
        raise ValueError("the history has no values over steps to draw")
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.2 * rows), dpi=150)
    figure.set_layout_engine(ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.1))
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    last = max(step for panel in panels for curve in panel.curves for step in curve.steps)
    for panel, axis in zip(panels, axes, strict=False):
        _draw_panel(panel, axis)
        axis.set_xlim(0, last * 1.02 or 1)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[max(0, len(panels) - columns) : len(panels)]:
        axis.set_xlabel("optimiser step")
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_panel(panel: Panel, axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    positive = [value for curve in panel.curves for value in curve.values if value > 0]
    logarithmic = panel.logarithmic and bool(positive)
    for (label, steps, values), colour in zip(panel.curves, _COLOURS * len(panel.curves), strict=False):
        many = len(steps) > _MANY
        if many and panel.smooth:
            reach = len(steps) // 40
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values, label = _running_mean(values, reach), f"{label} (mean of up to {2 * reach + 1})"
        marker = "" if many else "o"
        axis.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)
    axis.set_title(panel.title, fontsize=11, loc="left")
    axis.set_ylabel(panel.unit)
    axis.grid(True, color="#e2e8f0", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if logarithmic:
        axis.set_yscale("log", nonpositive="mask")
        # At least two decades, so that an error of rounding does not look like one that moves.
        middle = (min(positive) * max(positive)) ** 0.5
        axis.set_ylim(min(min(positive) / 2, middle / 10), max(max(positive) * 2, middle * 10))
    elif panel.from_zero:
        axis.set_ylim(0, 1.1 * max(max(curve.values) for curve in panel.curves) or 1)
    if not logarithmic:
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    if len(panel.curves) > 1 or panel.smooth:
        axis.legend(frameon=False, fontsize=9)


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Of each value and the `reach` values on either side of it, as far as there are so many on both."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        means.append(sum(values[i - near : i + near + 1]) / (2 * near + 1))
    return means

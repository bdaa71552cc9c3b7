"""A picture and a page of a training run: report.png and report.html."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from reft_kernels.folders import replace_files
from reft_kernels.training.logs import is_number, metrics_of

PICTURE_FILE = "report.png"
PAGE_FILE = "report.html"
_LOG_FILE = "train_log.json"
_STATE_FILE = "trainer_state.json"

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


@dataclass
class Run:
    """What is known of a run: the Trainer's log history, settings, results and facts, each a name and a value."""

    title: str
    history: list[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def write_report(
    folder: str | Path,
    *,
    title: str | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes `report.html`, and where matplotlib is installed `report.png`, into the folder of a run.

    The picture has the loss, the metrics of evaluations, the error of R's orthonormality and the speed over the
    optimiser steps, as far as the history has them. The page has the picture and tables; it is one file that loads
    nothing.

    Args:
        folder: of the run, which is read for what is not given.
        title: the folder's name by default.
        history: `trainer.state.log_history`; by default that of the folder, see :func:`read_run`.
        settings: names and values; by default the settings of `train_log.json`.
        results: final metrics, by name; by default the last value of each in the history.
        facts: parameters, versions, device and the like; by default those of `train_log.json`.

    Returns the files written, the page first.

    Raises:
        FileNotFoundError: no such folder, or no history is given and none is in the folder.
        ValueError: a damaged log file, or a history without a step.
    """
    folder = Path(folder)
    found = read_run(folder) if history is None else None
    known = _read_json(folder / _LOG_FILE) or {}
    run = Run(
        title or folder.resolve().name,
        list(history) if history is not None else found or [],
        settings if settings is not None else _mapping(known.get("settings")),
        results if results is not None else {},
        facts if facts is not None else {k: v for k, v in known.items() if k not in ("settings", "history")},
    )
    picture = draw(run)
    page = make_page(run, picture)

    def write(fresh: Path) -> None:
        (fresh / PAGE_FILE).write_text(page, encoding="utf-8")
        if picture is not None:
            (fresh / PICTURE_FILE).write_bytes(picture)

    replace_files(folder, write)
    return [folder / name for name in (PAGE_FILE, PICTURE_FILE) if name == PAGE_FILE or picture is not None]


def read_run(folder: str | Path) -> list[Mapping[str, Any]]:
    """The log history that is in a run's folder: the longest of those in its `trainer_state.json`, in its checkpoints'
    and in its `train_log.json`.

    Raises FileNotFoundError where there is none, ValueError where a file is no JSON.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    states = [folder / _STATE_FILE, *sorted(folder.glob(f"checkpoint-*/{_STATE_FILE}"))]
    histories = [(_read_json(path) or {}).get("log_history") for path in states]
    histories.append((_read_json(folder / _LOG_FILE) or {}).get("history"))
    held = [[entry for entry in entries if isinstance(entry, Mapping)] for entries in histories if entries]
    if not held:
        raise FileNotFoundError(f"{folder} holds no history of a run ({_STATE_FILE} or {_LOG_FILE})")
    return max(held, key=lambda entries: (max(_step(entry) for entry in entries), len(entries)))


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    return content if isinstance(content, dict) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _step(entry: Mapping[str, Any]) -> int:
    step = entry.get("step", 0)
    return step if isinstance(step, int) else 0


def panels_of(history: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """What of the history is drawn, in the order in which it is."""

    def curve(name: str, label: str, scale: float = 1.0) -> list[Curve]:
        # Of a step that was logged twice (a run went on from an earlier checkpoint) the last value counts.
        points = {_step(entry): float(entry[name]) * scale for entry in history if is_number(entry.get(name))}
        steps = sorted(points)
        return [Curve(label, steps, [points[step] for step in steps])] if points else []

    def metric(name: str) -> list[Curve]:
        return curve(f"eval_{name}", _words(name))

    metrics = sorted({name for entry in history for name in metrics_of(entry)} - {"loss"})
    shares = {name for name in metrics if all(-1 <= entry.get(f"eval_{name}", 0) <= 1 for entry in history)}
    panels = [
        Panel("Loss", "loss", [*curve("loss", "training"), *curve("eval_loss", "held out")], smooth=True),
        Panel("Metrics on held-out data", "", [c for name in metrics if name in shares for c in metric(name)]),
        *(
            Panel(f"{_words(name).capitalize()} on held-out data", "", metric(name))
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


def draw(run: Run) -> bytes | None:
    """The picture as PNG; None without matplotlib. Raises ValueError where the history has nothing to draw."""
    panels = panels_of(run.history)
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


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; background: #fff; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: 0.2rem 1.2rem 0.2rem 0; }
th { font-weight: 500; color: #4a5568; } tr + tr { border-top: 1px solid #e2e8f0; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.side { display: flex; flex-wrap: wrap; gap: 0 4rem; }
"""


def make_page(run: Run, picture: bytes | None) -> str:
    """The page as HTML: nothing in it is loaded from elsewhere, and every text is escaped."""
    results = run.results or last_values(run.history)
    image = "<p>The picture needs matplotlib, which was not installed.</p>"
    if picture is not None:
        shown = ", ".join(panel.title for panel in panels_of(run.history))
        data = base64.b64encode(picture).decode("ascii")
        image = f'<img alt="{html.escape(shown)} over optimiser steps" src="data:image/png;base64,{data}">'
    title = html.escape(run.title)
    tables = "".join(
        f"<section><h2>{name}</h2>{_table(values)}</section>"
        for name, values in (("Results", results), ("Settings", run.settings), ("Run", run.facts))
        if values
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n{image}\n"
        f'<div class="side">{tables}</div></body></html>\n'
    )


def last_values(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of the loss and of every metric of evaluations."""
    losses = [entry["loss"] for entry in history if is_number(entry.get("loss"))]
    values = {"training loss (last)": float(losses[-1])} if losses else {}
    for entry in history:
        for name, value in metrics_of(entry).items():
            values["held-out loss" if name == "loss" else _words(name)] = float(value)
    return values


def _words(name: str) -> str:
    return name.replace("_", " ")


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in flat(values))
    return f"<table>{rows}</table>"


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values as people read them; those of a mapping inside have its name in front."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        label = f"{prefix}{name}"
        if isinstance(value, Mapping):
            rows += flat(value, f"{label}, ")
        else:
            rows.append((label, text_of(value)))
    return rows


def text_of(value: Any) -> str:
    """A value as people read it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, tuple)) else str(value)

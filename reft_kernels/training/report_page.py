"""The page of a training run: a picture and tables in one HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reft_kernels.training.logs import is_number, metrics_of, words
from reft_kernels.training.report_picture import panels_of


@dataclass
class Run:
    """What is known of a run: the Trainer's log history, settings, results and facts, each a name and a value."""

    title: str
    history: list[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


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
            values["held-out loss" if name == "loss" else words(name)] = float(value)
    return values


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

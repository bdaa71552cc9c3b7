"""The table at the end of a run: a workload in a line, a peer in a column, medians in microseconds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from benchmarks.ops.store import Row


def show(rows: Sequence[Row], order: Sequence[str]) -> None:
    """Prints the rows of a run, peers in the given order; with rich where it is installed."""
    if not rows:
        return
    header, lines = pivot(rows, order)
    units = "us, medians; in brackets the share of the device's copy bandwidth, by the fewest bytes an edit moves"
    if importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.table import Table

        table = Table(caption=units, header_style="bold")
        for name in header:
            table.add_column(name, justify="left" if name in header[:3] else "right", no_wrap=name == header[0])
        for line in lines:
            table.add_row(*line)
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=200)
        console.print(table)
        return
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, *lines]:
        print("  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))))  # noqa: B905
    print(units)


def pivot(rows: Sequence[Row], order: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table, all of text."""
    peers = [name for name in order if any(row["peer"] == name for row in rows)]
    cells: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row["workload"], row["mode"], row["heat"]), {})[row["peer"]] = _cell(row)
    lines = [[*key, *(cells[key].get(peer, "-") for peer in peers)] for key in cells]
    return ["workload", "mode", "heat", *peers], lines


def _cell(row: Row) -> str:
    if row["status"] != "ok":
        return row["status"].upper()
    median = float(row["p50_us"])
    shown = f"{median:,.0f}" if median >= 1000 else f"{median:.1f}" if median >= 10 else f"{median:.2f}"
    share = row.get("share_of_copy")
    return f"{shown} ({100 * float(share):.0f}%)" if share else shown

"""The rows of a sweep as curves over the rate of requests."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError

_PANELS = (
    ("out_tok_s", "output tokens/s"),
    ("goodput_s", "goodput, requests/s"),
    ("ttft_p99_ms", "TTFT p99, ms"),
    ("tbt_p99_ms", "TBT p99, ms"),
)


def check_plot(path: Path) -> None:
    """Raises ConfigError where no plot can be drawn into `path`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'llm42c[bench]'")
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"a plot is .svg, .png or .pdf, not {path.name}")


def plot(path: Path, rows: Sequence[Mapping[str, Any]], command: str) -> None:
    """A row of panels a trace, a curve an engine and share of deterministic requests; the command below.

    Raises ConfigError for a file that cannot be written.
    """
    from matplotlib.figure import Figure

    traces = list(dict.fromkeys(row["trace"] for row in rows))
    figure = Figure(figsize=(4 * len(_PANELS), 3.2 * len(traces)), layout="constrained")
    axes = figure.subplots(len(traces), len(_PANELS), squeeze=False)
    for line, trace in zip(axes, traces, strict=True):
        for axis, (column, label) in zip(line, _PANELS, strict=True):
            _curves(axis, [row for row in rows if row["trace"] == trace], column)
            axis.set(title=trace, xlabel="requests/s", ylabel=label)
            if column.endswith("_ms"):
                axis.set_yscale("log")
    axes[0][0].legend(fontsize="small")
    figure.supxlabel(command, fontsize="x-small", wrap=True)
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _curves(axis: Any, rows: Sequence[Mapping[str, Any]], column: str) -> None:
    names = list(dict.fromkeys((row["engine"], row["deterministic_percent"]) for row in rows))
    for engine, percent in names:
        points = sorted(
            # At infinite rate the requests come as fast as they are answered.
            (row["requests_s"] if math.isinf(float(row["qps"])) else float(row["qps"]), row[column])
            for row in rows
            if (row["engine"], row["deterministic_percent"]) == (engine, percent)
        )
        label = engine if percent == "" else f"{engine}, {percent} % deterministic"
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)

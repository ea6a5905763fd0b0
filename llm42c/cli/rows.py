"""Rows of measurements: how the commands of `llm42 bench` show them and write them down."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from llm42c.cli import parallel
from llm42c.cli.common import out
from llm42c.errors import ConfigError

CsvOption = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the rows as CSV.")]

_HEADINGS = {"requests": "at once", "median_tok_s": "tok/s", "first_over_this": "ratio"}
_HEADINGS |= {"deterministic_percent": "determ. %", "out_tok_s": "tok/s", "goodput_s": "good/s"}


def numbers(name: str, text: str, low: int, high: int) -> list[int]:
    """Comma-separated integers. Raises ConfigError."""
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"{name} takes integers separated by commas, not {text!r}") from None
    for number in numbers:
        if not low <= number <= high:
            raise ConfigError(f"{name} takes {low} to {high}, not {number}")
    return numbers


def show(rows: list[dict[str, Any]], columns: Sequence[str]) -> None:
    """A table; of a single row, name by name, which any terminal has room for."""
    headings = [_HEADINGS.get(name, name.replace("_", " ")) for name in columns]
    table = Table(show_header=len(rows) > 1, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    if len(rows) == 1:
        table.add_column()
        table.add_column(justify="right")
        for heading, name in zip(headings, columns, strict=True):
            table.add_row(heading, str(rows[0][name]))
    else:
        for heading, name in zip(headings, columns, strict=True):
            left = name in ("workload", "trace", "engine")
            table.add_column(heading, justify="left" if left else "right", no_wrap=left)
        for row in rows:
            table.add_row(*(str(row[name]) for name in columns))
    out.print(table)


def save(rows: list[dict[str, Any]], csv: Path | None) -> None:
    """Write the CSV, if one is wanted, with the command and the machine in every row."""
    if csv is not None and not parallel.silent():
        from llm42c.runtime.bench import machine
        from llm42c.runtime.bench.harness import write_csv

        write_csv(csv, rows, command=command_line(), **machine.describe())


def command_line() -> str:
    """The command that is running, as a result shows it."""
    return shlex.join(["llm42", *(_plain(word) for word in sys.argv[1:])])


def _plain(word: str) -> str:
    """Paths of this machine mean nothing to a reader: keep the last part."""
    return os.path.basename(word) if os.path.isabs(word) else word

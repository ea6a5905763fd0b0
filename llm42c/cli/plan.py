"""`llm42 plan`: what a model needs on a device, how fast and at which price, and the sizes to run it with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperGroup

from llm42c.cli import exits
from llm42c.cli.common import (
    DEFAULT_MODEL,
    DTYPES,
    DtypeOption,
    JsonFileOption,
    ModelArgument,
    choice,
    out,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from llm42c.runtime.plan.score import Score, Tally


class _Make(TyperGroup):
    """`llm42 plan [MODEL]` is `llm42 plan make [MODEL]`."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["make", *args]
        return super().parse_args(context, args)


app = typer.Typer(
    cls=_Make,
    help="Plans: make (what `llm42 plan [MODEL]` means), score.",
    pretty_exceptions_enable=False,
)


@app.command("make")
def make(
    model: ModelArgument = DEFAULT_MODEL,
    device: Annotated[
        str,
        typer.Option(
            "--device", help="A file that describes it, auto: this machine, a known name, a device as JSON."
        ),
    ] = "auto",
    devices: Annotated[int, typer.Option("--devices", help="How many of them divide the model.")] = 1,
    dtype: DtypeOption = None,
    context: Annotated[
        int, typer.Option("--context", help="Tokens that a request is expected to have.")
    ] = 2048,
    usd_per_hour: Annotated[
        float | None, typer.Option("--usd-per-hour", help="What one device costs an hour.")
    ] = None,
    country: Annotated[
        str | None, typer.Option("--country", help="Of the grid and the income, such as KE or DEU.")
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the plan as JSON, for --plan.")
    ] = None,
) -> None:
    """Read a device, and say what MODEL needs on it, how fast it is, what it costs, and how to configure
    it."""
    from llm42c.runtime.plan.plan import Asked
    from llm42c.runtime.plan.plan import make as planned
    from llm42c.runtime.plan.report import lines

    if dtype is not None:
        choice("--dtype", dtype, DTYPES)
    made = planned(Asked(model, device, dtype, devices, usd_per_hour, country, context))
    for line in lines(made):
        out.print(line, markup=False, soft_wrap=True)
    if out_file is not None:
        write_text(out_file, made.to_json())


@app.command("score")
def score(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Texts of devices, and truth.json: what they say.")
    ],
    misses: Annotated[bool, typer.Option("--misses", help="Name every value that was not found.")] = False,
    json_file: JsonFileOption = None,
) -> None:
    """Read texts whose truth is known. Exits with 1 if a value was accepted that is wrong."""
    from llm42c.runtime.plan.score import score as scored

    found = scored(folder)
    out.print(_table(folder, found))
    wrong = [miss for miss in found.misses if "accepted, the truth" in miss]
    for miss in found.misses if misses else wrong:
        out.print(miss, markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, found.to_dict())
    if found.whole.wrong:
        raise typer.Exit(exits.FAILED)


def _table(folder: Path, found: Score) -> Table:
    table = Table("field", "said", "right", "wrong", "abstained", "precision", "recall")
    table.title = f"{found.texts} texts of {folder.name}, read by rules"
    for name, tally in found.fields.items():
        table.add_row(name, *_row(tally))
    table.add_section()
    table.add_row("all", *_row(found.whole))
    return table


def _row(tally: Tally) -> list[str]:
    counts = [str(n) for n in (tally.said, tally.right, tally.wrong, tally.abstained)]
    return [*counts, f"{tally.precision:.3f}", f"{tally.recall:.3f}"]

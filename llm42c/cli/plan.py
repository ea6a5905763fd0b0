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
    help="Plans: make (what `llm42 plan [MODEL]` means), calibrate, score.",
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
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw speed, memory and cost: .svg or .png.")
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
    if plot is not None:
        from llm42c.runtime.plan.plot import draw

        draw(made, plot)


@app.command("calibrate")
def calibrate(model: ModelArgument = DEFAULT_MODEL, dtype: DtypeOption = None) -> None:
    """Time steps of MODEL on this machine's CPU; later plans for it, of models of that dtype, go by them."""
    from llm42c.cli.common import open_engine, progress_bars
    from llm42c.runtime.plan import calibration, probe
    from llm42c.runtime.plan.calibrate import calibrate as timed
    from llm42c.runtime.plan.needs import needs

    device = probe.cpu()
    with progress_bars() as report:
        built = open_engine(model, report, dtype=dtype)
        report("timing", 0, 0)
        found = timed(built.engine, needs(model, dtype), device)
    kept = calibration.keep(device, found)
    out.print(f"{found.name}: {found.source}", markup=False, soft_wrap=True)
    coefficients = f"{found.constant * 1e3:.3g} ms, {found.memory_share:.3g}, {found.compute_share:.3g}"
    out.print(
        f"constant, memory, compute: {coefficients}; measured/predicted {found.low:.2f} to {found.high:.2f}"
    )
    if not kept:
        raise typer.Exit(exits.FAILED)


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

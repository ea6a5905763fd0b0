"""`llm42 plan`: what a model needs on a device, how fast and at which price, and the sizes to run it with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm42c.cli.common import DEFAULT_MODEL, DtypeOption, ModelArgument, out, write_text


def plan(
    model: ModelArgument = DEFAULT_MODEL,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="A file that describes it, 'auto' for this machine, a known name, a device as JSON.",
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
    from llm42c.cli.common import choice
    from llm42c.runtime.plan.plan import Asked, make
    from llm42c.runtime.plan.report import lines

    if dtype is not None:
        choice("--dtype", dtype, ("bfloat16", "float16", "float32"))
    made = make(Asked(model, device, dtype, devices, usd_per_hour, country, context))
    for line in lines(made):
        out.print(line, markup=False, soft_wrap=True)
    if out_file is not None:
        write_text(out_file, made.to_json())

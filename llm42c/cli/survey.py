"""`llm42 survey`: every decoder class of transformers through `torch.compile` and `generate`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer

from llm42c.cli import exits
from llm42c.cli.common import JsonFileOption, out, progress_bars, write_json
from llm42c.errors import ConfigError


def survey(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[CLASS]...", help="Classes; default: all.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="float32 or bfloat16; default: both.")
    ] = None,
    path: Annotated[
        list[str] | None, typer.Option("--path", help="compile or generate; default: both.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes at a time.")] = 2,
    limit: Annotated[
        float, typer.Option("--limit", min=1, help="Seconds for a cell before it is slow.")
    ] = 300.0,
    inductor: Annotated[
        bool,
        typer.Option(
            help="With --no-inductor, graphs after the passes run call by call: several times faster."
        ),
    ] = True,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write the page, such as docs/models.md.")
    ] = None,
    known: Annotated[
        list[Path] | None,
        typer.Option("--known", metavar="FILE", help="What --json wrote: its cells are not run again."),
    ] = None,
    json_file: JsonFileOption = None,
) -> None:
    """Build each decoder of transformers tiny, and test that its rows do not depend on their batch.

    With --known a survey goes on where others ended, and several runs of the same versions make one page.
    Ends with status 1 if a cell is wrong, crashed or slow, or if too few inputs could have shown it.
    """
    from llm42c.runtime.survey import cells, page, pool, results

    decoders, versions = _decoders(names), _versions(inductor)
    before = results.read(known or [], versions)
    dtypes, paths = _chosen("--dtype", dtype, cells.DTYPES), _chosen("--path", path, cells.PATHS)
    asked: set[tuple[str, str]] = set(itertools.product(dtypes, paths))
    asked |= {(cell.dtype, cell.path) for one in before.values() for cell in one.cells}
    wanted: list[tuple[str, str]] = [(d, p) for p in cells.PATHS for d in cells.DTYPES if (d, p) in asked]
    with progress_bars() as report:
        so_far: list[Any] = []

        def tell(one: Any) -> None:
            so_far.append(one)
            print(page.line(one), flush=True)
            report("surveying", len(so_far), len(decoders))
            if json_file is not None:  # at once, for a survey that is broken off
                write_json(json_file, results.data(so_far, versions))

        found = pool.survey(
            decoders, wanted, workers=workers, limit=limit, inductor=inductor, tell=tell, known=before
        )
    for text in page.shares(found, wanted):
        out.print(text)
    if json_file is not None:
        write_json(json_file, results.data(found, versions))
    if write is not None:
        write.write_text(page.page(found, wanted, versions, len(_decoders(None))))
    bad, revealing = page.bad_cells(found), page.share_revealing(found)
    out.print(f"{len(bad)} cells wrong, crashed or slow; eager's rows depend on the batch in {revealing:.0%}")
    if bad or (len(decoders) > 20 and revealing < page.MIN_REVEALING):
        raise typer.Exit(exits.FAILED)


def _chosen(name: str, given: list[str] | None, allowed: tuple[str, ...]) -> list[str]:
    """Raises ConfigError naming the option."""
    for value in given or ():
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return list(given or allowed)


def _decoders(names: list[str] | None) -> list[Any]:
    """The classes of those names, or all. Raises ConfigError for an unknown one."""
    from llm42c.runtime.survey.classes import decoders

    known = {decoder.name: decoder for decoder in decoders()}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"transformers has no decoder class {name!r}")
    return [known[name] for name in names] if names else list(known.values())


def _versions(inductor: bool) -> str:
    import torch
    import transformers

    how = "" if inductor else "; graphs of `torch.compile` run call by call (`--no-inductor`)"
    return f"transformers {transformers.__version__}, run with torch {torch.__version__.split('+')[0]}{how}"

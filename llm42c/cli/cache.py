"""`llm42 cache`: what lies in the user's cache folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from llm42c.cli import exits
from llm42c.codegen import cache as folders


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything in it.")] = False,
) -> None:
    """Show where compiled kernels, unpacked models and certificates are kept, and how large they are.

    All of it can be deleted at any time: it is made again when needed. Without a folder that can be written
    work goes on, and begins as slowly each time.
    """
    folder = folders.folder()
    print(folder)
    try:
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        for entry in entries:
            print(f"{_megabytes(entry):9.1f} MB  {entry.name}")
        if left := folders.leftovers():
            print(f"{sum(map(_megabytes, left)):9.1f} MB  of it unfinished, from processes that were killed")
        if clear:
            for entry in entries:
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            print("cleared")
            return
    except OSError as error:
        print(f"stopped: {error}")
        raise typer.Exit(exits.FAILED) from None
    if not entries:
        print("empty")
    reason = folders.obstacle()
    print("can be written" if reason is None else f"cannot be written: {reason} (set XDG_CACHE_HOME)")


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6

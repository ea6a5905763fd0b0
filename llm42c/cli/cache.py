"""`llm42 cache`: what lies in the user's cache folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import platformdirs
import typer


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete everything in it.")] = False,
) -> None:
    """Show where compiled kernels, unpacked models and certificates are kept, and how large they are.

    All of it can be deleted at any time: it is made again when needed.
    """
    folder = platformdirs.user_cache_path("llm42")
    print(folder)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for entry in entries:
        print(f"{_megabytes(entry):9.1f} MB  {entry.name}")
    if clear:
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        print("cleared")
    elif not entries:
        print("empty")


def _megabytes(path: Path) -> float:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6

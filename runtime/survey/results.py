"""What surveys found, kept in files: several runs make one page, and one that ended early can go on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError
from llm42c.runtime.survey.cells import Cell
from llm42c.runtime.survey.pool import Surveyed


def data(found: Iterable[Surveyed], versions: str) -> dict[str, Any]:
    """What a file holds, as JSON takes it."""
    return {"versions": versions, "classes": [asdict(one) for one in found]}


def read(files: Iterable[Path], versions: str) -> dict[str, Surveyed]:
    """The classes of all files by name, with the cells of each; of a cell in several files, the last.

    Raises ConfigError for a file that is none, or of other versions.
    """
    known: dict[str, Surveyed] = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
            theirs, classes = content["versions"], [_surveyed(one) for one in content["classes"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file} is not what llm42 survey --json writes ({error})") from None
        if theirs != versions:
            raise ConfigError(f"{file} is of {theirs}; this is {versions}")
        for one in classes:
            cells = {(c.dtype, c.path): c for c in known[one.name].cells} if one.name in known else {}
            one.cells = list((cells | {(c.dtype, c.path): c for c in one.cells}).values())
            known[one.name] = one
    return known


def _surveyed(one: dict[str, Any]) -> Surveyed:
    return Surveyed(**one | {"cells": [Cell(**cell) for cell in one["cells"]]})

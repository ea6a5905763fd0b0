"""The versions that results were tested with, and one line for a start on others.

The bounds are those of pyproject.toml, where pip reads them; docs/compatibility.md says what was run.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re

# Oldest and newest minor version, both included.
TESTED = {"torch": ((2, 11), (2, 13)), "transformers": ((5, 17), (5, 24))}
_log = logging.getLogger(__name__)


@functools.cache
def notice() -> None:
    """Warn, once a process, if a version lies outside of what was tested. Work goes on."""
    for package, ((*oldest,), (*newest,)) in TESTED.items():
        found = importlib.metadata.version(package)
        if not oldest <= minor(found) <= newest:
            _log.warning(
                "%s %s was not tested: llm42 was, with %s to %s; results may differ or fail (pip install "
                '"%s>=%s,<%s" takes a tested one)',
                package,
                found,
                _text(oldest),
                _text(newest),
                package,
                _text(oldest),
                _text([newest[0], newest[1] + 1]),
            )


def minor(version: str) -> list[int]:
    """``[2, 13]`` of ``2.13.0+cpu``, ``2.13.0a0`` or ``2.13``."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def _text(numbers: list[int]) -> str:
    return ".".join(map(str, numbers))

"""Write the versions of the environment that runs this into a constraints file, keeping the file's heading.

    .venv-lock/bin/python .ci/lock.py constraints.txt

Local parts go (`2.13.0+cpu` is `2.13.0` to a constraint), and so does the project itself.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

_NOT_OURS = {"llm42c", "pip"}


def canonical(name: str) -> str:
    """A project's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(path: Path) -> None:
    heading = [line for line in path.read_text().splitlines() if line.startswith("#")]
    versions = {canonical(d.name): d.version.partition("+")[0] for d in importlib.metadata.distributions()}
    fixed = [f"{name}=={version}" for name, version in sorted(versions.items()) if name not in _NOT_OURS]
    path.write_text("\n".join([*heading, *fixed]) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

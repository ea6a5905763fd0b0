"""Draw the rooms of the code and who imports whom, from the code, into docs/architecture.md.

    python .ci/map.py            write the figure
    python .ci/map.py --check    exit 1 if it is not the one that would be written

A room is a folder of modules. A solid arrow is an import that happens when a file is imported; a dotted one
happens in a function, or for type checkers only.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from check_layers import LAYERS, imports, module_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs", "architecture.md")
BEGIN, END = "<!-- drawn by .ci/map.py -->\n", "<!-- end of what .ci/map.py draws -->\n"


@dataclass(frozen=True)
class File:
    """One module and the folder that it stands in, below the root."""

    path: Path
    module: str
    room: str


def files(root: Path) -> list[File]:
    """Every module of the four layers."""
    found = (path.relative_to(root) for layer in LAYERS for path in sorted((root / layer).rglob("*.py")))
    return [File(path, module_name(path), path.parent.as_posix()) for path in found]


def arrows(root: Path) -> dict[tuple[str, str], bool]:
    """(who imports, from whom), of different rooms → whether only in functions."""
    room_of = {file.module: file.room for file in files(root)}
    found: dict[tuple[str, str], bool] = {}
    for file in files(root):
        package = file.module if file.path.name == "__init__.py" else file.module.rpartition(".")[0]
        for imported in imports(root / file.path, package):
            other = _room(imported.module, room_of)
            if other and other != file.room:
                found[file.room, other] = found.get((file.room, other), True) and imported.lazy
    return found


def _room(name: str, room_of: Mapping[str, str]) -> str | None:
    """Where an imported name comes from; None if from elsewhere."""
    while name and name not in room_of:
        name = name.rpartition(".")[0]
    return room_of.get(name)


def purpose(root: Path, room: str) -> str:
    """The first paragraph of what a room says of itself. Raises ValueError if it says nothing."""
    text = ast.get_docstring(ast.parse((root / room / "__init__.py").read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{room}/__init__.py does not say what the room is for")
    first = " ".join(text.split("\n\n")[0].split())
    return re.sub(r":\w+:(?=`)", "", first).replace("``", "`")


def figure(root: Path) -> str:
    """A Mermaid figure of rooms and arrows, and a table of what the rooms are for."""
    lines = ["```mermaid", "flowchart TD"]
    everyone = sorted({file.room for file in files(root)})
    for layer in reversed(LAYERS):
        own = [room for room in everyone if room.split("/")[0] == layer]
        lines += [f'    subgraph layer_{layer}["{layer}/"]']
        lines += [f'        {_id(room)}["{room}"]' for room in own]
        lines += ["    end"]
    for (one, other), lazy in sorted(arrows(root).items()):
        lines.append(f"    {_id(one)} {'-.->' if lazy else '-->'} {_id(other)}")
    lines += ["```", "", "| room | what it is for |", "|---|---|"]
    lines += [f"| `{room}` | {purpose(root, room)} |" for room in everyone]
    return "\n".join(lines) + "\n"


def _id(room: str) -> str:
    return room.replace("/", "_")


def drawn(root: Path) -> str:
    """The page with the figure in its place. Raises ValueError for a page without one."""
    text = (root / PAGE).read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{PAGE} has no lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{begin}\n{figure(root)}\n{end}{after}"


def main(options: list[str], root: Path = ROOT) -> int:
    page = root / PAGE
    if "--check" not in options:
        page.write_text(drawn(root), encoding="utf-8")
        return 0
    current = page.read_text(encoding="utf-8") == drawn(root)
    print("the map is that of the code" if current else f"{PAGE} is not up to date: run python .ci/map.py")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

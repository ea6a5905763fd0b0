"""What a survey found, in short and as docs/models.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import get_args

from llm42c.runtime.survey.cells import Cell
from llm42c.runtime.survey.mixing import Mixing
from llm42c.runtime.survey.pool import Surveyed, Wanted

BAD = ("wrong", "crash", "slow")
# Of the classes, so many must have eager rows that depend on their batch: else equal bits prove nothing.
MIN_REVEALING = 0.5
_PATHS = {"compile": "`torch.compile`", "generate": "`generate`"}
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
_INTRO = """\
# Models

This page is written by `llm42 survey --write docs/models.md`. The survey takes every class that transformers
itself maps to a causal language model, makes a tiny random model of it (at least two layers, one of each kind
that its default configuration has), and runs it in fp32 and bf16 through both doors:

- **`torch.compile`**: `torch.compile(model, backend="llm42", dynamic=True, options={"strict": True})`, so
  that a part without a known order is refused, where the default warns
- **`generate`**: `llm42c.deterministic(model).generate`

Each cell of the table is one of

- **ok**: every row has the same bits alone, in batches of other sizes, at other places and beside other rows
  (`generate`: of other lengths, padded); in fp32 all logits are within a bound of eager's (`generate`: of
  those that transformers' own `generate` computes), which follows from eps
- **refused**: llm42 says in one line what it cannot keep its promise for; the number is the reason below

The command ends with an error if a cell is anything else. A class counts as *softmax* if nothing but softmax
attention carries information from one token to another, as *recurrent or linear* if it has no softmax over
tokens, else as *hybrid*; this is found by replacing each softmax by "every token sees itself alone".
"""


def bad_cells(found: Iterable[Surveyed]) -> list[Cell]:
    """What must not be: wrong, crashed or slow."""
    return [cell for one in found for cell in one.cells if cell.state in BAD]


def share_revealing(found: Iterable[Surveyed]) -> float:
    """Share of the fp32 cells in which eager's rows depend on their batch."""
    cells = [cell for one in found for cell in one.cells if cell.dtype == "float32"]
    return sum(cell.revealing for cell in cells) / max(1, len(cells))


def shares(found: list[Surveyed], wanted: list[Wanted]) -> list[str]:
    """For each kind of mixing and path: how many classes are ok in every dtype asked for."""
    lines = []
    for kind in get_args(Mixing):
        group = [one for one in found if one.mixing == kind]
        if not group:
            continue
        parts = []
        for path in dict.fromkeys(path for _, path in wanted):
            ok = sum(all(c.state == "ok" for c in one.cells if c.path == path) for one in group)
            parts.append(f"{_PATHS[path]} {ok} of {len(group)} ({ok / len(group):.0%})")
        lines.append(f"{kind}: {', '.join(parts)}")
    return lines


def line(one: Surveyed) -> str:
    """A class in one line of plain text."""
    if not one.mixing:
        return f"{one.name}: not built: {one.unbuilt}"
    marks = [f"{_DTYPES[c.dtype]} {c.path} {c.state}{f' ({c.told})' if c.told else ''}" for c in one.cells]
    seconds = sum(c.seconds for c in one.cells)
    return f"{one.name} [{one.mixing}, {seconds:.0f} s]: {'; '.join(marks)}"


def _reason(cell: Cell) -> str:
    """The refusal without the name of the class."""
    return re.sub(rf"^{re.escape(cell.name)} is not supported: ", "", cell.told)


def _mark(cell: Cell, reasons: dict[str, int]) -> str:
    if cell.state == "ok":
        return "ok"
    number = reasons.setdefault(_reason(cell), len(reasons) + 1)
    return f"{cell.state} {number}"


def page(found: list[Surveyed], wanted: list[Wanted], versions: str, listed: int) -> str:
    """The whole of docs/models.md, for a survey of `found` out of `listed` classes."""
    reasons: dict[str, int] = {}
    built, unbuilt = [one for one in found if one.mixing], [one for one in found if not one.mixing]
    head = [f"{_PATHS[path]} {_DTYPES[dtype]}" for dtype, path in wanted]
    lines = [
        _INTRO,
        f"Surveyed here: {', '.join(head)}; {versions}.",
        f"Of {listed} classes in transformers, {len(found)} were tried; {len(built)} have a tiny model.",
        f"In fp32, {share_revealing(built):.0%} of them have rows whose bits depend on the batch in eager:",
        "there, equal bits mean something.",
        "",
        "Classes that are ok in every dtype surveyed here:",
        "",
        *(f"- {text}" for text in shares(built, wanted)),
        "",
        f"| class | token mixing | {' | '.join(head)} |",
        "|---|---|" + "---|" * len(head),
    ]
    for one in built:
        marks = {(c.dtype, c.path): _mark(c, reasons) for c in one.cells}
        lines.append(f"| `{one.name}` | {one.mixing} | {' | '.join(marks.get(key, '') for key in wanted)} |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "## No tiny model", "", "Classes that no tiny configuration builds, or that need more than"]
    lines += ["token ids, with what stands in the way:", ""]
    lines += [f"- `{one.name}`: {one.unbuilt}" for one in unbuilt]
    return "\n".join(lines) + "\n"


def states(text: str) -> dict[str, list[str]]:
    """The states in a written page, class by class."""
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", text, re.MULTILINE)
    return {name: [mark.split()[0] for mark in marks.split(" | ") if mark] for name, marks in rows}

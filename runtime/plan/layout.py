"""Where a quantity stands: its cell, its label, the head of its column, the headings above, its sentence.

A line is *structured* (a row of a table, a key and its value, a bullet) or part of a paragraph; lines of a
paragraph are read together, since sentences run over them.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field

from llm42c.runtime.plan.known import names
from llm42c.runtime.plan.text import Quantity, Text, cells

_KEY = re.compile(
    r"^\s*(?:[-*•+]\s+|\d+[.)]\s+)?(?P<key>[^:=.!?]{1,70}?)\s*(?::(?!\d)|=)\s*(?P<value>\S.*)?$"
)
_BULLET = re.compile(r"^\s*(?:[-*•+–]\s+|\d+[.)]\s+)")
_PAIR = re.compile(
    r"^(?![^,]*\d\s?[KMGT]i?[Bb])(?P<key>[A-Za-z][\w\s()/&-]{1,48}),(?!\d{3}\b)\s?(?P<value>\"[^\"]+\"|"
    r"[^,]{1,40})$"
)  # of a CSV file
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-ZÄÖÜ\"'(*<\[])|(?<=>)\s+|(?<=\))\s{2,}")
_CLAUSE = re.compile(
    r",(?!\d)|;|\(|\)|:(?!\d)|\s[-–—]\s|\b(?:and|und|with|while|whereas|plus|but|sowie|mit|"
    r"während|aber|including|alongside|"
    r"delivering|offering|providing|which|where)\b"
)


@dataclass(frozen=True)
class Place:
    """``left`` and ``right``: what of the quantity's own clause is before and behind it. ``before`` and
    ``after``: the other clauses of its sentence, the nearest first. ``headings``: the nearest first."""

    quantity: Quantity
    left: str
    right: str
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    label: str = ""
    column: str = ""
    headings: list[str] = field(default_factory=list)
    sentence: str = ""
    at: int = 0  # of the quantity in its sentence
    above: str = ""  # the line above a structured one
    beside: bool = False  # other cells of the row hold quantities of the same kind
    stacked: bool = False  # other rows of the table do, in the same place
    structured: bool = False

    @property
    def own(self) -> str:
        return f"{self.left} {self.quantity.shown} {self.right}"

    @property
    def parts(self) -> list[str]:
        """Every text that may say what the quantity is, the nearest first."""
        return [self.left, self.right, *self.before, self.label, self.column, *self.headings, *self.after]


def places(text: Text) -> list[Place]:
    """The place of every quantity, in order."""
    found: list[Place] = []
    number = 1
    while number <= len(text.lines):
        last = number
        if not structured(text, number):
            while last < len(text.lines) and not certainly(text.lines[last]):
                last += 1
            found.extend(_of_paragraph(text, number, last))
        else:
            found.extend(_of_row(text, number))
        number = last + 1
    return found


def structured(text: Text, number: int) -> bool:
    """Whether a line stands for itself."""
    line = text.lines[number - 1]
    stripped = line.strip()
    if certainly(line):
        return True
    return not re.search(r"[a-zäöüß]{2,}\W+(?:\w+\W+){3,}", stripped)  # short: a title, a label, a value


def certainly(line: str) -> bool:
    """Whether a line stands for itself wherever it is: a bullet, a row, a key and a value, a heading."""
    stripped = line.strip()
    if not stripped or _BULLET.match(line) or stripped.startswith("#"):
        return True
    if (
        re.search(r"\||<t\w|\s&\s.*\\\\", line)
        or "\t" in stripped
        or re.search(r"\S {2,}\S", line)
        or re.search(r"\.{3,}", line)
    ):
        return True
    if _PAIR.match(stripped):
        return True
    key = _KEY.match(line)
    return key is not None and len(key["key"].split()) <= 8 and len((key["value"] or "").split()) <= 12


# -- rows ----------------------------------------------------------------------------------------------------


def _of_row(text: Text, number: int) -> list[Place]:
    line, quantities = text.lines[number - 1], text.on(number)
    if not quantities:
        return []
    row = cells(line)
    headings = _headings(text, number)
    found = []
    for quantity in quantities:
        index = next((i for i, (_, end) in enumerate(row) if quantity.start < end), 0)
        start, end = row[index]
        key = _PAIR.match(line) or _KEY.match(line[start:end])
        label, inside = "", start
        if key is not None and key["value"] is not None and start + key.start("value") <= quantity.start:
            label, inside = key["key"].strip(), start + key.start("value")
        if index > 0:
            first = line[row[0][0] : row[0][1]].strip().rstrip(":")
            label = (
                f"{first} {label}".strip() if not _quantity_in(text, number, row[0]) or index == 1 else label
            )
        left, right, before, after = _clauses(line[inside:end], quantity, inside, quantities)
        if index > 1:  # other cells of the row that are no values
            before += [line[s:e].strip() for s, e in row[1:index] if not _quantity_in(text, number, (s, e))]
        found.append(
            Place(
                quantity,
                left,
                right,
                before,
                after,
                _BULLET.sub("", label),
                _column(text, number, row, index),
                headings,
                line.strip(),
                quantity.start - (len(line) - len(line.lstrip())),
                text.lines[number - 2] if number > 1 else "",
                any(q.kind == quantity.kind and not start <= q.start < end for q in quantities),
                _stacked(text, number, len(row), index, quantity),
                True,
            )
        )
    return found


def _quantity_in(text: Text, number: int, cell: tuple[int, int]) -> bool:
    return any(cell[0] <= q.start < cell[1] for q in text.on(number))


def _stacked(text: Text, number: int, width: int, index: int, quantity: Quantity) -> bool:
    for step in (-1, 1):
        other = number + step
        while 0 < other <= len(text.lines) and (there := cells(text.lines[other - 1])):
            if len(there) == width:
                start, end = there[index]
                if any(q.kind == quantity.kind and start <= q.start < end for q in text.on(other)):
                    return True
            elif not re.fullmatch(r"[\s|:+=-]+", text.lines[other - 1]):
                break
            other += step
    return False


def _of_names(line: str, quantities: list[Quantity]) -> bool:
    """Quantities that are parts of devices' names: "A100 80GB"."""
    spans = [(start, end) for start, end, _ in names(line)]
    return all(any(a <= q.start <= b + 1 for a, b in spans) for q in quantities)


def _column(text: Text, number: int, row: list[tuple[int, int]], index: int) -> str:
    """The cell in the same place of the table's first row, if that one has no quantities."""
    if len(row) < 2:
        return ""
    head = None
    for above in range(number - 1, 0, -1):
        line = text.lines[above - 1]
        if not line.strip():
            break
        there = cells(line)
        if re.fullmatch(r"[\s|:+=-]+", line):
            continue
        if len(there) < 2 or len(there) not in (len(row), len(row) - 1):
            break
        plain = not any(re.fullmatch(r"[\s\d.,*]+", line[start:end]) for start, end in there)
        if (plain and not text.on(above)) or (text.on(above) and _of_names(line, text.on(above))):
            head = above
    if head is None:
        return ""
    line, there = text.lines[head - 1], cells(text.lines[head - 1])
    shift = len(row) - len(there)  # a table whose corner is empty
    if shift and line[: there[0][1]].rstrip().rfind("  ") < row[0][0]:
        return ""
    place = index - shift
    if 0 <= place < len(there) and (place > 0 or shift):
        return line[there[place][0] : there[place][1]].strip()
    return ""


def _headings(text: Text, number: int) -> list[str]:
    """The lines above that hold it: by their indentation, else the one right above, and a title of a section.

    None of them has quantities.
    """
    line = text.lines[number - 1]
    indent = len(line) - len(line.lstrip())
    found: list[str] = []
    near = True
    for above in range(number - 1, 0, -1):
        other = text.lines[above - 1]
        if not other.strip():
            near = False
            continue
        depth = len(other) - len(other.lstrip())
        key = _KEY.match(other)
        plain = not text.on(above) and (key is None or key["value"] is None) and "|" not in other
        if depth < indent and plain:
            found.append(other.strip().rstrip(":"))
            indent = depth
        elif near and plain and above == number - 1 and len(other.split()) <= 8 and len(cells(other)) == 1:
            found.append(other.strip().rstrip(":"))
        elif plain and depth <= indent and re.match(r"^\s*(?:#+\s|==+|\[)|^[^.:]{3,50}:\s*$", other):
            found.append(other.strip(" #=[]:"))
            break
        near = near and plain is False
        if indent == 0 and number - above > 12:
            break
    return found


# -- prose ---------------------------------------------------------------------------------------------------


def _of_paragraph(text: Text, first: int, last: int) -> list[Place]:
    whole, offsets = "", {}
    for number in range(first, last + 1):
        offsets[number] = len(whole)
        whole += text.lines[number - 1] + " "
    found = []
    begin = 0
    headings = _headings(text, first)
    for stop in [*(m.start() for m in _SENTENCE.finditer(whole)), len(whole)]:
        sentence = whole[begin:stop]
        inside = [
            (q, offsets[q.line] + q.start - begin)
            for number in range(first, last + 1)
            for q in text.on(number)
            if begin <= offsets[q.line] + q.start < stop
        ]
        for quantity, at in inside:
            left, right, before, after = _clauses_at(sentence, at, at + quantity.end - quantity.start, inside)
            found.append(Place(quantity, left, right, before, after, "", "", headings, sentence.strip(), at))
        begin = stop
    return found


def _clauses(
    cell: str, quantity: Quantity, offset: int, quantities: list[Quantity]
) -> tuple[str, str, list[str], list[str]]:
    inside = [(q, q.start - offset) for q in quantities if 0 <= q.start - offset < len(cell)]
    at = quantity.start - offset
    return _clauses_at(cell, at, at + quantity.end - quantity.start, inside)


def _clauses_at(
    sentence: str, start: int, end: int, inside: list[tuple[Quantity, int]]
) -> tuple[str, str, list[str], list[str]]:
    """(left, right, clauses before, clauses after) of what stands at ``start`` to ``end``."""
    cuts = [0, len(sentence)]
    for cut in _CLAUSE.finditer(sentence):
        within = any(at <= cut.start() < at + q.end - q.start for q, at in inside)
        if not within:
            cuts += [cut.start(), cut.end()]
    cuts.sort()
    low = begin = max(c for c in cuts if c <= start)
    high = min(c for c in cuts if c >= end)
    for q, at in inside:  # another quantity of the same clause
        if low < at + q.end - q.start <= start:
            low = at + q.end - q.start
        if end <= at < high:
            high = at
    pieces = [(a, b) for a, b in itertools.pairwise(cuts) if sentence[a:b].strip(" ,;:().")]
    own = [sentence[begin:low]] if low > begin else []
    before = own + [sentence[a:b] for a, b in reversed(pieces) if b <= low]
    after = [sentence[a:b] for a, b in pieces if a >= high]
    return sentence[low:start], sentence[end:high], before, after

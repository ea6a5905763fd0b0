"""Which device a quantity is said of, where a text names several."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm42c.runtime.plan.known import Known, names
from llm42c.runtime.plan.layout import Place
from llm42c.runtime.plan.text import Text, cells

UNCLEAR = "unclear"
_PRODUCT = re.compile(
    r"\s*(?:product name|device|model name|gpu name|name|produkt\w*|gerät)\b.*[:=|\t]", re.I
)
_CARRIES_ON = re.compile(
    r"^\W*(?:it|its|this|these|the (?:card|chip|gpu|part|accelerator|device)|er|sie|es|sein\w*|"
    r"die karte)\b",
    re.I,
)


@dataclass(frozen=True)
class Owners:
    """``subject``: the device that the text is about, if it is a known one. ``of``: of each place, the known
    device that it is said of, None for the subject, UNCLEAR where two may be meant."""

    subject: Known | None
    of: list[Known | str | None]


def owners(text: Text, places: list[Place]) -> Owners:
    """Of every place."""
    named = [
        (number, known) for number, line in enumerate(text.lines, start=1) for _, _, known in names(line)
    ]
    if not named:
        return Owners(None, [None] * len(places))
    subject = _subject(text, named)
    if subject is not None:
        subject = _particular(subject, [known for _, known in named])
    return Owners(subject, [_owner(text, place, subject) for place in places])


_BESIDES = re.compile(
    r"\b(?:unlike|than|compared (?:to|with)|vs\.?|versus|from|predecessor\w*|success(?:or|"
    r"ion) (?:of|to)|succeeds|replac\w+|like|over|beats?|"
    r"outperforms?|rival\w*|against|instead of|gegenüber|als|statt|Vorgänger\w*|Nachfolger\w*|"
    r"anders als|in contrast to|where(?:as)?|while)\W+"
    r"(?:the |an? |its |der |die |das |dem |einer? |NVIDIA(?:'s)? |AMD |Google |Intel |older |"
    r"previous |predecessor,? )*$",
    re.I,
)


def _subject(text: Text, named: list[tuple[int, Known]]) -> Known | None:
    """What a line like "Product Name" says, else the one that the first lines name. A device that others are
    compared with is no subject, nor is one that the text comes to later: it may be about another."""
    for number, known in named:
        if _PRODUCT.match(text.lines[number - 1]):
            return known
    first = next(number for number, line in enumerate(text.lines, start=1) if line.strip())
    plain: list[tuple[int, Known]] = []
    for number in dict.fromkeys(n for n, _ in named):
        line = text.lines[number - 1]
        before = text.lines[number - 2] + " " if number > 1 else ""
        for start, _, known in names(line):
            ahead = " ".join([*text.lines[first - 1 : number - 1], line[:start]])
            if not _BESIDES.search(before + line[:start]) and not re.search(r"[a-z][.!?]\s", ahead):
                plain.append((number, known))
    for number, known in plain:
        if number <= first + 1 or not any(text.on(n) for n in range(first, number)):
            return known
    return None


def _particular(subject: Known, named: list[Known]) -> Known:
    """The one variant that a text names besides its family: "H100", and later "H100 SXM"."""
    if subject.units or subject.table:
        return subject
    variants = {k.name: k for k in named if k.family == subject.family and k.name != subject.name}
    return next(iter(variants.values())) if len(variants) == 1 else subject


def same(a: Known, b: Known) -> bool:
    """Whether two names may mean one device: a family's name is that of each of its variants."""
    return a.family == b.family and (
        a.name == b.name or a.name.endswith(a.family) or b.name.endswith(b.family)
    )


def _owner(text: Text, place: Place, subject: Known | None) -> Known | str | None:
    found = _in_row(place) if place.structured else _in_sentence(place)
    if found is None and not place.structured:
        found = _carried(text, place)
    if found is None:
        found = _above(text, place)
    if found is None or found == UNCLEAR:
        return found
    assert isinstance(found, Known)
    return None if subject is not None and same(found, subject) else found


def _only(text: str) -> Known | str | None:
    found = {known.name: known for _, _, known in names(text)}
    if len(found) > 1:
        first = next(iter(found.values()))
        if all(same(first, k) for k in found.values()):
            return first
        return UNCLEAR
    return next(iter(found.values()), None)


def _in_row(place: Place) -> Known | str | None:
    for part in (f"{place.left} {place.quantity.shown} {place.right}", place.column, place.label):
        found = _only(part)
        if found is not None:
            return found
    before = _only(" ".join(place.before[:1]))
    return before if before is not None else _only(place.sentence)


def _in_sentence(place: Place) -> Known | str | None:
    """The clause's own name; else the nearest to the left, else to the right in the clause behind."""
    own = _only(f"{place.left} {place.right}")
    if own is not None:
        return own
    left = names(place.sentence[: place.at])
    if left:
        return left[-1][2]
    return (
        _only(place.after[0])
        if place.after and re.match(r"\s*(?:on|for|of|in) the\b", place.after[0])
        else None
    )


def _carried(text: Text, place: Place) -> Known | str | None:
    """A sentence that begins with "it" is about what the one before names."""
    if not _CARRIES_ON.match(place.sentence):
        return None
    for number in range(place.quantity.line, max(0, place.quantity.line - 4), -1):
        line = text.lines[number - 1]
        before = line[: place.quantity.start] if number == place.quantity.line else line
        found = _only(before)
        if found is not None:
            return found
    return None


def _above(text: Text, place: Place) -> Known | str | None:
    """A heading: the nearest short line above that names devices and has no quantities."""
    for number in range(place.quantity.line - 1, 0, -1):
        line = text.lines[number - 1]
        if not line.strip() or len(line.split()) > 10 or re.search(r"[.!?]\s*$", line):
            continue
        found = _only(line)
        if found is None or (text.on(number) and not _is_title(line)):
            continue
        if found == UNCLEAR and len(cells(line)) > 2:
            continue  # the head of a table, whose columns say it
        return found
    return None


def _is_title(line: str) -> bool:
    """A quantity that is part of a name: "NVIDIA A100 80GB"."""
    return len(line.split()) <= 7 and ":" not in line

"""Every quantity of a text, with the place where it stands. Nothing here knows what a quantity is of.

A number and the unit behind it make a quantity; a number alone makes one where the label of its line, or the
head of its column, names the unit. Whether ``1,979`` is two thousand or two is decided for the text as a
whole: by the numbers in it that can be read in one way only, and by its language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from llm42c.runtime.plan import units
from llm42c.runtime.plan.units import Kind, Unit

Style = Literal["point", "comma", "mixed"]  # of decimals

_GROUP = "\u00a0\u202f\u2009'’"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-−–]|(?<=\s)\+)?(?P<digits>\d+(?:[.,{_GROUP}]\d+)*)"
    r"(?P<exponent>(?:[eE]\+?|\s?[×x·]\s?10\^)(?P<power>\d{1,2}))?"
)
_GERMAN = re.compile(
    r"\b(?:und|der|die|das|mit|von|Speicher\w*|Bandbreite|Rechenleistung|Takt\w*|Kerne|Leistungsaufnahme|"
    r"Datenblatt|Grafikspeicher|Rechenwerke|pro|je|beträgt|Verlustleistung|Arbeitsspeicher|Schnittstelle)\b"
)


@dataclass(frozen=True)
class Quantity:
    """``value`` in the base unit of ``kind``; ``line`` from 1, ``start`` and ``end`` characters of the line.

    ``half_step``: half a unit of the last digit that was written, in the same unit. ``why_not``: what makes
    the number itself unreadable.
    """

    value: float
    kind: Kind
    unit: Unit | None
    shown: str
    line: int
    start: int
    end: int
    half_step: float
    digits: int
    why_not: str = ""
    partner: float | None = None  # of "a / b": the other one
    mark: str = ""  # of a footnote

    @property
    def span(self) -> str:
        return f"{self.line}:{self.start + 1}-{self.end}"


@dataclass(frozen=True)
class Text:
    """A text, its lines and its quantities, in the order in which they stand."""

    name: str
    lines: list[str]
    style: Style
    quantities: list[Quantity] = field(default_factory=list)

    def on(self, line: int) -> list[Quantity]:
        return [q for q in self.quantities if q.line == line]


def read(name: str, content: str) -> Text:
    """The quantities of ``content``."""
    lines = [line.rstrip("\n") for line in content.replace("\r\n", "\n").split("\n")]
    style = _style(content)
    text = Text(name, lines, style)
    for number, line in enumerate(lines, start=1):
        found = list(_quantities(line, number, style))
        text.quantities.extend(found or _bare(lines, number, style))
    return text


# -- numbers -------------------------------------------------------------------------------------------------


def _style(content: str) -> Style:
    """How the text writes decimals: by its unambiguous numbers, else by its language."""
    point = comma = False
    for found in _NUMBER.finditer(content):
        digits = found["digits"]
        unit = units.match(content, _behind(content, found.end()))
        if unit is None:
            continue
        point |= bool(
            re.fullmatch(r"\d{1,3}(,\d{3})+\.\d+|\d+\.(\d{1,2}|\d{4,})|0\.\d+|\d{1,3}(,\d{3}){2,}", digits)
        )
        comma |= bool(
            re.fullmatch(r"\d{1,3}(\.\d{3})+,\d+|\d+,(\d{1,2}|\d{4,})|0,\d+|\d{1,3}(\.\d{3}){2,}", digits)
        )
    german = len(set(_GERMAN.findall(content))) >= 2 or bool(re.search(r"[Ss]peicher|[Bb]andbreite", content))
    if point and comma:
        return "mixed"
    if comma:
        return "comma" if german else "mixed"
    if german and not point:
        return "comma"
    return "point"


def _number(digits: str, style: Style) -> tuple[float, int, float, str]:
    """(value, digits written, half a unit of the last one, why it cannot be read)."""
    plain = re.sub(rf"[{_GROUP}]", "", digits)
    if re.search(rf"[{_GROUP}]", digits) and not re.fullmatch(
        rf"\d{{1,3}}([{_GROUP}]\d{{3}})+([.,]\d+)?", digits
    ):
        return 0.0, 0, 0.0, "its digits are not in groups of three"
    if not re.search(r"[.,]", plain):
        return float(plain), len(plain.lstrip("0")), 0.5, ""
    decimal, group = (".", ",") if style != "comma" else (",", ".")
    if style == "mixed":
        return 0.0, 0, 0.0, "the text writes decimals with a point and with a comma"
    whole, found, fraction = plain.partition(decimal)
    if decimal in fraction or group in fraction:
        return 0.0, 0, 0.0, f"it is no number where decimals are written with {decimal!r}"
    if group in whole and not re.fullmatch(rf"\d{{1,3}}({re.escape(group)}\d{{3}})+", whole):
        return 0.0, 0, 0.0, f"it is no number where decimals are written with {decimal!r}"
    whole = whole.replace(group, "")
    value = float(f"{whole}.{fraction}" if found else whole)
    return value, len((whole + fraction).lstrip("0")), 0.5 * 10.0 ** -len(fraction), ""


# -- quantities ----------------------------------------------------------------------------------------------


def _behind(text: str, at: int) -> int:
    """Where a unit may begin: behind a space, or a footnote's mark."""
    while at < len(text) and (text[at] in " \u00a0\u202f\u2009" or text.startswith("\\,", at)):
        at += 2 if text[at] == "\\" else 1
    return at


_MARK = re.compile(r"\s?(?P<mark>\*{1,3}|[†‡§]{1,2}|[¹²³⁴⁵⁶⁷⁸⁹]|\[\d{1,2}\]|\(\d\)|\^\d)")


def _quantities(line: str, number: int, style: Style) -> Iterator[Quantity]:
    last_end = 0
    for found in _NUMBER.finditer(line):
        if found.start() < last_end:
            continue
        at = found.end()
        mark = ""
        if (sign := _MARK.match(line, at)) is not None:
            mark, at = sign["mark"], sign.end()
        matched = units.match(line, _behind(line, at))
        if matched is None and (sign is not None):
            matched = units.match(line, _behind(line, found.end()))
        if matched is None:
            continue
        unit, end = matched
        if (sign := _MARK.match(line, end)) is not None and not mark:
            mark, end = sign["mark"], sign.end()
        value, digits, half, why = _number(found["digits"], style)
        if found["exponent"]:
            power = 10.0 ** int(found["power"])
            value, half = value * power, half * power
        why = why or _sign(line, found) or _neighbour(line, found) or _goes_on(line, end, unit)
        partner = _partner(line, found, style)
        start = found.start() if not found["sign"] else found.start() + 1
        if why.startswith("negative"):
            start = found.start()
        last_end = end
        yield Quantity(
            _exact(value, unit.scale),
            unit.kind,
            unit,
            line[start:end].strip(),
            number,
            start,
            end,
            half * unit.scale,
            digits,
            why,
            None if partner is None else _exact(partner, unit.scale),
            mark,
        )


# -- numbers whose unit stands elsewhere ---------------------------------------------------------------------

SEPARATORS = r"\|+|!!|</?t\w[^>]{0,40}>|\s&\s|\t+| {2,}|\.{3,}|;(?=\s|$)"  # of cells
_CELL = re.compile(SEPARATORS)
_KEYED = re.compile(rf"{SEPARATORS}|(?<=[\w)\]]):(?=\s)|=")
_BARE = re.compile(rf"^\s*(?P<digits>\d+(?:[.,{_GROUP}]\d+)*)\s*(?P<mark>\*{{1,3}}|[†‡§¹²³⁴⁵⁶⁷⁸⁹])?\s*$")
_UNIT_IN = re.compile(
    r"[(\[]\s*(?P<in>[^()\[\]]{1,14}?)\s*[)\]]\s*$|[\s,]\s*(?:in\s+)?(?P<last>[^\s(),]{1,14})\s*$"
)


def cells(line: str, between: re.Pattern[str] = _CELL) -> list[tuple[int, int]]:
    """Where the cells of a row begin and end."""
    found, start = [], 0
    for separator in [*between.finditer(line), None]:
        end = len(line) if separator is None else separator.start()
        if line[start:end].strip():
            found.append((start, end))
        start = end if separator is None else separator.end()
    return found


def _bare(lines: list[str], number: int, style: Style) -> Iterator[Quantity]:
    """Cells that are numbers alone: their unit is the next cell, or stands in the label or the column's
    head."""
    line = lines[number - 1]
    row = cells(line, _KEYED)
    numbers = [(i, m) for i, (a, b) in enumerate(row) if i and (m := _BARE.match(line[a:b])) is not None]
    if not numbers:
        return
    values = [_number(m["digits"], style) for _, m in numbers]
    label = line[slice(*row[0])]
    for (i, found), (value, digits, half, why) in zip(numbers, values, strict=True):
        unit = _alone(line[slice(*row[i + 1])]) if i + 1 < len(row) else None
        unit = unit or _named_unit(label) or _head_unit(lines, number, len(row), i)
        if unit is None or unit.kind in ("width", "frequency"):
            continue
        others = [v[0] for (j, _), v in zip(numbers, values, strict=True) if j != i and not v[3]]
        pair = others[0] if len(others) == 1 and _named_unit(label) is not None else None
        start = row[i][0] + found.start("digits")
        end = row[i][0] + (found.end("mark") if found["mark"] else found.end("digits"))
        yield Quantity(
            _exact(value, unit.scale),
            unit.kind,
            unit,
            line[start:end],
            number,
            start,
            end,
            half * unit.scale,
            digits,
            why,
            None if pair is None else _exact(pair, unit.scale),
            found["mark"] or "",
        )


def _alone(text: str) -> Unit | None:
    """A text that is a unit and nothing else."""
    stripped = text.strip()
    if stripped == "B":
        return Unit("bytes", 1.0, "B")
    found = units.match(stripped, 0) if stripped else None
    return found[0] if found is not None and found[1] == len(stripped) else None


def _named_unit(label: str) -> Unit | None:
    """The unit that a label ends with: "memory bandwidth (GB/s)", "TDP, W"."""
    found = _UNIT_IN.search(label.strip().rstrip(":"))
    named = None if found is None else _alone(found["in"] or found["last"] or "")
    if named is not None:
        return named
    words = [unit for word in label.split() if (unit := _alone(word.strip("()[],:"))) is not None]
    return words[0] if len(words) == 1 else None


def _head_unit(lines: list[str], number: int, width: int, place: int) -> Unit | None:
    """The unit in the head of a column: of the nearest row above that has as many cells and no numbers."""
    for above in range(number - 1, 0, -1):
        line = lines[above - 1]
        there = cells(line, _KEYED)
        if not line.strip():
            return None
        if re.fullmatch(r"[\s|:+=-]+", line):
            continue
        if len(there) != width:
            return None
        if not any(_BARE.match(line[a:b]) for a, b in there):
            return _named_unit(line[slice(*there[place])]) or _alone(line[slice(*there[place])])
    return None


def _exact(number: float, scale: float) -> float:
    """The decimal number that was written, times ``scale``, rounded once."""
    return float(Fraction(str(number)) * Fraction(scale))


def _sign(line: str, found: re.Match[str]) -> str:
    if not found["sign"] or found["sign"] == "+":
        return ""
    before = line[: found.start()].rstrip()
    if before and before[-1].isdigit():
        return "one end of a range"
    if re.search(r"[\dA-Za-z]\s?$", line[: found.start()]) and line[: found.start()] == before:
        return ""  # a hyphen: "up-5 GB"
    return "negative"


def _neighbour(line: str, found: re.Match[str]) -> str:
    """A number to the left that belongs to this one."""
    before = line[: found.start()]
    if re.search(r"(?<![\w.,])\d{1,3} $", before) and re.fullmatch(r"\d{3}([.,]\d+)?", found["digits"]):
        return "the number before it may be part of it"
    if re.search(r"\d\s?(?:[A-Za-z/]{0,6}\s?)?(?:-|–|—|to|bis|\.\.\.?|…)\s?$", before):
        return "one end of a range"
    if re.search(
        r"\b(?:between|from|zwischen|von)\s+[\d.,]+\s?[A-Za-z/]{0,6}\s+(?:and|to|und|bis)\s+$", before
    ):
        return "one end of a range"
    if re.search(r"\d\s?[×x]\s?$", before):
        return "one factor of a product"
    return ""


def _goes_on(line: str, end: int, unit: Unit) -> str:
    """A range whose other end follows: "15 W - 60 W"."""
    other = re.match(r"\s?(?:-|–|—|to|bis|\.\.)\s?\d+(?:[.,]\d+)*", line[end:])
    if other is None:
        return ""
    following = units.match(line, _behind(line, end + other.end()))
    return "one end of a range" if following is not None and following[0].kind == unit.kind else ""


def _partner(line: str, found: re.Match[str], style: Style) -> float | None:
    """The number in front of a slash: "989 / 1,979 TFLOPS"."""
    before = re.search(r"(?<![\w.,/])(\d+(?:[.,]\d+)*)\s?[*†‡¹²³]?\s?[/|]\s?$", line[: found.start()])
    if before is None:
        return None
    value, _, _, why = _number(before[1], style)
    return None if why else value

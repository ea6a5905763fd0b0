"""What a number means in the unit of a feature: dense operations, one direction of a link, bytes.

Every change is a sentence that is kept with the value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from llm42c.runtime.plan.layout import Place
from llm42c.runtime.plan.text import Text

Said = Literal["yes", "no", "unsaid", "unclear"]
_DENSE = re.compile(
    r"\bdense\b|\b(?:without|w/o|no|non|excluding|not including|ohne|disregarding)[\s-](?:any |"
    r"structured |2:4 |strukturierte )*(?:sparsity|sparse\w*|Sparsity|Sparsität)|"
    r"\bnon-?sparse\b|\bdicht(?:besetzt)?\b|sparsity (?:off|disabled)",
    re.I,
)
_SPARSE = re.compile(r"spars|2:4|dünn besetzt|dünnbesetzt", re.I)
_HALF = re.compile(r"(?:1/2|½|one[- ]half|half|50 ?%|halbe|hälfte|halb)\b", re.I)
_FIGURES = re.compile(
    r"\b(?:figures?|numbers?|values?|specs?|specifications?|performance|ratings?|throughputs?|"
    r"rates?|TFLOPS|FLOPS|results|Angaben|Werte|Zahlen|"
    r"Leistungsdaten|Leistungsangaben|peak)\b",
    re.I,
)
_BOTH = re.compile(
    r"bi-?directional\w*|both directions|two directions|duplex|total|aggregate\w*|bi-?dir\w*|"
    r"beide\w* Richtungen|bidirektional\w*|in\+out|"
    r"combined|in and out|insgesamt|read and write|gesamt\w*|Tx ?\+ ?Rx|send(?:ing)? and receiv\w+",
    re.I,
)
_ONE = re.compile(
    r"(?:per|each|one|single|in each|a|pro|je|in jede|in eine) direction|uni-?directional\w*|"
    r"one[- ]way|(?:pro|je|jede|eine) Richtung|"
    r"(?:jede|eine|einer|jeder) Richtung|unidirektional\w*|each way|/direction|per-direction|"
    r"/dir\b|per dir\b",
    re.I,
)
_SUPERSCRIPT = {"¹": "1", "²": "2", "³": "3", "⁴": "4", "⁵": "5", "⁶": "6", "⁷": "7", "⁸": "8", "⁹": "9"}
_LABEL_MARK = re.compile(
    r"(?P<mark>\*{1,3}|[†‡§]{1,2}|[¹²³⁴⁵⁶⁷⁸⁹]|\[\d{1,2}\]|\(\d\)|\^\d)\s*(?:\(.*\))?\s*$"
)


@dataclass(frozen=True)
class Meaning:
    """``value`` and how it came of the number; ``why_not``: it cannot be said."""

    value: float
    reasons: tuple[str, ...] = ()
    why_not: str = ""
    said: Said = "unsaid"  # sparse, or both directions


def footnote(text: Text, place: Place) -> tuple[int, str] | None:
    """The line of the footnote that the quantity or its label is marked with, and what it says."""
    marks = [place.quantity.mark]
    before = text.lines[place.quantity.line - 1][: place.quantity.start]
    for part in (before, place.label, place.column, *place.headings[:1]):
        found = _LABEL_MARK.search(part)
        marks.append("" if found is None else found["mark"])
    for mark in filter(None, marks):
        number = _SUPERSCRIPT.get(mark, mark.strip("[]()^"))
        if number.isdigit():
            begins = (
                rf"^\s*(?:\[{number}\]|\({number}\)|{number}[.):]?\s|\^{number}|"
                rf"{mark if mark in _SUPERSCRIPT else number + ' '})\s*"
            )
        else:
            begins = rf"^\s*\(?{re.escape(mark)}(?!\*)\)?\s*"
        for at, line in enumerate(text.lines, start=1):
            head = re.match(begins, line)
            if head is not None and at != place.quantity.line and not (number.isdigit() and text.on(at)):
                return at, " ".join(part.strip() for part in [line, *_rest(text, at)])
    return None


def _rest(text: Text, at: int) -> list[str]:
    """The line behind a footnote's first, if that one does not end its sentence."""
    if at < len(text.lines) and not re.search(r"[.)]\s*$", text.lines[at - 1]):
        following = text.lines[at]
        if following.strip() and not re.match(r"^\s*(?:[*†‡§¹²³]|\d[.)]|\[)", following):
            return [following]
    return []


def _says_sparse(words: str) -> Said:
    dense = bool(_DENSE.search(words))
    sparse = bool(_SPARSE.search(_DENSE.sub(" ", words)))
    if dense and sparse:
        return "yes" if _HALF.search(words) or re.search(r"lower|less", words) else "unclear"
    return "yes" if sparse else "no" if dense else "unsaid"


def operations(text: Text, place: Place) -> Meaning:
    """Dense operations a second."""
    quantity = place.quantity
    if quantity.partner is not None:
        low, high = sorted((quantity.value, quantity.partner))
        if quantity.value == quantity.partner:
            return Meaning(low)
        if abs(high / low - 2.0) < 0.03:
            return Meaning(
                low,
                ("the smaller of two numbers, of which one is twice the other: dense, and sparse",),
                said="no",
            )
        return Meaning(quantity.value, why_not="two numbers stand here, and which one is meant is not said")
    after = [a for a in place.after[:1] if not re.search(r"\d", re.sub(r"2:4|2 : 4", "", a))]
    before = [b for b in place.before[:1] if not re.search(r"\d", re.sub(r"2:4|FP\d+|BF16|INT8|TF32", "", b))]
    for words, where in (
        (f"{place.left} {place.right}", "its own words"),
        (" ".join(after), "its own words"),
        (" ".join(before), "its own words"),
        (place.label, "its label"),
        (place.column, "its column"),
    ):
        said = _says_sparse(words)
        if said != "unsaid":
            return _halved(quantity.value, said, where)
    note = footnote(text, place)
    if note is not None and (said := _says_sparse(note[1])) != "unsaid":
        return _halved(quantity.value, said, f"the footnote in line {note[0]}")
    for heading in place.headings[:2]:
        if (said := _says_sparse(heading)) != "unsaid":
            return _halved(quantity.value, said, "its heading")
    return _by_document(text, place)


def _halved(value: float, said: Said, where: str) -> Meaning:
    if said == "yes":
        return Meaning(value / 2, (f"halved: {where} says sparse",), said="yes")
    if said == "no":
        return Meaning(value, (f"{where} says dense",), said="no")
    return Meaning(value, why_not="sparse or dense: its words say both", said="unclear")


def _by_document(text: Text, place: Place) -> Meaning:
    """A sentence about all figures; a mention of sparsity that is about none of them leaves it unclear."""
    mentions = [(i, line) for i, line in enumerate(text.lines, start=1) if _SPARSE.search(line)]
    for i, line in mentions:
        if re.match(r"^\s*(?:[*†‡§¹²³]|\[\d|\(\d|\d[.)]\s)", line) and not re.match(
            r"^\s*\*\s?(?:all|performance)", line, re.I
        ):
            continue  # a footnote, whose mark this quantity does not bear
        if text.on(i) and any(q.kind == "operations" for q in text.on(i)):
            continue  # of that line's own quantities
        said = _says_sparse(line)
        if _FIGURES.search(line) and said in ("yes", "no"):
            return _halved(place.quantity.value, said, f"line {i}")
    others = [i for i, line in mentions if not any(q.kind == "operations" for q in text.on(i))]
    if others and not any(re.match(r"^\s*(?:[*†‡§¹²³]|\[\d|\(\d)", text.lines[i - 1]) for i in others):
        return Meaning(place.quantity.value, (), "", "unclear")
    return Meaning(place.quantity.value)


def link(text: Text, place: Place) -> Meaning:
    """One direction of a link. ``said`` is "yes" for a number of both."""
    quantity = place.quantity
    after = [a for a in place.after[:1] if not re.search(r"\d", a)]
    note = footnote(text, place)
    for words in (
        f"{place.left} {place.right}",
        *after,
        place.label,
        place.column,
        note[1] if note else "",
        *place.headings[:1],
    ):
        one, both = bool(_ONE.search(words)), bool(_BOTH.search(_ONE.sub(" ", words)))
        if one and both:
            return Meaning(
                quantity.value, why_not="one direction or both: its words say both", said="unclear"
            )
        if one:
            return Meaning(quantity.value, ("one direction, as it says",), said="no")
        if both:
            return Meaning(quantity.value / 2, ("halved: it is of both directions",), said="yes")
    return Meaning(quantity.value)


def capacity(place: Place) -> Meaning:
    """Bytes; of ``/proc/meminfo``, whose kB are KiB."""
    quantity = place.quantity
    if re.match(r"MemTotal", place.label):
        return Meaning(quantity.value / 1000 * 1024, ("kB of /proc/meminfo are 1024 bytes",))
    if quantity.unit is not None and quantity.unit.binary:
        return Meaning(quantity.value, (f"{quantity.unit.text} are powers of 1024",))
    return Meaning(quantity.value)


_LANE = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # bytes a second, one direction
_GENERATION = re.compile(
    r"PCI-?e?(?:xpress)?[\s-]*(?:Gen(?:eration)?\.?[\s-]*)?(\d)(?:\.0)?\b|"
    r"Gen[\s-]?(\d)(?=.{0,12}PCI)|PCIe.{0,12}?Gen[\s-]?(\d)",
    re.I,
)
_LANES = re.compile(r"[x×]\s?(\d{1,2})\b|(\d{1,2})\s?(?:lanes|x lanes)", re.I)


def pcie(text: Text, place: Place) -> Meaning:
    """One direction of PCIe: by its words, and by what its generation and lanes carry."""
    said = link(text, place)
    around = " ".join([place.sentence, place.label, *place.headings[:1]])
    generation, lanes = _GENERATION.search(around), _LANES.search(around)
    if generation is None:
        return (
            said
            if said.said != "unsaid"
            else Meaning(said.value, why_not="one direction or both is not said")
        )
    number = int(next(g for g in generation.groups() if g))
    width = 16 if lanes is None else int(lanes[1] or lanes[2])
    carries = _LANE.get(number, 0.0) * width
    for factor, reason in ((1.0, "one direction"), (2.0, "halved: both directions")):
        if carries and abs(place.quantity.value / (factor * carries) - 1.0) < 0.04:
            if said.said == ("yes" if factor == 1.0 else "no"):
                break
            return Meaning(
                place.quantity.value / factor,
                (f"{reason}, as {width} lanes of PCIe {number} carry",),
                said="no",
            )
    return Meaning(
        place.quantity.value, why_not=f"{width} lanes of PCIe {number} carry {carries / 1e9:.3g} GB/s"
    )


_NVLINK_TOTALS = {2: 300e9, 3: 600e9, 4: 900e9, 5: 1800e9}
_ORDINALS = {"second": 2, "third": 3, "fourth": 4, "fifth": 5, "2nd": 2, "3rd": 3, "4th": 4, "5th": 5}
_NVLINK = re.compile(
    r"NVLink[\s-]*(?:Gen(?:eration)?[\s-]*)?v?(?P<n>[2-5])(?:\.0)?\b|(?P<word>second|third|fourth|"
    r"fifth|2nd|3rd|4th|5th)[\s-]gen(?:eration)?\W+(?:NVIDIA\W+)?NVLink",
    re.I,
)


def nvlink(place: Place) -> Meaning | None:
    """A number that is the sum of both directions of its generation of NVLink; None for any other."""
    found = _NVLINK.search(" ".join([place.sentence, place.label, *place.headings[:1]]))
    if found is None:
        return None
    number = int(found["n"]) if found["n"] else _ORDINALS[found["word"].lower()]
    if abs(place.quantity.value / _NVLINK_TOTALS[number] - 1.0) < 0.01:
        return Meaning(
            place.quantity.value / 2,
            (f"halved: all links of NVLink {number} carry that in both directions",),
            said="yes",
        )
    return None

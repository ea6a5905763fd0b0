"""Why a quantity that carries a label is not taken all the same: what the sentence says of it besides."""

from __future__ import annotations

import re

from llm42c.runtime.plan.labels import named
from llm42c.runtime.plan.layout import Place

_INSTRUCTION = re.compile(
    r"\b(?:ignore|disregard|forget)\b.{0,40}\b(?:previous|prior|above|all|earlier|instruction\w*|rules)\b|"
    r"\b(?:system prompt|as an ai|dear (?:model|assistant|ai|reader)|answer accordingly|"
    r"from now on|admin\w*|assistant:|user:|you (?:must|should|are|will)|"
    r"(?:please )?(?:report|output|respond|answer|"
    r"return|print|say|pretend|assume|set|override|use|treat|consider|"
    r"regard)\b.{0,60}\b(?:instead|as the|value|"
    r"bandwidth|TB/s|GB/s))|"
    r"\b(?:ignoriere|vergiss|melde|antworte|gib\b.{0,30}\baus)\b|<\|?\w*(?:system|im_start|"
    r"inst)\w*\|?>|\[INST\]",
    re.I,
)
_COMPARED = re.compile(
    r"\b(?:up from|compared (?:to|with)|versus|vs\.?|than|rather than|instead of|unlike|"
    r"predecessor\w*|previous[- ]gen\w*|"
    r"prior[- ]gen\w*|last[- ]gen\w*|older|earlier generation|predecessor's|Vorgänger\w*|"
    r"gegenüber|statt|im Vergleich|"
    r"had|offered|featured|hatten?|bot|besaß|competitor\w*|competing|rival|formerly|used to|originally)\b",
    re.I,
)
_OLDER = re.compile(
    r"\b(?:predecessor\w*|previous|prior|older|earlier|last[- ]gen\w*|Vorgänger\w*|competitor\w*|"
    r"rival\w*)\b",
    re.I,
)
_BEGINS = re.compile(
    r"\W*(?:unlike|compared|whereas|while|where|anders als|im vergleich|gegenüber|contrary)\b", re.I
)
_HYPOTHETICAL = re.compile(
    r"\b(?:would|could|might|may|rumou?red|rumou?rs?|leak\w*|expected|planned|future|upcoming|"
    r"next[- ]gen\w*|projected|target(?:s|ed)?\b(?= )|"
    r"goal|hoped|unconfirmed|not (?:yet )?(?:final|confirmed)|preliminary|overclock\w*|estimat\w+|"
    r"speculat\w+|"
    r"if (?:it|you|we|the)|will (?:have|reach|offer|provide|deliver|feature|come|bring|carry|use|double)|"
    r"wird (?:es )?(?:haben|bieten)|"
    r"successor|roadmap|soll\b|angeblich|geplant|voraussichtlich|prototype|engineering sample)\b",
    re.I,
)
_NEGATED = re.compile(
    r"\b(?:not|never|no longer|cannot|isn't|doesn't|does not|wrong(?:ly)?|incorrect\w*|mistak\w+|"
    r"erroneous\w*|typo|myth|falsely|"
    r"misprint\w*|nicht|kein\w*|falsch\w*|fälschlich\w*|misreport\w*|disputed|debunked|erratum)\b",
    re.I,
)
_MEASURED = re.compile(
    r"\b(?:measured|achiev\w+|observed|sustain\w+|in practice|real[- ]world|average|STREAM|benchmark\w*|"
    r"we (?:saw|see|measured?)|"
    r"gemessen\w*|erreicht\w* in|effective (?:bandwidth|throughput|memory bandwidth)|"
    r"utili[sz]ation|realistic\w*|roughly half|attain\w+)\b",
    re.I,
)
_PART = re.compile(
    r"\b(?:per|each|every|je|pro|a single|of each|any one)\s+(?:HBM\w*\s+|memory\s+|DDR\w*\s+|"
    r"individual\s+|GCD\s?)?"
    r"(?:stack|channel|link|lane|pin|SM|CU|core|site|die|chiplet|XCD|GCD|tile|direction-?pair|"
    r"controller|Kanal|"
    r"Stapel|Stack|Link|Kern|Richtungspaar|NUMA\b|node|DIMM|module|partition|instance|"
    r"slice|port|engine|user|month|rack|CCD)\b|"
    r"\b(?:each(?! (?:gpu|card|chip|device|accelerator|board|direction|way)s?\b)|apiece|per-link|"
    r"per-stack|per-channel|per-core|/lane|/link|/stack|/pin|/core|"
    r"/node)\b|\bMIG\b|\bvGPU\b",
    re.I,
)
_MODULE = re.compile(r"^(?:Memory Device|DIMM\b|Handle 0x)", re.I)  # of dmidecode
_WHOLE = re.compile(
    r"\b(?:aggregate\w*|combined|altogether|in total across|across (?:all|eight|8|the|four|4|two|"
    r"2)|system total|DGX|HGX|NVL\d+|SuperPOD|cluster|rack|"
    r"chassis|baseboard|(?:per|whole|full|entire) (?:system|server|node|pod|board)|server|pod|"
    r"insgesamt über|acht GPUs|eight (?:GPUs|accelerators|cards)|"
    r"(?:[248]|16|72)[\s-]?(?:[x×]|GPUs?|-GPU|-way|cards|accelerators|chips)(?![a-z])|"
    r"dual[- ](?:GPU|socket|die)|two-socket|multi-GPU|together|(?:two|three|four|six|eight|"
    r"sixteen|zwei|drei|vier|acht) (?:GPUs|cards|accelerators|chips|devices|Karten)|node)\b",
    re.I,
)
_ABOUT = re.compile(
    r"(?:~|≈|∼|\b(?:about|around|approx\w*\.?|roughly|circa|ca\.?|etwa|rund|ungefähr|some|nearly|"
    r"almost|fast|knapp))\s*$",
    re.I,
)
_BOUND = re.compile(
    r"(?:[<>≥≤]|\b(?:more than|over|above|at least|exceed\w*|beyond|less than|below|under|"
    r"fewer than|well over|greater than|upwards of|"
    r"mehr als|(?<!verfügt )(?<!besitzt )über|mindestens|weniger als|unter|north of))\s*(?:a |an )?$",
    re.I,
)
_NAME = re.compile(
    r"\b(?:product name|model(?: name)?|part (?:number|no)|sku|name|titel|produkt\w*|bezeichnung|"
    r"variants?|available in)\b",
    re.I,
)


def why_not(place: Place, field: str) -> str:
    """Why the quantity is not taken for ``field``; empty where nothing speaks against it."""
    quantity = place.quantity
    if quantity.why_not:
        return quantity.why_not
    if re.search(r"\?[\s\"')]*$", place.sentence):
        return "it is asked, not said"
    if _INSTRUCTION.search(place.sentence):
        return "it stands in an instruction, not in a description"
    around = f"{_since_comma(place)} \u0000 {place.right}"
    wide = " ".join([place.left, place.right, place.label, place.column, *place.headings[:1]])
    if _ABOUT.search(place.left) and quantity.digits < 3:
        return "it is said to be approximate"
    if _BOUND.search(place.left):
        return "it is a bound, not a value"
    for pattern, reason in (
        (_COMPARED, "it is compared with: another device's"),
        (_HYPOTHETICAL, "it is not said of the device as it is"),
        (_NEGATED, "the sentence denies it"),
        (_MEASURED, "it is a measurement, not what the device is rated at"),
    ):
        if pattern.search(_scope(place, reason)):
            return reason
    if any(_MODULE.search(heading) for heading in place.headings):
        return "it is of a part of the device"
    if _PART.search(around) or _PART.search(f"{place.label} {place.column}"):
        return "it is of a part of the device"
    if (
        place.beside
        and place.column
        and named(place.label, quantity.kind)
        and not named(place.column, quantity.kind)
    ):
        return "its row has a value of each of several columns"
    if place.stacked and named(place.column, quantity.kind) and not named(place.label, quantity.kind):
        return "its column has a value of each of several rows"
    if field != "link_bandwidth" and _WHOLE.search(wide):
        return "it is of several devices together"
    if field == "link_bandwidth" and re.search(
        r"DGX|HGX|rack|cluster|NVL\d+|(?:[248]|16|72)[\s-]?(?:GPU|[x×] )", wide
    ):
        return "it is of several devices together"
    if field == "memory_bytes" and _NAME.search(place.label):
        return "it is part of a name"
    return ""


def _scope(place: Place, reason: str) -> str:
    """How far a word reaches: in prose the sentence up to the quantity and its clause, in a row the row."""
    if place.structured:
        plain = [b for b in place.before[:1] if not re.search(r"\d", b)]
        return " ".join(
            [*plain, place.label, place.left, place.right, *place.after, place.column, *place.headings[:1]]
        )
    end = place.at + len(place.quantity.shown) + len(place.right)
    if reason.startswith("it is compared"):
        behind = " ".join([place.right, *(a for a in place.after[:1] if not re.search(r"\d", a))])
        if _BEGINS.match(place.sentence) and "," in place.sentence[place.at :]:
            return place.sentence[: place.at]
        return _since_comma(place) + (behind if _OLDER.search(behind) else "")
    return place.sentence[:end] + " ".join(place.after[:1])


def _since_comma(place: Place) -> str:
    """What stands before the quantity in its sentence, up to a comma: "each stack with 24 GB"."""
    if place.structured:
        return place.left
    return re.split(r"[,;:(](?!\d)", place.sentence[: place.at])[-1]

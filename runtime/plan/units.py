"""Units as texts write them, and what each is worth: the arithmetic is pint's.

Operations and transfers are dimensions of their own here, so that nothing is added to what it is not.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llm42c.errors import ConfigError

if TYPE_CHECKING:
    import pint

Kind = Literal["rate", "operations", "bytes", "power", "frequency", "width", "transfers", "count"]
BASE: dict[Kind, str] = {
    "rate": "byte / second",
    "operations": "flop / second",
    "bytes": "byte",
    "power": "watt",
    "frequency": "hertz",
    "width": "bit",
    "transfers": "transfer / second",
    "count": "",
}
_DEFINITIONS = """
second = [time]
byte = [information]
bit = byte / 8
flop = [operation]
transfer = [transfer]
watt = [power]
hertz = 1 / second
kilo- = 1e3
mega- = 1e6
giga- = 1e9
tera- = 1e12
peta- = 1e15
exa- = 1e18
kibi- = 2**10
mebi- = 2**20
gibi- = 2**30
tebi- = 2**40
"""

_PREFIXES = {
    "k": "kilo",
    "K": "kilo",
    "M": "mega",
    "G": "giga",
    "T": "tera",
    "P": "peta",
    "E": "exa",
    "Ki": "kibi",
    "Mi": "mebi",
    "Gi": "gibi",
    "Ti": "tebi",
}
_SECOND = (
    r"(?:\s?/\s?(?:s(?:ec(?:ond)?)?|Sek(?:unde)?)\b|\s?(?:per|pro|a)\s(?:second|sec|Sekunde)\b|"
    r"\s?s(?:\^-1|⁻¹))"
)
_WORD = r"(?P<word>[Kk]ilo|[Mm]ega|[Gg]iga|[Tt]era|[Pp]eta|[Ee]xa|[Kk]ibi|[Mm]ebi|[Gg]ibi|[Tt]ebi)"
_SHORT = r"(?P<short>[KMGT]i|[kKMGTPE]|[mgtp])"
_PER_CLOCK = r"(?!\s?(?:/|per\b|pro\b)\s?(?:clock|clk|cycle|Takt|W\b|[Ww]att))"


@dataclass(frozen=True)
class Unit:
    """``scale``: of its kind's base unit. ``unclear``: bits and bytes cannot be told apart by its letters."""

    kind: Kind
    scale: float
    text: str
    bits: bool = False
    binary: bool = False
    unclear: bool = False


def _pattern(body: str) -> re.Pattern[str]:
    return re.compile(rf"(?:{_WORD}|{_SHORT}){body}(?![A-Za-z0-9])")


# The longer spelling of a kind stands before the shorter.
_SPELLINGS: tuple[tuple[Kind, str, re.Pattern[str]], ...] = (
    ("rate", "byte / second", _pattern(rf"(?P<b>[Bb]ytes?|B|b(?=/|ps|PS)){_SECOND}")),
    ("rate", "byte / second", _pattern(r"(?P<b>B|b)(?:ps|PS)")),
    ("rate", "byte / second", re.compile(rf"(?:B|[Bb]ytes?){_SECOND}(?![A-Za-z0-9])")),
    ("rate", "bit / second", _pattern(rf"-?(?P<bit>[Bb]its?){_SECOND}")),
    ("rate", "bit / second", _pattern(r"-?(?P<bit>[Bb]its?)ps")),
    ("transfers", "transfer / second", _pattern(r"T/s(?:ec)?")),
    (
        "operations",
        "flop / second",
        _pattern(rf"(?:FLOPS|FLOPs|[Ff]lops|FLOP|[Ff]lop|OPS|OPs|[Oo]ps|OP){_SECOND}?{_PER_CLOCK}"),
    ),
    ("operations", "flop / second", re.compile(rf"(?P<short>[TPG])F(?![A-Za-z0-9]){_PER_CLOCK}")),
    ("bytes", "byte", _pattern(r"(?P<b>[Bb]ytes?|B|b)(?!\s?(?:/|p\w|per\b|pro\b))")),
    ("bytes", "byte", re.compile(r"(?P<short>[KMGT]i)(?![A-Za-z0-9/])")),
    ("frequency", "hertz", _pattern(r"(?:[Hh]z|[Hh]ertz)")),
    ("power", "watt", re.compile(r"(?P<short>k)?(?:[Ww](?:atts?)?)(?![A-Za-z0-9/])")),
    ("width", "bit", re.compile(r"-?\s?[Bb]its?(?![A-Za-z0-9/])")),
)


def match(text: str, at: int) -> tuple[Unit, int] | None:
    """The unit that begins at ``at`` of ``text``, and where it ends."""
    for kind, base, pattern in _SPELLINGS:
        found = pattern.match(text, at)
        if found is not None:
            unit = _read(kind, base, found)
            if unit is not None:
                return unit, found.end()
    return None


def _read(kind: Kind, base: str, found: re.Match[str]) -> Unit | None:
    groups = found.groupdict()
    word, short, letter = groups.get("word"), groups.get("short") or "", groups.get("b") or ""
    small = short in ("m", "g", "t", "p")
    if small and kind not in ("rate", "bytes"):
        return None
    prefix = word.lower() if word else _PREFIXES.get(short.upper() if small else short, "")
    unclear = kind == "rate" and ((small and len(letter) == 1) or found.group().endswith("PS"))
    bits = base.startswith("bit") or (letter == "b" and kind == "rate")
    if kind == "bytes" and letter == "b" and not small:  # "80 Gb"
        unclear = True
    if bits:
        base = base.replace("byte", "bit")
    scale = registry().Quantity(1.0, f"{prefix}{base}").to(BASE[kind]).magnitude if kind != "width" else 1.0
    binary = prefix.endswith("bi")
    return Unit(kind, float(scale), found.group().strip(), bits and kind == "rate", binary, unclear)


def require() -> None:
    """Raises ConfigError without pint."""
    if importlib.util.find_spec("pint") is None:
        raise ConfigError("reading a device's text needs pint: pip install 'llm42c[plan]'")


@functools.cache
def registry() -> pint.UnitRegistry[Any]:
    require()
    import pint

    made: pint.UnitRegistry[Any] = pint.UnitRegistry(None, cache_folder=None)
    for line in _DEFINITIONS.strip().splitlines():
        made.define(line)
    return made


def shown(value: float, kind: Kind) -> str:
    """A number with a prefix that suits it: 3.35 TB/s."""
    suffix = {"rate": "B/s", "operations": "FLOP/s", "bytes": "B", "power": "W", "frequency": "Hz"}.get(
        kind, ""
    )
    for letter, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size and suffix not in ("", "W"):
            return f"{value / size:.4g} {letter}{suffix}"
    return f"{value:.6g} {suffix}".strip()

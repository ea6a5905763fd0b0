"""Numbers without a unit: units of a processor, and a memory's channels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llm42c.runtime.plan.text import Text

_N = r"(?P<n>\d{1,3}(?:[.,]\d{3})*|\d+)"
_SMS = (
    r"(?:SMs?\b|streaming multi-?processors?|multiprocessors?|Multiprozessoren|CUs?\b|compute units?|"
    r"Recheneinheiten|Xe-?cores?|Multi-?[Pp]rocessor\w*)"
)
_CPU = re.compile(
    r"\b(?:CPU|Xeon|EPYC|Ryzen|Threadripper|Prozessor|processor|Neoverse|Graviton|Ampere Altra|"
    r"Core i\d|POWER\d+|Arm server|x86)\b",
    re.I,
)
_PATTERNS: dict[str, tuple[re.Pattern[str], ...]] = {
    "sms": (
        re.compile(rf"(?<![\w.,-]){_N}\s+(?:\w+\s)?{_SMS}", re.I),
        re.compile(
            rf"^\W*(?:number of |active |enabled |GPU |# ?)?{_SMS}(?:\s*\((?:SMs?|"
            rf"CUs?)\))?(?:\s*count)?\s*[:=|\t ]+\s*{_N}\s*(?:\||$)",
            re.I | re.M,
        ),
    ),
    "channels": (
        re.compile(
            rf"(?<![\w.,-]){_N}[\s-]*(?:memory |Speicher|DDR\d-?|DDR\dX? )?(?:channels?|"
            rf"[Kk]anäle\w*|-Kanal)\b(?! per| pro)",
            re.I,
        ),
        re.compile(
            rf"^\W*(?:memory channels|channels|max(?:imum)?\.? (?:number|#) of memory channels|"
            rf"Speicherkanäle)\s*[:=|\t ]+\s*{_N}\s*(?:\||$)",
            re.I | re.M,
        ),
    ),
}
_CORES = (
    re.compile(
        rf"(?<![\w.,-]){_N}[\s-]*(?:physical |Zen ?\w* |CPU |Neoverse[\w -]{{0,6}} |Golden Cove |"
        rf"performance )?(?:cores?\b|Kerne\w*)",
        re.I,
    ),
    re.compile(
        rf"^\W*(?:number of |# ?of |total |CPU )*(?:cores|Kerne)(?:\s*count)?\s*[:=|"
        rf"\t ]+\s*{_N}\s*(?:\||$)",
        re.I | re.M,
    ),
)
_CORES_AND_THREADS = re.compile(
    rf"^\W*(?:CPU )?(?:cores|Kerne)\s*/\s*threads\s*[:=|\t ]+\s*{_N}\s*/\s*\d+", re.I
)
_NOT_CORES = re.compile(
    r"CUDA|tensor|stream|shader|GPU|RT[- ]core|per (?:socket|CPU|die|chiplet|CCD|SM)|pro Sockel|"
    r"efficien|E-core|P-core|matrix|logical|virtual|vCPU|"
    r"up to|bis zu|from|than|threads per core",
    re.I,
)
_LSCPU = {
    "sockets": r"(?:Socket\(s\)|Sockel)",
    "each": r"(?:Core\(s\) per socket|Kern\(e\) pro Sockel|Kern\(e\) pro Socket)",
}


@dataclass(frozen=True)
class Count:
    """``field`` as in ``labels.FEATURES`` and ``labels.EVIDENCE``."""

    field: str
    value: float
    line: int
    start: int
    end: int
    shown: str
    reasons: tuple[str, ...] = ()

    @property
    def span(self) -> str:
        return f"{self.line}:{self.start + 1}-{self.end}"


def counts(text: Text) -> Iterator[Count]:
    """Every count that its own words name."""
    for number, line in enumerate(text.lines, start=1):
        for field, patterns in _PATTERNS.items():
            yield from _matches(field, patterns, line, number)
    yield from _cores(text)


def _matches(field: str, patterns: tuple[re.Pattern[str], ...], line: str, number: int) -> Iterator[Count]:
    taken: set[int] = set()
    for pattern in patterns:
        for found in pattern.finditer(line):
            if found.start("n") in taken or re.search(
                r"\b(?:per|up to|bis zu|pro|full|than|of)\s*$", line[: found.start("n")], re.I
            ):
                continue
            if re.match(r"\s*(?:per|pro|/)\b", line[found.end() :]):
                continue
            taken.add(found.start("n"))
            value = float(re.sub(r"[.,]", "", found["n"]))
            yield Count(field, value, number, found.start("n"), found.end("n"), found["n"])


def _cores(text: Text) -> Iterator[Count]:
    found = {}
    for number, line in enumerate(text.lines, start=1):
        for name, words in _LSCPU.items():
            if (hit := re.match(words + r"\s*:\s*(\d+)\s*$", line.strip())) is not None:
                found[name] = (number, line, int(hit[1]))
    if len(found) == 2:
        number, line, each = found["each"]
        sockets = found["sockets"][2]
        at = line.rindex(str(each))
        reason = f"{sockets} × {each}: line {found['sockets'][0]} says {sockets} sockets"
        yield Count("cores", float(sockets * each), number, at, at + len(str(each)), str(each), (reason,))
        return
    if not any(_CPU.search(line) for line in text.lines):
        return
    for number, line in enumerate(text.lines, start=1):
        for pattern in (*_CORES, _CORES_AND_THREADS):
            for hit in pattern.finditer(line):
                around = line[max(0, hit.start() - 24) : hit.end() + 16]
                if _NOT_CORES.search(around):
                    continue
                value = float(re.sub(r"[.,]", "", hit["n"]))
                yield Count("cores", value, number, hit.start("n"), hit.end("n"), hit["n"])

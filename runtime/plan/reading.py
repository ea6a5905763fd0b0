"""A text becomes features of a device: each with its place and reasons, or rejected by name.

Nothing is filled in: what the text does not say is not among the features.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from llm42c.errors import DeviceTextError
from llm42c.runtime.plan import checks, convert, doubts, units
from llm42c.runtime.plan.checks import Product, Verdict
from llm42c.runtime.plan.counts import Count, counts
from llm42c.runtime.plan.known import Known
from llm42c.runtime.plan.labels import FEATURES, fields
from llm42c.runtime.plan.layout import Place, places
from llm42c.runtime.plan.owners import UNCLEAR, owners
from llm42c.runtime.plan.text import Text
from llm42c.runtime.plan.text import read as quantities_of


@dataclass(frozen=True)
class Feature:
    """A value in the unit of its field (``codegen.device.UNITS``), and where in which file it stands."""

    field: str
    value: float
    where: str  # line:span
    shown: str
    reasons: tuple[str, ...] = ()

    @property
    def line(self) -> int:
        return int(self.where.partition(":")[0])


@dataclass(frozen=True)
class Rejected:
    """What was read and not taken for ``field``, and why."""

    field: str
    where: str
    shown: str
    reason: str


@dataclass(frozen=True)
class Reading:
    """What a text says. ``subject``: the known device that it is about."""

    name: str
    subject: Known | None
    features: dict[str, Feature]
    rejected: list[Rejected]


@dataclass(frozen=True)
class _Candidate:
    field: str
    value: float
    half_step: float
    digits: int
    where: str
    shown: str
    reasons: tuple[str, ...] = ()
    why_not: str = ""
    supported: bool = False
    binary: bool = False
    unclear_unit: str = ""
    said: str = "unsaid"  # sparse, or both directions

    @property
    def line(self) -> int:
        return int(self.where.partition(":")[0])

    def rejected(self, reason: str) -> _Candidate:
        return replace(self, why_not=reason)


@dataclass
class _Evidence:
    """Numbers that check others, each if the text has one value of it."""

    values: dict[str, tuple[float, int] | None] = field(default_factory=dict)

    def add(self, name: str, value: float, line: int) -> None:
        known = self.values.get(name, (value, line))
        same = known is not None and checks.near(known[0], value, 0.01)
        self.values[name] = known if same else None

    def get(self, name: str) -> float | None:
        found = self.values.get(name)
        return None if found is None else found[0]

    def line(self, name: str) -> int:
        found = self.values.get(name)
        return 0 if found is None else found[1]


def read(name: str, content: str) -> Reading:
    """The features of the device that ``content`` describes.

    Raises DeviceTextError for a text that is empty, binary or of two devices; ConfigError without pint.
    """
    units.require()
    _require_text(name, content)
    text = quantities_of(name, content)
    found = places(text)
    owned = owners(text, found)
    candidates: list[_Candidate] = []
    evidence = _Evidence()
    others: dict[str, dict[str, int]] = {}
    for place, owner in zip(found, owned.of, strict=True):
        for label in fields(place):
            _take(text, place, label, owner, candidates, evidence, others)
    _require_one_device(name, owned.subject, others)
    for count in counts(text):
        _take_count(count, candidates, evidence)
    candidates = _link_or_bus(candidates)
    product = _product(text, evidence)
    checked = [_checked(c, owned.subject, evidence, product) for c in candidates]
    checked = _unsaid_among_sparse(checked)
    features, rejected = _chosen(checked)
    if product is not None and not any(c.field == "memory_bandwidth" for c in checked):
        made = _derived(product, owned.subject)
        if made is not None:
            features["memory_bandwidth"] = made
    return Reading(name, owned.subject, features, rejected)


def _require_text(name: str, content: str) -> None:
    if not content.strip():
        raise DeviceTextError(f"{name} is empty: it describes no device")
    if (
        "\x00" in content
        or "\ufffd" in content
        or sum(not c.isprintable() and c not in "\r\n\t\f" for c in content) > len(content) // 50
    ):
        raise DeviceTextError(f"{name} is not a text")


def _require_one_device(name: str, subject: Known | None, others: dict[str, dict[str, int]]) -> None:
    for other, its in others.items():
        if len(its) >= 2 and subject is not None:
            lines = sorted(its.values())
            raise DeviceTextError(
                f"{name} describes two devices, {subject.name} and {other} (lines {lines[0]} to "
                f"{lines[-1]}): give one text a device"
            )


# -- candidates ----------------------------------------------------------------------------------------------


def _take(
    text: Text,
    place: Place,
    label: str,
    owner: Known | str | None,
    candidates: list[_Candidate],
    evidence: _Evidence,
    others: dict[str, dict[str, int]],
) -> None:
    quantity = place.quantity
    meaning, name = _meaning(text, place, label)
    if name not in FEATURES and name != "pcie_bandwidth":
        if not doubts.why_not(place, name) and owner is None:
            evidence.add(name, meaning.value, quantity.line)
        return
    why = doubts.why_not(place, name)
    if owner == UNCLEAR:
        why = why or "which of two devices it is of is unclear"
    elif isinstance(owner, Known):
        if not why:
            others.setdefault(owner.name, {}).setdefault(name, quantity.line)
        why = why or f"it is of another device, {owner.name}"
    unit = quantity.unit
    of_memory = name in ("memory_bandwidth", "memory_bytes")
    bits = unit is not None and (unit.unclear or (of_memory and unit.bits))
    unclear = f"{quantity.shown}: bits or bytes?" if bits else ""
    reasons = meaning.reasons
    if unit is not None and unit.bits:
        reasons = ("bits, eight a byte", *reasons)
    candidates.append(
        _Candidate(
            name,
            meaning.value,
            quantity.half_step,
            quantity.digits,
            quantity.span,
            quantity.shown,
            reasons,
            why or meaning.why_not,
            binary=unit is not None and unit.binary,
            unclear_unit=unclear,
            said=meaning.said,
        )
    )


def _meaning(text: Text, place: Place, label: str) -> tuple[convert.Meaning, str]:
    if label.endswith("_flops"):
        return convert.operations(text, place), _vector(place, label)
    if label == "link_bandwidth":
        return _nvlink_or(text, place), label
    if label == "pcie_bandwidth":
        return convert.pcie(text, place), label
    if label == "memory_bytes":
        return convert.capacity(place), label
    if label == "pin_rate" and not (place.quantity.unit is not None and place.quantity.unit.bits):
        return convert.Meaning(place.quantity.value), "memory_clock"
    return convert.Meaning(place.quantity.value), label


def _vector(place: Place, label: str) -> str:
    """Operations that are not those of the matrix units, which products of 16 and 8 bits are done by."""
    around = " ".join([place.left, place.right, place.label, place.column, *place.headings[:1]])
    plain = re.search(
        r"non[- ]?tensor|vector|shader|CUDA[- ]cores?|without tensor|ohne Tensor|scalar|\bSIMT\b|1:1",
        around,
        re.I,
    )
    return "vector_flops" if plain and label != "fp32_flops" else label


def _nvlink_or(text: Text, place: Place) -> convert.Meaning:
    said = convert.link(text, place)
    return (convert.nvlink(place) or said) if said.said == "unsaid" else said


def _take_count(count: Count, candidates: list[_Candidate], evidence: _Evidence) -> None:
    if count.field in FEATURES:
        candidates.append(
            _Candidate(count.field, count.value, 0.0, 3, count.span, count.shown, count.reasons)
        )
    evidence.add(count.field, count.value, count.line)


def _link_or_bus(candidates: list[_Candidate]) -> list[_Candidate]:
    """Where no link between devices is spoken of, PCIe is the link."""
    linked = any(c.field == "link_bandwidth" for c in candidates)
    kept = [c for c in candidates if c.field != "pcie_bandwidth" or not linked]
    return [replace(c, field="link_bandwidth") if c.field == "pcie_bandwidth" else c for c in kept]


# -- checks --------------------------------------------------------------------------------------------------


def _product(text: Text, evidence: _Evidence) -> Product | None:
    """The bandwidth of the bus, or of the channels, that the text gives."""
    bus, pin = evidence.get("bus_bits"), evidence.get("pin_rate")
    if bus is not None and pin is not None and bus >= 32:
        told = f"{bus:g} bit × {pin * 8 / 1e9:g} Gbit/s / 8"
        return Product(bus * pin, told, (evidence.line("bus_bits"), evidence.line("pin_rate")))
    transfers = _transfers(text) or (evidence.get("transfer_rate") or 0.0)
    channels = evidence.get("channels")
    if (
        transfers
        and channels is not None
        and not any(re.search(r"socket|Sockel|2P\b|dual", line, re.I) for line in text.lines)
    ):
        told = f"{channels:g} channels × 8 B × {transfers / 1e6:g} MT/s"
        return Product(channels * 8 * transfers, told, (evidence.line("channels"),))
    if transfers and bus is not None and bus >= 32:
        told = f"{bus:g} bit × {transfers / 1e6:g} MT/s / 8"
        return Product(bus / 8 * transfers, told, (evidence.line("bus_bits"),))
    return None


def _transfers(text: Text) -> float | None:
    """Of a name like DDR5-4800, if there is one such name."""
    found = {
        int(m[1])
        for line in text.lines
        for m in re.finditer(r"\bLP?DDR\d[A-Z]?-(\d{4,5})\b|\bDDR\d-(\d{4,5})\b", line)
        if m[1]
    }
    found |= {int(m[1]) for line in text.lines for m in re.finditer(r"\bDDR\d-(\d{4,5})\b", line)}
    return found.pop() * 1e6 if len(found) == 1 else None


def _checked(
    candidate: _Candidate, subject: Known | None, evidence: _Evidence, product: Product | None
) -> _Candidate:
    if candidate.why_not:
        return candidate
    kind = FEATURES[candidate.field]
    verdicts = [checks.published(subject, candidate.field, candidate.value, candidate.half_step, kind)]
    if candidate.field == "bf16_flops":
        verdicts.append(
            checks.by_units(subject, evidence.get("sms"), evidence.get("boost_clock"), candidate.value)
        )
    if candidate.field == "memory_bandwidth":
        verdicts.append(checks.by_bus(product, candidate.value))
    candidate = _judged(candidate, verdicts)
    if candidate.why_not:
        return candidate
    if candidate.unclear_unit and not candidate.supported:
        return candidate.rejected(candidate.unclear_unit)
    if candidate.field.endswith("_flops") and candidate.said == "unclear" and not candidate.supported:
        return candidate.rejected("sparse or dense is not said, and the text speaks of sparsity")
    if candidate.field == "link_bandwidth" and candidate.said == "unsaid" and not candidate.supported:
        return candidate.rejected("one direction or both is not said")
    reason = checks.in_range(candidate.field, candidate.value, kind)
    return candidate.rejected(reason) if reason else candidate


def _judged(candidate: _Candidate, verdicts: list[Verdict]) -> _Candidate:
    agrees = [v.agrees for v in verdicts if v.agrees]
    against = [v for v in verdicts if v.against]
    if (
        against
        and candidate.field == "link_bandwidth"
        and against[0].factor == 2.0
        and candidate.said == "unsaid"
    ):
        reasons = (*candidate.reasons, f"halved: {against[0].against}")
        return replace(candidate, value=candidate.value / 2, reasons=reasons, supported=True, said="yes")
    if against:
        return candidate.rejected(against[0].against)
    if agrees:
        told = tuple(a if a.endswith("agree") else f"{a} agrees" for a in agrees)
        return replace(candidate, reasons=(*candidate.reasons, *told), supported=True)
    return candidate


def _unsaid_among_sparse(candidates: list[_Candidate]) -> list[_Candidate]:
    """Where one rate turned out to be twice the dense one, no other is believed that does not say what it
    is."""
    doubled = [c for c in candidates if c.field.endswith("_flops") and c.why_not.startswith("twice")]
    if not doubled:
        return candidates
    return [
        c.rejected(f"sparse or dense is not said, and line {doubled[0].line} is sparse")
        if c.field.endswith("_flops")
        and c.said in ("unsaid", "unclear")
        and not c.why_not
        and not c.supported
        else c
        for c in candidates
    ]


# -- choice --------------------------------------------------------------------------------------------------


def _chosen(candidates: list[_Candidate]) -> tuple[dict[str, Feature], list[Rejected]]:
    features: dict[str, Feature] = {}
    rejected = [c for c in candidates if c.why_not]
    for name in FEATURES:
        mine = [c for c in candidates if c.field == name and not c.why_not]
        if not mine:
            continue
        best, others = _one_of(mine)
        rejected += others
        if best is not None:
            features[name] = Feature(name, best.value, best.where, best.shown, best.reasons)
    said = [Rejected(c.field, c.where, c.shown, c.why_not) for c in rejected]
    return features, list(
        dict.fromkeys(sorted(said, key=lambda r: (int(r.where.partition(":")[0]), r.where)))
    )


def _one_of(mine: list[_Candidate]) -> tuple[_Candidate | None, list[_Candidate]]:
    """The value that all agree on, written with the most digits; where they do not, the one that a check
    supports; else none."""
    groups: list[list[_Candidate]] = []
    for candidate in sorted(mine, key=lambda c: (-c.binary, -c.digits, c.line)):
        for group in groups:
            if _consistent(candidate, group[0]):
                group.append(candidate)
                break
        else:
            groups.append([candidate])
    if len(groups) == 1:
        return groups[0][0], []
    supported = [group for group in groups if any(c.supported for c in group)]
    if len(supported) == 1:
        best = next(c for c in supported[0] if c.supported)
        return best, [
            c.rejected(f"contradicts line {best.line}") for g in groups if g is not supported[0] for c in g
        ]
    lines = ", ".join(str(n) for n in sorted({c.line for c in mine}))
    where = f"lines {lines} contradict each other" if "," in lines else f"line {lines} contradicts itself"
    return None, [c.rejected(where) for c in mine]


def _consistent(a: _Candidate, b: _Candidate) -> bool:
    if checks.near(a.value, b.value, 0.01) or abs(a.value - b.value) <= max(a.half_step, b.half_step):
        return True
    if a.field == "memory_bytes" and a.binary != b.binary:
        return 1.0 <= max(a.value, b.value) / min(a.value, b.value) <= 1.085
    return False


def _derived(product: Product, subject: Known | None) -> Feature | None:
    verdict = checks.published(subject, "memory_bandwidth", product.value, 0.01 * product.value, "rate")
    if verdict.against or checks.in_range("memory_bandwidth", product.value, "rate"):
        return None
    line = product.lines[0]
    return Feature(
        "memory_bandwidth", product.value, f"{line}:1-1", product.told, (f"computed: {product.told}",)
    )


Reader = Callable[[str, str], Reading]

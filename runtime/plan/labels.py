"""The reader of rules: which feature a quantity is, by the words around it, or none.

It only labels. A kind of quantity has *subjects*, each with the words that name it; the nearest text that
names a subject decides (``Place.parts`` is in that order). Subjects that are no feature (caches, networks,
disks) are named too, so that their quantities are not taken for one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llm42c.runtime.plan.layout import Place
from llm42c.runtime.plan.units import Kind

FEATURES: dict[str, Kind] = {
    "memory_bandwidth": "rate",
    "memory_bytes": "bytes",
    "bf16_flops": "operations",
    "fp16_flops": "operations",
    "fp8_flops": "operations",
    "int8_flops": "operations",
    "fp32_flops": "operations",
    "link_bandwidth": "rate",
    "tdp_watts": "power",
    "sms": "count",
    "cores": "count",
}
# What only serves to check others.
EVIDENCE: dict[str, Kind] = {
    "boost_clock": "frequency",
    "bus_bits": "width",
    "pin_rate": "rate",
    "transfer_rate": "transfers",
    "channels": "count",
    "pcie_bandwidth": "rate",
}
_NONE = "none"  # a subject that is no feature

_MEMORY = (
    r"HBM\d?\w*|GDDR\d?\w*|LP?DDR\d?\w*|DDR\d\w*|VRAM|DRAM|\bRAM\b|(?:unified |device |video |"
    r"global |main |gpu |on-package )?memory|mem|"
    r"frame ?buffer|FB Memory|\w*[Ss]peicher(?:bandbreite|größe|kapazität|ausbau|durchsatz)?\b|MemTotal"
)
_NOT_MEMORY = (
    r"L[0-4][\s-]*(?:data |instruction |vector )?(?:cache|Cache|\$|TEX)?\b|LLC|\w*[Cc]aches?\b|"
    r"SRAM|shared memory|LDS|Local Data Share|register\w*|TMEM|"
    r"on-chip|scratchpad|tensor memory|SSDs?|NVMe|disks?|Festplatte|[Ss]torage|NAND|swap|"
    r"host memory|CPU memory|system memory|"
    r"system RAM|host RAM|server memory|LPDDR5X? (?:CPU|host)|Hauptspeicher des Servers|BAR1|"
    r"Conf Compute|Reserved|Used|Free|\bfree\b|ECC|"
    r"memory (?:clock|speed|data rate)|Speichertakt|constant memory|"
    r"CXL(?: memory)?(?: expansion)?|texture memory|"
    r"persistent memory|Optane|"
    r"Arbeitsspeicher des (?:Hosts|Servers)|model|weights|Gewichte|checkpoint|file|dataset"
)
_LINK = (
    r"NV-?Link\w*|NVLINK|NVSwitch|Infinity Fabric\w*|xGMI|[Ii]nter-?connect\w*|\bICI\b|"
    r"inter-?chip\w*|GPU[- ]to[- ]GPU|"
    r"chip[- ]to[- ]chip|peer[- ]to[- ]peer|Verbindung\w*|NeuronLink\w*|scale-up|Xe Link|UALink|P2P|GPU-GPU|"
    r"MTLink|HCCS|links?\b"
)
_PCIE = (
    r"PCI-?[Ee]?(?:xpress)?\b|PCI Express|PCIe\w*|host interface|Systemschnittstelle|system interface|"
    r"bus interface"
)
_OTHER_RATE = (
    r"Ethernet|InfiniBand|Infiniband|RoCE\w*|RDMA|\bNICs?\b|network\w*|Netzwerk\w*|ConnectX\w*|"
    r"NVLink-C2C|C2C|DMI|UPI|USB|"
    r"Thunderbolt|GbE|DisplayPort|HDMI|decode|decoder|encode|video engine|texture fill|pixel fill|"
    r"(?:read|write) (?:bandwidth|speed|rate|throughput)|sequential|"
    r"tape|camera|bisection|HCA|external|scale-out|DPU|BlueField\w*"
)
_PIN = (
    r"data rate|memory (?:data rate|speed|clock)|per pin|/pin|pin rate|pin speed|Datenrate|"
    r"Speichertakt|effective memory|effektiv\w*|"
    r"Gbps GDDR|pro Pin|je Pin"
)
_POWER = (
    r"TDP|TBP|TGP|cTDP|thermal design power|(?:max(?:imum|\.)? |typical |total )?(?:board|"
    r"graphics|module|package|chip|card|GPU|device) power|"
    r"max(?:imum|\.)? power(?: consumption| draw)?|power envelope|power consumption|power budget|"
    r"thermal envelope|thermal budget|"
    r"Default Power Limit|power rating|rated power|Leistungsaufnahme|Verlustleistung|power cap|power limit|"
    r"\bdraws?\b|pwr|rated at|needs|consum\w+|\bPower\b|power|dissipat\w+|Watts?\b"
)
_NOT_POWER = (
    r"power supply|PSU|(?:mean|median|average|idle|typical|minimum) power\w*|Netzteil|idle|"
    r"Leerlauf|average|Average Power Draw|Instantaneous\w*|"
    r"Current Power Limit|Requested Power Limit|"
    r"Min(?:imum)? Power Limit|Max(?:imum)? Power Limit|Power Draw|Power Readings?(?= \S)|"
    r"system power|server|recommended|connector|"
    r"per rack|rack|chassis|node|cooling|fan|Durchschnitt\w*|under load|measured|typical load|minimum|"
    r"Power Limit(?= *:)|Module Power|Memory Power|Power Smoothing|Power Profiles?|efficien\w+"
)

SUBJECTS: dict[Kind, tuple[tuple[str, str], ...]] = {
    "rate": (
        ("pin_rate", _PIN),
        (_NONE, rf"{_NOT_MEMORY}|{_OTHER_RATE}|(?:memory )?(?:capacity|size)"),
        ("pcie_bandwidth", _PCIE),
        ("link_bandwidth", _LINK),
        ("memory_bandwidth", _MEMORY),
    ),
    "bytes": (
        (
            _NONE,
            (
                rf"{_NOT_MEMORY}|per (?:SM|CU|core)|(?:\w+ )?(?:(?<!high-)(?<!high )bandwidth|BW|"
                rf"throughput)|\w*[Bb]andbreite"
            ),
        ),
        ("memory_bytes", rf"{_MEMORY}"),
    ),
    "power": ((_NONE, _NOT_POWER), ("tdp_watts", _POWER)),
    "operations": (
        (
            _NONE,
            r"TF32|tensor ?float-?32|FP64\w*|float64|double[- ]precision|doppelte\w* Genauigkeit|"
            r"NV ?FP4|MX ?FP[46]|FP[46]\b|INT4|INT1\b|"
            r"INT32|binary|RT[- ](?:core|TFLOPS)\w*|ray[- ]tracing|FP6/FP4|MXINT\d",
        ),
        ("bf16_flops", r"BF-?16\w*|bfloat-?16|brain[- ]?float\w*"),
        ("fp16_flops", r"FP-?16\w*|float16|half[- ]precision|half|halbe\w* Genauigkeit|\bF16\b"),
        ("fp8_flops", r"FP-?8\w*|float8|E4M3|E5M2|MX ?FP8|OCP-?FP8"),
        ("int8_flops", r"INT-?8\w*|8[- ]bit integer"),
        ("fp32_flops", r"FP-?32\w*|float32|single[- ]precision|einfache\w* Genauigkeit|\bF32\b"),
    ),
    "frequency": (
        (
            _NONE,
            r"base|Basis\w*|memory|Speicher\w*|min|video|VCN|idle|current|typical|nominal|"
            r"Applications Clocks|Default",
        ),
        ("boost_clock", r"boost\w*|max\w*|peak|turbo|Boost\w*|Maximal\w*|Max Clocks"),
    ),
    "width": (
        (_NONE, r"cache|op-mode|address|instruction|vector|register|floating|integer|precision|ECC"),
        (
            "bus_bits",
            r"memory (?:interface|bus)\w*|bus(?: width)?|interface(?: width)?|"
            r"Speicher(?:interface|anbindung|bus|schnittstelle)\w*|Busbreite|"
            r"memory|HBM\w*|GDDR\w*|LPDDR\w*",
        ),
    ),
    "transfers": (("pcie_bandwidth", _PCIE), ("transfer_rate", rf"{_MEMORY}|data rate|Datenrate")),
}
_COMPILED = {
    kind: [(name, re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![a-z0-9])", re.I)) for name, words in subjects]
    for kind, subjects in SUBJECTS.items()
}
_JOINED = re.compile(r"\s*(?:/|,|&|\+|\||and|und|or|oder)?\s*(?:peak|dense|sparse|tensor cores?)?\s*", re.I)


@dataclass(frozen=True)
class Named:
    """A subject that a text names, and where."""

    name: str
    start: int
    end: int


def named(text: str, kind: Kind) -> list[Named]:
    """Every subject named in ``text``, from left to right; of overlapping ones the longest."""
    found = [
        Named(name, m.start(), m.end()) for name, pattern in _COMPILED[kind] for m in pattern.finditer(text)
    ]
    order = {name: i for i, (name, _) in enumerate(SUBJECTS[kind])}
    kept: list[Named] = []
    for one in sorted(found, key=lambda n: (n.start - n.end, order[n.name])):
        if all(one.end <= k.start or k.end <= one.start for k in kept):
            kept.append(one)
    return sorted(kept, key=lambda n: n.start)


def fields(place: Place) -> tuple[str, ...]:
    """The features, or the evidence, that the quantity in ``place`` is; none where the words do not say."""
    kind = place.quantity.kind
    if kind not in SUBJECTS:
        return ()
    found = _nearest(place, kind) or _under_memory(place)
    return () if _NONE in found else found


_PLAIN = re.compile(r"\b(?:bandwidth|BW|Bandbreite)\b", re.I)


def _under_memory(place: Place) -> tuple[str, ...]:
    """A bandwidth that nothing is said of stands right below the memory's size."""
    if place.quantity.kind != "rate" or not _PLAIN.search(f"{place.label} {place.left} {place.right}"):
        return ()
    above = {n.name for n in named(place.above, "bytes")}
    return ("memory_bandwidth",) if above == {"memory_bytes"} else ()


def _nearest(place: Place, kind: Kind) -> tuple[str, ...]:
    left, right = named(place.left, kind), named(place.right, kind)
    if left or right:
        return _of_own(place, kind, left, right)
    for part in (*place.before, place.label, place.column, *place.headings, *place.after):
        names = named(part, kind)
        if names:
            return _joined(part, names, len(names) - 1, kind)
    return ()


def _of_own(place: Place, kind: Kind, left: list[Named], right: list[Named]) -> tuple[str, ...]:
    """Words of the clause itself. Those behind count if they follow at once, or nothing stands before."""
    behind = right[0].start if right else 1 << 20
    ahead = len(place.left) - left[-1].end if left else 1 << 20
    attached = right and re.fullmatch(
        r"\s*(?:of |in |for |at |an |bei |für )?(?:\w+ )?", place.right[:behind]
    )
    if right and (not left or (attached and behind < ahead)):
        found = _joined(place.right, right, 0, kind)
        if not left and kind in ("rate", "bytes") and (place.label or place.structured):
            return _agreeing(found, place, kind)
        return found
    if right and left and {n.name for n in left} != {n.name for n in right} and kind == "rate" and ahead > 24:
        return ()
    return _joined(place.left, left, len(left) - 1, kind)


def _agreeing(found: tuple[str, ...], place: Place, kind: Kind) -> tuple[str, ...]:
    """The label must not name another subject than the words behind: "L2 cache: 5.5 TB/s to HBM"."""
    names = {n.name for n in named(place.label, kind)}
    return found if not names or names & set(found) else ()


def _joined(text: str, names: list[Named], at: int, kind: Kind) -> tuple[str, ...]:
    """The subject at ``at``; of operations also the types beside it with nothing but a stroke between."""
    low = high = at
    if kind != "operations":
        return (names[at].name,)
    while low > 0 and _JOINED.fullmatch(text[names[low - 1].end : names[low].start]):
        low -= 1
    while high + 1 < len(names) and _JOINED.fullmatch(text[names[high].end : names[high + 1].start]):
        high += 1
    found = tuple(dict.fromkeys(n.name for n in names[low : high + 1]))
    return tuple(f for f in found if f != _NONE) or (_NONE,)

"""The harness: contenders take turns on each workload, and medians and ratios go into one CSV.

Taking turns (ours, peer, peer, ours, …) means that a slow minute of the machine slows all of them; the
ratio of a pair of neighbours is more stable than either rate.
"""

from __future__ import annotations

import csv
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError
from llm42c.runtime.bench.contenders import Contender, Prompts, Sample
from llm42c.runtime.bench.workloads import WORKLOADS

Progress = Callable[[str, int, int], None]
COUNTERS = ("rollbacks", "verifier_steps", "certified_tokens", "verified_tokens", "audits")
_DIFFER_AT = 8  # requests of a workload that are also run alone, to count outputs that differ


@dataclass(frozen=True)
class Case:
    """One workload at one number of requests."""

    workload: str
    requests: int

    @property
    def prompts(self) -> Prompts:
        return WORKLOADS[self.workload].prompts(self.requests)

    @property
    def new_tokens(self) -> int:
        return WORKLOADS[self.workload].new_tokens


@dataclass
class Result:
    """All samples of one contender on one case."""

    case: Case
    engine: str
    rates: list[float]
    lead: float  # median over rounds of (rate of the first contender / rate of this one)
    differ: int | None  # outputs that differ between alone and together; None: not looked at
    counters: Mapping[str, Any] = field(default_factory=dict)  # of its own turns, all rounds together

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    def as_row(self) -> dict[str, Any]:
        return {
            "workload": self.case.workload,
            "requests": self.case.requests,
            "new_tokens": self.case.new_tokens,
            "engine": self.engine,
            "rounds": len(self.rates),
            "median_tok_s": round(self.median, 1),
            "min_tok_s": round(min(self.rates), 1),
            "max_tok_s": round(max(self.rates), 1),
            "first_over_this": round(self.lead, 3),
            "differ": "" if self.differ is None else self.differ,
            **{name: self.counters.get(name, "") for name in COUNTERS},
        }


def cases(workloads: Sequence[str], sizes: Sequence[int] = ()) -> list[Case]:
    """The cases to run: `sizes`, or those that belong to each workload. Raises ConfigError."""
    out = []
    for name in workloads or list(WORKLOADS):
        if name not in WORKLOADS:
            raise ConfigError(f"no workload {name!r}: there are {', '.join(WORKLOADS)}")
        for size in sizes or WORKLOADS[name].sizes:
            WORKLOADS[name].prompts(size)
            out.append(Case(name, size))
    return out


def measure(
    contenders: Sequence[Contender], case: Case, rounds: int, progress: Progress, *, differ: bool = True
) -> list[Result]:
    """Warm every contender up, then let them take turns for `rounds` rounds.

    With `differ`, the first eight prompts are then run alone as well and compared with the batch.
    """
    label = f"{case.workload} × {case.requests}"
    total = (rounds + 1) * len(contenders)
    for i, contender in enumerate(contenders):
        progress(label, i, total)
        contender.warm_up(case.prompts, case.new_tokens)
    spent: list[Counter[str]] = [Counter() for _ in contenders]
    samples: list[list[Sample]] = [[] for _ in contenders]
    for r in range(rounds):
        # Every other round runs backwards: whoever comes after the slowest engine finds the coldest caches.
        for done, i in enumerate(range(len(contenders))[:: -1 if r % 2 else 1]):
            contender = contenders[i]
            progress(label, (r + 1) * len(contenders) + done, total)
            before = contender.counters()
            samples[i].append(contender.run(case.prompts, case.new_tokens))
            spent[i].update({k: v - before[k] for k, v in contender.counters().items()})
    progress(label, total, total)
    results = []
    for i, contender in enumerate(contenders):
        rates = [s.rate for s in samples[i]]
        lead = statistics.median(a.rate / b.rate for a, b in zip(samples[0], samples[i], strict=True))
        changed = (
            _differing(contender, case, samples[i][-1]) if differ and case.requests == _DIFFER_AT else None
        )
        results.append(Result(case, contender.name, rates, lead, changed, spent[i]))
    return results


def _differing(contender: Contender, case: Case, together: Sample) -> int:
    alone = [contender.run([prompt], case.new_tokens).tokens[0] for prompt in case.prompts]
    return sum(a != b for a, b in zip(alone, together.tokens, strict=True))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], **columns: str) -> None:
    """`rows` with `columns` (the command, the machine) appended to each. Raises ConfigError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *columns])
            writer.writeheader()
            writer.writerows({**row, **columns} for row in rows)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None

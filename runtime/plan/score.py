"""How well a reader does on texts whose truth is known: by field, what it found, missed and got wrong.

A folder holds ``NAME.txt`` and ``truth.json``: ``{NAME: {"facts": where they are published, "fields": {field:
value}}}``. What a text does not say is not in its truth, so accepting it is wrong too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError, DeviceTextError
from llm42c.runtime.plan.labels import FEATURES
from llm42c.runtime.plan.reading import Reader, read

CLOSE = 0.01


@dataclass
class Tally:
    """Of one field. ``wrong``: accepted, and not within 1 % of the truth; ``abstained``: said, not
    accepted."""

    said: int = 0
    right: int = 0
    wrong: int = 0
    abstained: int = 0

    @property
    def precision(self) -> float:
        return self.right / (self.right + self.wrong) if self.right + self.wrong else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.said if self.said else 1.0


@dataclass
class Score:
    """``misses``: a line for each that is wrong or was not accepted."""

    texts: int = 0
    fields: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in FEATURES})
    misses: list[str] = field(default_factory=list)

    @property
    def whole(self) -> Tally:
        every = self.fields.values()
        return Tally(
            *(sum(getattr(t, name) for t in every) for name in ("said", "right", "wrong", "abstained"))
        )

    def to_dict(self) -> dict[str, Any]:
        fields = {**self.fields, "all": self.whole}
        rates = {name: {"precision": t.precision, "recall": t.recall} for name, t in fields.items()}
        counted = {name: {**asdict(t), **rates[name]} for name, t in fields.items()}
        return {"texts": self.texts, "fields": counted, "misses": self.misses}


def score(folder: Path, reader: Reader = read) -> Score:
    """Of every text of ``folder``. Raises ConfigError for a folder without its truth."""
    found = Score()
    for name, fields in _truth(folder).items():
        try:
            content = (folder / f"{name}.txt").read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {folder / name}.txt: {error.strerror}") from None
        try:
            accepted = {f.field: f.value for f in reader(name, content).features.values()}
        except DeviceTextError as error:
            accepted = {}
            if fields:
                found.misses.append(f"{name}: {error}")
        _tally(found, name, fields, accepted)
    return found


def _tally(found: Score, name: str, fields: dict[str, float], accepted: dict[str, float]) -> None:
    found.texts += 1
    for which, tally in found.fields.items():
        true, mine = fields.get(which), accepted.get(which)
        tally.said += true is not None
        if mine is None:
            tally.abstained += true is not None
            if true is not None:
                found.misses.append(f"{name}: {which} {true:g} not accepted")
        elif true is not None and abs(mine - true) <= CLOSE * abs(true):
            tally.right += 1
        else:
            tally.wrong += 1
            found.misses.append(f"{name}: {which} {mine:g} accepted, the truth is {true}")


def _truth(folder: Path) -> dict[str, dict[str, float]]:
    path = folder / "truth.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        truth = {name: {f: float(v) for f, v in entry["fields"].items()} for name, entry in raw.items()}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not as the texts' truth is written: {error}") from None
    for name, fields in truth.items():
        if unknown := sorted(fields.keys() - FEATURES.keys()):
            raise ConfigError(f"{path}: {name} has an unknown field {unknown[0]!r}")
    return truth

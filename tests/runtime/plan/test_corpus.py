"""The texts whose truth is known: nothing wrong is accepted, and little is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pint")

from llm42c.errors import ConfigError
from llm42c.runtime.plan.known import KNOWN
from llm42c.runtime.plan.labels import FEATURES
from llm42c.runtime.plan.reading import Feature, Reading, read
from llm42c.runtime.plan.score import score

CORPUS = Path(__file__).with_name("corpus")


def test_the_corpus_is_whole() -> None:
    truth = json.loads((CORPUS / "truth.json").read_text())
    assert {p.stem for p in CORPUS.glob("*.txt")} == truth.keys()
    assert len(truth) >= 190
    assert all(entry["facts"] and entry["fields"].keys() <= FEATURES.keys() for entry in truth.values())


def test_nothing_wrong_is_accepted() -> None:
    found = score(CORPUS)
    assert found.whole.wrong == 0, found.misses
    assert found.whole.recall >= 0.96, found.misses
    for name, tally in found.fields.items():
        assert tally.recall >= 0.85, name


def test_what_is_wrong_counts() -> None:
    """The negative control: a reader that takes twice each value is wrong everywhere, and right nowhere."""

    def doubled(name: str, content: str) -> Reading:
        reading = read(name, content)
        twice = {n: Feature(n, 2 * f.value, f.where, f.shown) for n, f in reading.features.items()}
        return Reading(name, reading.subject, twice, [])

    found = score(CORPUS, doubled)
    assert found.whole.right == 0
    assert found.whole.wrong > 300


def test_every_value_stands_where_it_is_said_to() -> None:
    seen = 0
    for path in sorted(CORPUS.glob("*.txt")):
        content = path.read_text()
        try:
            reading = read(path.name, content)
        except ConfigError:
            continue
        for feature in reading.features.values():
            if feature.reasons and feature.reasons[0].startswith("computed"):
                continue
            line, _, span = feature.where.partition(":")
            start, end = (int(x) for x in span.split("-"))
            text = content.split("\n")[int(line) - 1][start - 1 : end]
            assert text.strip() in (feature.shown,), (path.name, feature)
            seen += 1
    assert seen > 300


def test_published_values_are_the_compilers() -> None:
    """What is held against texts and what kernels are planned by say the same of one device."""
    from llm42c.codegen.triton.devices import TABLE

    rows = {entry.pattern: entry for entry in TABLE}
    tables = [known for known in KNOWN if known.table]
    assert len(tables) >= 12
    for known in tables:
        row = rows[known.table]
        assert row.arch == known.arch
        for name in ("memory_bandwidth", "bf16_flops", "link_bandwidth"):
            mine = known.values.get(name, ())
            assert any(abs(getattr(row, name) - value) < 0.01 * value for value in mine), (known.name, name)
        if known.units:
            assert row.sms == known.units

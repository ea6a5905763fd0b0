"""Money, energy, carbon and income: arithmetic of named sources, and what they do not say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llm42c.codegen.device import Device, Value
from llm42c.errors import ConfigError
from llm42c.runtime.plan.calibration import PACKAGED
from llm42c.runtime.plan.cost import Country, Sourced, cost, country
from llm42c.runtime.plan.speed import Interval

RATE = Interval(500.0, 1000.0, 2000.0)  # tokens a second
DEVICE = Device("cuda", "x", "sm_90", {"tdp_watts": Value(700.0, "test")})
MARKET = Country("DEU", "Germany", Sourced(381.0, "2023"), Sourced(2500.0, "2022"), ppp=False)
PPP = Country("KEN", "Kenya", Sourced(70.0, "2023"), Sourced(98.0, "2022"), ppp=True)


def test_arithmetic() -> None:
    found = cost(RATE, DEVICE, None, usd_per_hour=3.6, where=MARKET)
    assert found.usd is not None
    assert found.kwh is not None
    assert found.grams is not None
    assert found.tokens_a_month is not None
    assert (found.usd.low, found.usd.value, found.usd.high) == pytest.approx((0.5, 1.0, 2.0))
    assert found.kwh.value == pytest.approx(1e6 / 1000 * 700 / 3.6e6)
    assert found.ceiling
    assert found.grams.value == pytest.approx(381 * found.kwh.value)
    assert found.tokens_a_month.value == pytest.approx(2500e6)


def test_measured_power_is_below_the_ceiling() -> None:
    ceiling, measured = cost(RATE, DEVICE, None).kwh, cost(RATE, DEVICE, PACKAGED[0])
    assert measured.kwh is not None
    assert ceiling is not None
    assert not measured.ceiling
    assert measured.kwh.value < ceiling.value
    assert measured.kwh.high <= ceiling.high


def test_two_devices_cost_twice() -> None:
    one, two = (cost(RATE, DEVICE, None, count=n, usd_per_hour=1.0) for n in (1, 2))
    assert one.usd is not None
    assert two.usd is not None
    assert two.usd.value == pytest.approx(2 * one.usd.value)


def test_what_is_not_known_stays_so() -> None:
    bare = Device("cuda", "x", "sm_90", {})
    assert cost(RATE, bare, None, usd_per_hour=1.0).kwh is None
    nothing = cost(None, DEVICE, None, usd_per_hour=1.0, where=MARKET)
    assert (nothing.usd, nothing.kwh, nothing.grams, nothing.tokens_a_month) == (None,) * 4


def test_ppp_dollars_are_not_divided_by_market_dollars() -> None:
    assert cost(RATE, DEVICE, None, usd_per_hour=1.0, where=PPP).tokens_a_month is None


def test_a_country_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table as codecarbon carries it, under its name."""
    data = tmp_path / "codecarbon" / "data" / "private_infra"
    data.mkdir(parents=True)
    (tmp_path / "codecarbon" / "__init__.py").touch()
    (tmp_path / "codecarbon-3.3.0.dist-info").mkdir()
    (tmp_path / "codecarbon-3.3.0.dist-info" / "METADATA").write_text("Name: codecarbon\nVersion: 3.3.0\n")
    table = {"KEN": {"country_name": "Kenya", "carbon_intensity": 70.5, "year": 2023}}
    (data / "global_energy_mix.json").write_text(json.dumps(table))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] in ("codecarbon", "median_income")]:
        monkeypatch.delitem(sys.modules, name)
    found = country("ken")
    assert (found.code, found.name) == ("KEN", "Kenya")
    assert found.grid == Sourced(70.5, "2023, Our World in Data, in codecarbon 3.3.0")
    with pytest.raises(ConfigError, match="unknown country 'QQQ'"):
        country("QQQ")


def test_a_missing_table_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm42c.runtime.plan.cost._folder", lambda package: None)
    with pytest.raises(ConfigError, match=r"pip install 'llm42c\[plan-cost\]'"):
        country("KE")

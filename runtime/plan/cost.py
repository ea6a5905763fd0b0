"""What a million tokens cost: money, energy, carbon; and what a median income buys. Every figure has its
source and year; what no source says is None, and said to be unknown."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm42c.codegen.device import Device
from llm42c.errors import ConfigError
from llm42c.runtime.plan.calibration import Calibration
from llm42c.runtime.plan.speed import Interval

MILLION = 1e6


@dataclass(frozen=True)
class Sourced:
    """A number, and who says so."""

    value: float
    source: str


@dataclass(frozen=True)
class Country:
    """``code``: of three letters. ``grid``: grams of CO2 equivalent a kWh. ``income``: a month's median; in
    PPP dollars if ``ppp``, else in market dollars."""

    code: str
    name: str
    grid: Sourced | None
    income: Sourced | None
    ppp: bool


@dataclass(frozen=True)
class Cost:
    """Of a million tokens. ``ceiling``: energy is that of the TDP, which is no less than what is drawn."""

    usd: Interval | None
    kwh: Interval | None
    grams: Interval | None
    ceiling: bool
    country: Country | None
    tokens_a_month: Interval | None  # that a month's median income buys, both in market dollars


def country(text: str) -> Country:
    """Of two or three letters. Raises ConfigError for one that no source has, or without the package."""
    grid, code, name = _grid(text)
    income, ppp = _income(code)
    return Country(code, name, grid, income, ppp)


def _grid(text: str) -> tuple[Sourced | None, str, str]:
    root = _folder("codecarbon")
    if root is None:
        raise ConfigError("--country needs codecarbon's tables: pip install 'llm42c[plan-cost]'")
    data: dict[str, Any] = json.loads((root / "data/private_infra/global_energy_mix.json").read_text())
    code = _letters(text, data)
    entry = data[code]
    version = importlib.metadata.version("codecarbon")
    source = f"{entry['year']}, Our World in Data, in codecarbon {version}"
    value = entry.get("carbon_intensity")
    return None if value is None else Sourced(float(value), source), code, str(entry["country_name"])


def _letters(text: str, data: dict[str, Any]) -> str:
    """Three letters of a country that is known by two or three, or by its English name."""
    wanted = text.strip().upper()
    if wanted in data:
        return wanted
    if importlib.util.find_spec("pycountry") is None:  # which codecarbon needs
        raise _unknown(text)
    import pycountry

    found = (
        pycountry.countries.get(alpha_2=wanted)
        if len(wanted) == 2
        else pycountry.countries.get(name=text.strip())
    )
    if found is None or found.alpha_3 not in data:
        raise _unknown(text)
    return str(found.alpha_3)


def _unknown(text: str) -> ConfigError:
    return ConfigError(f"unknown country {text!r}: give two or three letters, such as KE or KEN")


def _income(code: str) -> tuple[Sourced | None, bool]:
    if importlib.util.find_spec("median_income") is None:
        return None, False
    from median_income.lookup import lookup

    found = lookup(code)
    if found is None or isinstance(found, list):
        return None, False
    ppp = found.currency.endswith("PPP")
    yearly = found.median_income if ppp else found.median_income_usd
    who = "World Bank PIP" if ppp else "OECD"
    version = importlib.metadata.version("median-income")
    what = "a person's" if found.unit == "per_capita" else "an equivalised household's"
    source = f"{what}, {found.year}, {who}, in median-income {version}"
    return Sourced(yearly / 12, source), ppp


def _folder(package: str) -> Path | None:
    """Of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def cost(
    rate: Interval | None,
    device: Device,
    calibration: Calibration | None,
    *,
    count: int = 1,
    usd_per_hour: float | None = None,
    where: Country | None = None,
) -> Cost:
    """Of ``count`` devices that together make ``rate`` tokens a second, at full use."""
    seconds = None if rate is None else rate.over(MILLION)
    usd = None if seconds is None or usd_per_hour is None else seconds.map(count * usd_per_hour / 3600)
    tdp = device.values.get("tdp_watts")
    kwh, ceiling = None, True
    if seconds is not None and tdp is not None:
        full = seconds.map(count * tdp.value / 3.6e6)
        kwh = full
        if calibration is not None and calibration.power is not None:
            least, usual, most = calibration.power
            kwh, ceiling = Interval(full.low * least, full.value * usual, full.high * most), False
    grams = None if kwh is None or where is None or where.grid is None else kwh.map(where.grid.value)
    buys = None
    if usd is not None and where is not None and where.income is not None and not where.ppp:
        buys = usd.over(where.income.value * MILLION)
    return Cost(usd, kwh, grams, ceiling, where, buys)

"""The plan: a device, a model's needs on it, speed, cost and decisions, as one value that is printed and
kept."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from llm42c.errors import ConfigError
from llm42c.runtime.plan import calibration as calibrations
from llm42c.runtime.plan.calibration import Calibration
from llm42c.runtime.plan.cost import Cost, Country, cost, country
from llm42c.runtime.plan.decide import Decision, Fit, decisions, fit
from llm42c.runtime.plan.needs import Needs, needs
from llm42c.runtime.plan.settings import ENGINE, VERSION
from llm42c.runtime.plan.speed import Decode, Interval, Model, decode, first_token
from llm42c.runtime.plan.target import Target, resolve

BATCHES = (1, 8, 32)
PROMPT = 1024


@dataclass(frozen=True)
class Asked:
    """What a plan is made for. ``context``: tokens that a request is expected to have, prompt and output."""

    model: str
    device: str = "auto"
    dtype: str | None = None
    devices: int = 1
    usd_per_hour: float | None = None
    country: str | None = None
    context: int = 2048

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ConfigError(f"--devices must be positive, not {self.devices}")
        if self.context < 1:
            raise ConfigError(f"--context must be positive, not {self.context}")
        if self.usd_per_hour is not None and not 0 < self.usd_per_hour < float("inf"):
            raise ConfigError(f"--usd-per-hour must be positive, not {self.usd_per_hour:g}")


@dataclass(frozen=True)
class Plan:
    asked: Asked
    target: Target
    needs: Needs
    calibration: Calibration | None
    fit: Fit | None
    speeds: list[Decode]
    first_token: Interval | None
    cost: Cost
    decisions: list[Decision]

    def to_json(self) -> str:
        """With the engine's settings under ``engine``, as ``--plan`` reads them."""
        plain = dataclasses.asdict(self)
        plain["target"]["device"] = json.loads(self.target.device.to_json())
        settings = {d.name: d.value for d in self.decisions if d.name in ENGINE}
        return json.dumps({"version": VERSION, "engine": settings, **plain}, indent=1) + "\n"


def make(asked: Asked) -> Plan:
    """Raises DeviceTextError, ModelNotFoundError, UnsupportedModelError or ConfigError, in one line each."""
    where: Country | None = None if asked.country is None else country(asked.country)
    target = resolve(asked.device)
    wanted = needs(asked.model, asked.dtype)
    found = calibrations.of(target.device, wanted.dtype, tuple(wanted.formats))
    model = Model(target.device, found, asked.devices)
    room = fit(wanted, target.device, model, asked.devices)
    context = min(asked.context, wanted.context)
    decided = decisions(wanted, target.device, model, room, context)
    seqs = next(int(d.value) for d in decided if d.name == "max_num_seqs")
    chunk = next(int(d.value) for d in decided if d.name == "max_num_batched_tokens")
    batches = sorted({*(b for b in BATCHES if b < seqs), seqs})
    speeds = [decode(wanted, model, batch, context / 2) for batch in batches]
    paid = cost(
        speeds[-1].tokens_per_second,
        target.device,
        found,
        count=asked.devices,
        usd_per_hour=asked.usd_per_hour,
        where=where,
    )
    first = first_token(wanted, model, min(PROMPT, wanted.context), chunk)
    return Plan(asked, target, wanted, found, room, speeds, first, paid, decided)

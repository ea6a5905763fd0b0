"""A plan as a picture: speed against the device's limits, memory over requests, cost over use."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError
from llm42c.runtime.plan.decide import PROCESS
from llm42c.runtime.plan.plan import Plan
from llm42c.runtime.plan.speed import Model, decode

_BATCHES = tuple(2**i for i in range(9))


def draw(plan: Plan, path: Path) -> None:
    """Write three panels into ``path`` (.svg, .png, .pdf); a panel of what is not known says so.

    Raises ConfigError without matplotlib, for another kind of file, and where it cannot be written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'llm42c[plan]'")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    speed, memory, money = figure.subplots(1, 3)
    _speed(speed, plan)
    _memory(memory, plan)
    _money(money, plan)
    figure.suptitle(f"{plan.needs.model} ({plan.needs.dtype}) on {plan.target.device.name}")
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ConfigError(f"--plot: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _speed(axes: Any, plan: Plan) -> None:
    model = Model(plan.target.device, plan.calibration, plan.asked.devices)
    context = min(plan.asked.context, plan.needs.context) / 2
    steps = [decode(plan.needs, model, batch, context) for batch in _BATCHES]
    axes.loglog(_BATCHES, [s.most for s in steps], "--", color="grey", label="limit of bandwidth and rate")
    known = [s for s in steps if s.tokens_per_second is not None]
    if known:
        rates = [s.tokens_per_second for s in known if s.tokens_per_second is not None]
        batches = [s.batch for s in known]
        assert plan.calibration is not None
        axes.loglog(batches, [r.value for r in rates], label=plan.calibration.name)
        axes.fill_between(batches, [r.low for r in rates], [r.high for r in rates], alpha=0.2)
    axes.set(
        xlabel="requests that decode",
        ylabel="tokens a second",
        title="speed" if known else "speed: not known",
    )
    axes.legend()


def _memory(axes: Any, plan: Plan) -> None:
    context = min(plan.asked.context, plan.needs.context)
    process = PROCESS if plan.fit is None else plan.fit.process
    base = (plan.needs.weights / plan.asked.devices + process) / 1e9
    kv = [batch * context * plan.needs.kv_per_token / plan.asked.devices / 1e9 for batch in _BATCHES]
    axes.plot(
        _BATCHES, [base + size for size in kv], label=f"weights, process, KV of {context:,} tokens each"
    )
    if plan.fit is not None:
        axes.axhline(plan.fit.memory / 1e9, linestyle="--", color="grey", label="memory of a device")
    axes.set(xlabel="requests at once", ylabel="GB", title="memory of a device", xscale="log")
    axes.legend()


def _money(axes: Any, plan: Plan) -> None:
    usd = plan.cost.usd
    if usd is None:
        axes.set(title="cost: not known", xlabel="use of the device")
        return
    shares = [i / 20 for i in range(1, 21)]
    axes.plot(shares, [usd.value / share for share in shares])
    axes.fill_between(shares, [usd.low / s for s in shares], [usd.high / s for s in shares], alpha=0.2)
    axes.set(xlabel="use of the device", ylabel="$ a million tokens", title="cost", yscale="log")

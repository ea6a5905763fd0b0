"""Seconds of a step, tokens a second and the time to a first token: intervals, or that they are not known."""

from __future__ import annotations

from dataclasses import dataclass

from llm42c.codegen.device import Device
from llm42c.runtime.plan.calibration import Calibration
from llm42c.runtime.plan.needs import Needs


@dataclass(frozen=True)
class Interval:
    """``value`` between ``low`` and ``high``."""

    low: float
    value: float
    high: float

    def map(self, scale: float) -> Interval:
        return Interval(self.low * scale, self.value * scale, self.high * scale)

    def over(self, what: float) -> Interval:
        """``what`` divided by it."""
        return Interval(what / self.high, what / self.value, what / self.low)


@dataclass(frozen=True)
class Work:
    """What a step of so many tokens reads and computes. ``context``: keys and values of each sequence."""

    nbytes: float
    operations: float


def work(needs: Needs, tokens: int, sequences: int, context: float) -> Work:
    """A step of ``tokens`` of ``sequences``, each with ``context`` tokens of keys and values."""
    kv = sequences * context * needs.kv_per_token
    # Scores and sums of values: two products of the context with each token, of every head; bounded by KV
    # heads times what shares them, which the configuration need not say: hidden size a layer.
    attention = 4.0 * tokens * context * needs.hidden * needs.layers
    return Work(needs.read + kv, 2.0 * needs.products * tokens + attention)


@dataclass(frozen=True)
class Model:
    """A device, what is known of its speed, and ``count`` of them that divide the work."""

    device: Device
    calibration: Calibration | None
    count: int = 1

    @property
    def rate(self) -> float | None:
        """Operations a second that the calibration is of."""
        if self.calibration is not None and self.calibration.rate is not None:
            return self.calibration.rate
        known = self.device.values.get("bf16_flops")
        return None if known is None else known.value

    def step(self, done: Work) -> Interval | None:
        """Seconds; None where no calibration is of this device."""
        c, rate = self.calibration, self.rate
        if c is None or rate is None:
            return None
        bandwidth = self.device.get("memory_bandwidth")
        seconds = (
            c.constant
            + c.memory_share * done.nbytes / self.count / bandwidth
            + c.compute_share * done.operations / self.count / rate
        )
        return Interval(seconds * c.low, seconds, seconds * c.high)

    def limit(self, done: Work) -> float:
        """Seconds that no engine goes below: all bytes once, all operations once."""
        least = done.nbytes / self.count / self.device.get("memory_bandwidth")
        rate = self.device.values.get("bf16_flops")
        return least if rate is None else max(least, done.operations / self.count / rate.value)


@dataclass(frozen=True)
class Decode:
    """A decoding step of ``batch`` sequences. ``most``: tokens a second that the device's limits allow."""

    batch: int
    seconds: Interval | None
    tokens_per_second: Interval | None
    most: float


def decode(needs: Needs, model: Model, batch: int, context: float) -> Decode:
    done = work(needs, batch, batch, context)
    seconds = None if needs.sparse else model.step(done)
    rate = None if seconds is None else seconds.over(float(batch))
    return Decode(batch, seconds, rate, batch / model.limit(done))


def first_token(needs: Needs, model: Model, prompt: int, chunk: int) -> Interval | None:
    """Seconds to the first token of a prompt that runs alone in chunks; None where nothing like it was
    timed."""
    if model.calibration is None or not model.calibration.prefill or needs.sparse:
        return None
    low = value = high = 0.0
    for begin in range(0, prompt, chunk):
        tokens = min(chunk, prompt - begin)
        part = model.step(work(needs, tokens, 1, begin + tokens / 2))
        if part is None:
            return None
        low, value, high = low + part.low, value + part.value, high + part.high
    return Interval(low, value, high)

"""The sizes that an engine should have on a device. None of them changes a bit: what is part of the contract
(``verify_tokens``, ``verify_seqs``, ``verify_rows``, ``page_size``) is not decided here."""

from __future__ import annotations

from dataclasses import dataclass

from llm42c.codegen.device import Device
from llm42c.errors import ConfigError
from llm42c.runtime.plan.needs import Needs
from llm42c.runtime.plan.speed import Model, decode, work

FREE = 0.1  # of memory that is left to others
PROCESS = 1 << 30  # bytes of a process beside weights, keys and values, where no calibration knows better
GAIN = 1.1  # what twice as many requests at once must bring
MOST_SEQS, LEAST_SEQS = 256, 8
DEFAULT_SEQS, DEFAULT_TOKENS = 32, 512  # where the speed is not known
MOST_TOKENS = 8192
BUSY = 4.0  # operations of a step over everything else in it, at which it is full
WINDOW, WINDOW_PRICE = 4, 1.25  # a window of so many guesses may cost so many steps
PAGE = 16


@dataclass(frozen=True)
class Decision:
    """``value`` of the engine's setting ``name``, and why."""

    name: str
    value: int | str
    why: str


@dataclass(frozen=True)
class Fit:
    """Bytes on each of ``count`` devices. ``free``: what keys and values may take."""

    memory: float
    weights: float
    process: float
    free: float


def fit(needs: Needs, device: Device, model: Model, count: int) -> Fit | None:
    """What lies where; None if the memory of the device is not known. Raises ConfigError for a model that is
    too large, which names how many devices hold it."""
    known = device.values.get("memory_bytes")
    if known is None:
        return None
    base = model.calibration.base_bytes if model.calibration is not None else None
    process = PROCESS if base is None else base[1]
    weights = needs.weights / count
    free = known.value * (1 - FREE) - weights - process
    least = PAGE * needs.kv_per_token
    if free < least / count:
        room = known.value * (1 - FREE) - process
        enough = -(-needs.weights // int(room)) if room > 0 else 0
        hint = f"; {enough} of them hold its weights: --devices {enough}" if enough > count else ""
        raise ConfigError(
            f"{needs.model} does not fit: weights of {needs.weights / 1e9:.3g} GB, and "
            f"{known.value / 1e9:.3g} GB on "
            f"{'each of ' if count > 1 else ''}{device.name}{hint}"
        )
    return Fit(known.value, weights, process, free)


def decisions(needs: Needs, device: Device, model: Model, found: Fit | None, context: int) -> list[Decision]:
    """Of every size that is decided. ``context``: tokens that a request is expected to have."""
    seqs = _seqs(needs, model, found, context)
    tokens = _tokens(needs, model, int(seqs.value))
    made = [seqs, tokens, _kv(needs, found, int(seqs.value), context, model.count)]
    cores = device.values.get("cores")
    if cores is not None:
        made.append(
            Decision("threads", int(cores.value), "as many as there are cores, which is what torch takes")
        )
    made.append(_speculate(needs, model, context))
    return [m for m in made if m.value]


def _seqs(needs: Needs, model: Model, found: Fit | None, context: int) -> Decision:
    most = MOST_SEQS
    if found is not None:
        most = max(1, min(most, int(found.free * model.count / (context * needs.kv_per_token))))
    best, rate = 1, 0.0
    while best <= most:
        step = decode(needs, model, best, context).tokens_per_second
        if step is None:
            held = min(DEFAULT_SEQS, most)
            return Decision("max_num_seqs", held, "the default: the speed of this device is not known")
        if best > LEAST_SEQS and step.value < GAIN * rate:
            break
        rate, best = step.value, best * 2
    best = min(best // 2, most)
    why = f"twice as many bring less than {GAIN - 1:.0%}" if best < most else "as many as memory holds"
    return Decision("max_num_seqs", max(best, min(DEFAULT_SEQS, most)), why)


def _tokens(needs: Needs, model: Model, seqs: int) -> Decision:
    """So many that products, not weights, fill a step; a multiple of what fits them."""
    size = DEFAULT_TOKENS
    c, rate = model.calibration, model.rate
    if c is None or rate is None:
        return Decision(
            "max_num_batched_tokens", max(size, seqs), "the default: the speed of this device is not known"
        )
    while size < MOST_TOKENS:
        done = work(needs, size, 1, 0)
        rest = c.constant + c.memory_share * done.nbytes / model.count / model.device.get("memory_bandwidth")
        if c.compute_share * done.operations / model.count / rate >= BUSY * rest:
            break
        size *= 2
    return Decision(
        "max_num_batched_tokens", max(size, seqs), f"a step's products take {BUSY:g} times the rest, or more"
    )


def _kv(needs: Needs, found: Fit | None, seqs: int, context: int, count: int) -> Decision:
    if found is None:
        return Decision("kv_cache_bytes", 0, "")
    page = PAGE * needs.kv_per_token
    useful = seqs * min(context, needs.context) * needs.kv_per_token
    size = int(min(found.free * count, useful)) // page * page
    why = (
        f"{seqs} requests of {context:,} tokens"
        if size < found.free * count * 0.99
        else f"what is free of {found.memory / 1e9:.3g} GB"
    )
    return Decision("kv_cache_bytes", max(page, size), why)


def _speculate(needs: Needs, model: Model, context: int) -> Decision:
    one, window = (model.step(work(needs, n, 1, context)) for n in (1, WINDOW + 1))
    if one is None or window is None or needs.sparse:
        return Decision("speculate", "off", "the default: the speed of this device is not known")
    price = window.value / one.value
    told = f"a window of {WINDOW} guesses costs {price:.2f} steps"
    return Decision("speculate", "ngram" if price <= WINDOW_PRICE else "off", told)

"""Time the steps of an engine on this machine, and fit the coefficients by which its speed is predicted."""

from __future__ import annotations

import datetime
import random
import resource
import statistics
import time
from collections.abc import Iterator

from llm42c.codegen.device import Device
from llm42c.runtime.engine import Engine
from llm42c.runtime.plan.calibration import Calibration, Observation, fit
from llm42c.runtime.plan.needs import Needs
from llm42c.runtime.plan.speed import work
from llm42c.runtime.sampling import SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32)
CONTEXTS = (16, 256)
PROMPTS = (64, 128, 256, 512)
STEPS, WARM = 16, 4
RATE = 1e12  # operations a second that compute_share is of: no driver tells a CPU's
MARGIN = 0.05  # beyond what the fit got wrong


def calibrate(engine: Engine, needs: Needs, device: Device) -> Calibration:
    """Of an idle engine, whose shapes are compiled meanwhile; takes about a minute for a small model."""
    engine.certify()  # else steps whose shapes are still unknown would be verified, and timed with that
    seen = list(_observations(engine, needs))
    bandwidth = device.get("memory_bandwidth")
    constant, memory, compute = fit(seen, bandwidth, RATE)
    ratios = [
        o.seconds / (constant + memory * o.nbytes / bandwidth + compute * o.operations / RATE) for o in seen
    ]
    base = _base(engine, needs)
    today = datetime.date.today().isoformat()
    return Calibration(
        name=f"{needs.model} here",
        source=f"llm42 on {device.name}, {len(seen)} steps of {needs.model} in {needs.dtype}, {today}",
        devices=(device.name,),
        constant=constant,
        memory_share=memory,
        compute_share=compute,
        low=min(ratios) * (1 - MARGIN),
        high=max(ratios) * (1 + MARGIN),
        prefill=True,
        weights=(needs.weights / 2, needs.weights * 2.0),
        rate=RATE,
        base_bytes=(0.95 * base, 1.05 * base),
        dtype=needs.dtype,
        formats=tuple(sorted(needs.formats)),
    )


def _observations(engine: Engine, needs: Needs) -> Iterator[Observation]:
    source = random.Random(0)
    limit = engine.limits.max_model_len
    for context in CONTEXTS:
        for batch in [b for b in BATCHES if _fits(engine, b, context)]:
            _decode(engine, needs, source, batch, context, WARM)  # shapes that run for the first time
            yield _decode(engine, needs, source, batch, context, STEPS)
    for prompt in [p for p in PROMPTS if p <= engine.config.max_num_batched_tokens and p < limit]:
        _prefill(engine, needs, source, prompt)
        yield _prefill(engine, needs, source, prompt)


def _fits(engine: Engine, batch: int, context: int) -> bool:
    """Whether so many requests can decode at once, with keys and values of all of them in memory."""
    limits, whole = engine.limits, context + _new_tokens(batch, STEPS)
    pages = batch * (-(-whole // limits.page_size) + 1)
    return batch <= engine.config.max_num_seqs and whole < limits.max_model_len and pages <= limits.num_pages


def _new_tokens(batch: int, steps: int) -> int:
    """The first requests decode while the last ones are still in their prompts."""
    return steps + 16 + 4 * batch


def _prompt(engine: Engine, source: random.Random, tokens: int) -> list[int]:
    return [source.randrange(engine.limits.vocab_size) for _ in range(tokens)]


def _decode(
    engine: Engine, needs: Needs, source: random.Random, batch: int, context: int, steps: int
) -> Observation:
    """The median of ``steps`` steps in which every request decodes."""
    params = SamplingParams(max_tokens=_new_tokens(batch, steps), ignore_eos=True)
    ids = [engine.submit(_prompt(engine, source, context), params) for _ in range(batch)]
    begun: set[str] = set()
    while len(begun) < batch:
        begun |= {output.request_id for output in engine.step() if output.new_token_ids}
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch:
            seconds.append(time.perf_counter() - start)
    for request in ids:
        engine.abort(request)
    done = work(needs, batch, batch, context + steps / 2)
    return Observation(done.nbytes, done.operations, statistics.median(seconds))


def _prefill(engine: Engine, needs: Needs, source: random.Random, prompt: int) -> Observation:
    """A prompt that runs alone in one step, twice; the shorter time."""
    seconds = []
    for _ in range(2):
        engine.submit(_prompt(engine, source, prompt), SamplingParams(max_tokens=1, ignore_eos=True))
        start = time.perf_counter()
        while engine.has_unfinished():
            engine.step()
        seconds.append(time.perf_counter() - start)
    done = work(needs, prompt, 1, prompt / 2)
    return Observation(done.nbytes, done.operations, min(seconds))


def _base(engine: Engine, needs: Needs) -> float:
    """What the process takes at its peak beside weights, keys and values."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pages = engine.limits.num_pages * engine.limits.page_size * needs.kv_per_token
    return float(max(0, peak - needs.weights - pages))

"""Probes while pages are scarce: shapes become certified all the same, and every request gets its turn."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from toy import VOCAB, NoisyModel, make_engine, reference, small_config

from llm42c.runtime import engine as engine_module
from llm42c.runtime.certificates import Certificates
from llm42c.runtime.engine import Engine
from llm42c.runtime.sampling import SamplingParams

PAGES = 24
TOKENS = 30
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
PROMPTS = [[(11 * i + 5 * j) % VOCAB for j in range(5 + 3 * i)] for i in range(5)]
RIGHT = [reference(p, TOKENS, frozenset()) for p in PROMPTS]
CONFIG = small_config(num_pages=PAGES, prefix_cache=False, audit_fraction=0.0)


@dataclasses.dataclass
class Served:
    """What a server under pressure did."""

    engine: Engine
    shares: list[float]  # of the tokens of each fifth of the steps, how many were certified
    longest_wait: int = 0  # steps from submission to the first token


def _serve(engine: Engine, steps: int = 1000, waiting: int = 3) -> Served:
    """`steps` steps with `waiting` requests in the queue at any time. Checks every answer, and the pages."""
    served, pool = Served(engine, []), engine._pool
    which: dict[str, int] = {}
    since: dict[str, int] = {}
    before = engine.stats().certified_tokens, engine.stats().verified_tokens
    for step in range(steps):
        while len(engine._scheduler.waiting) < waiting:
            i = len(which) % len(PROMPTS)
            request_id = engine.submit(PROMPTS[i], PARAMS)
            which[request_id], since[request_id] = i, step
        for output in engine.step():
            if output.request_id in since:
                served.longest_wait = max(served.longest_wait, step - since.pop(output.request_id))
            if output.finished:
                assert output.token_ids == RIGHT[which[output.request_id]]
        held = sum(refs > 0 for refs in pool.refs) + len(pool._borrowed) + len(pool._free) + len(pool._idle)
        assert held == pool.num_pages, "pages beyond the budget, or lost"
        served.longest_wait = max([served.longest_wait, *(step - s for s in since.values())])
        if (step + 1) % (steps // 5) == 0:
            now = engine.stats().certified_tokens, engine.stats().verified_tokens
            certified, verified = (a - b for a, b in zip(now, before, strict=True))
            served.shares.append(certified / (certified + verified))
            before = now
    return served


def test_a_server_under_constant_pressure_becomes_certified() -> None:
    served = _serve(make_engine(config=CONFIG, check=True))
    assert served.shares[1:] == [1.0] * 4, served.shares
    assert served.engine.stats().preemptions > 10, "vacuous: there were pages enough"
    assert served.longest_wait < 150


def test_negative_control_a_probe_that_only_waits_finds_no_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Certificates, "reserve", lambda self, num_running: 0)
    served = _serve(make_engine(config=CONFIG))
    assert served.shares == [0.0] * 5


def _one_long_request() -> tuple[Engine, int]:
    """A request that alone leaves a probe too few pages, almost from its beginning; and its steps."""
    engine = make_engine(config=dataclasses.replace(CONFIG, num_pages=40))
    prompt = [(7 * j) % VOCAB for j in range(100)]
    engine.submit(prompt, SamplingParams(max_tokens=55, ignore_eos=True), stream=False)
    for steps in itertools.count(1):
        for output in engine.step():
            assert output.token_ids == reference(prompt, 55, frozenset())
            return engine, steps
    raise AssertionError


def test_a_probe_takes_pages_from_requests_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, steps = _one_long_request()
    assert engine.stats().preemptions == 1
    assert engine.stats().certified_tokens > 20
    monkeypatch.setattr(engine_module, "PROBE_PATIENCE", 10**9)
    waits, fewer = _one_long_request()
    assert waits.stats().certified_tokens == 0, "vacuous: there were pages enough"
    assert steps < 2 * fewer + 40


# -- certificates of other engines ---------------------------------------------------------------------------


def test_what_a_probe_with_more_pages_found_serves_an_engine_with_fewer(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, certificates_path=str(tmp_path), certify="startup")
    rich = make_engine(config=dataclasses.replace(config, num_pages=512), check=True)
    scarce = make_engine(config=dataclasses.replace(config, num_pages=PAGES, certify="lazy"), check=True)
    assert scarce.certificates.status == rich.certificates.status
    assert scarce.certificates.verifier_checked
    assert len(list(tmp_path.glob("*.json"))) == 1
    served = _serve(scarce, 100)
    assert served.shares == [1.0] * 5
    assert scarce.stats().probes == 0


def test_what_a_probe_with_fewer_pages_found_is_probed_again_by_an_engine_with_more(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, certificates_path=str(tmp_path), certify="startup")
    differs = NoisyModel(noisy=lambda tokens, call: tokens == 6, flip=0.0)
    scarce = make_engine(differs, config, check=True)
    assert scarce.certificates.status[6, 6] == "speculative"
    rich = make_engine(differs, dataclasses.replace(config, num_pages=512, certify="lazy"), check=True)
    assert not rich.certificates.verifier_checked
    assert set(rich.certificates.status.values()) == {"speculative"}, "a difference counts whoever found it"
    rich.certify()
    assert rich.certificates.status == scarce.certificates.status
    again = make_engine(differs, dataclasses.replace(config, certify="lazy"), check=True)
    assert again.certificates.status == rich.certificates.status


def test_more_pages_than_a_probe_can_use_make_no_stronger_one(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, certificates_path=str(tmp_path), certify="startup", num_pages=600)
    first = make_engine(config=config, check=True)
    larger = dataclasses.replace(config, num_pages=2000, certify="lazy")
    assert make_engine(config=larger, check=True).certificates.status == first.certificates.status

"""Certificates by construction: no probe up front, and a graph that lies about its rows is found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import VOCAB, NoisyModel, ToyModel, ToySampler, make_engine, reference, small_config

from llm42c.errors import IntegrityError
from llm42c.runtime import engine as engine_module
from llm42c.runtime.engine import Engine
from llm42c.runtime.sampling import SamplingParams

PROMPTS = [[(11 * i + 5 * j) % VOCAB for j in range(5 + 3 * i)] for i in range(6)]
TOKENS = 180
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


def build(fast: ToyModel | None = None, verifier: ToyModel | None = None, **changes: object) -> Engine:
    """An engine whose graphs say that they are row independent by construction, true or not."""
    config = small_config(**({"num_pages": 400} | changes))
    verifier = verifier or ToyModel()
    verifier.fixed = (config.verify_tokens, config.verify_seqs, config.rows)
    fast = fast or ToyModel()
    for model in (fast, verifier):
        model.dependence, model.digest = None, "constructed"
    return Engine(fast, verifier, config, sampler=ToySampler())  # type: ignore[arg-type]


def answers(engine: Engine) -> list[list[int]]:
    return [o.token_ids for o in engine.generate(PROMPTS, PARAMS)]


EXPECTED = [reference(prompt, TOKENS, frozenset()) for prompt in PROMPTS]


def liar() -> NoisyModel:
    """Its bits depend on the batch: at 6 tokens, from the third call on."""
    return NoisyModel(noisy=lambda tokens, call: tokens == 6 and call > 2, flip=0.3)


@pytest.fixture
def spot_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as there is a step."""
    monkeypatch.setattr(engine_module, "SPOT_SHARE", 1e9)


@pytest.fixture
def no_spot_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "SPOT_SHARE", 0.0)


@pytest.mark.usefixtures("no_spot_checks")
def test_nothing_is_probed_and_everything_commits() -> None:
    engine = build()
    assert set(engine.certificates.states().values()) == {"certified by construction"}
    assert set(engine.certificates.states()) == set(engine.config.shapes())
    assert answers(engine) == EXPECTED
    stats = engine.stats()
    assert (stats.probes, stats.spot_checks, stats.verified_tokens) == (0, 0, 0)
    assert stats.certified_share == 1.0


@pytest.mark.parametrize("which", ["fast", "verifier", "digest"])
def test_one_graph_that_does_not_say_so_is_probed(which: str) -> None:
    config = small_config()
    fast, verifier = ToyModel(), ToyModel(fixed=(config.verify_tokens, config.verify_seqs, config.rows))
    fast.dependence = "a call" if which == "fast" else None
    verifier.dependence = "a call" if which == "verifier" else None
    fast.digest = "another" if which == "digest" else verifier.digest
    engine = Engine(fast, verifier, config, sampler=ToySampler())  # type: ignore[arg-type]
    assert not engine.certificates.states()
    assert engine.certificates.verifier_checked == (which != "verifier")
    assert answers(engine) == EXPECTED
    assert engine.stats().probes > 0


@pytest.mark.usefixtures("no_spot_checks")
def test_the_liar_lies() -> None:
    """Negative control: with neither spot checks nor audits its tokens are other ones."""
    assert answers(build(liar(), audit_fraction=0.0)) != EXPECTED


@pytest.mark.usefixtures("spot_checks")
def test_a_spot_check_finds_the_liar(caplog: pytest.LogCaptureFixture) -> None:
    engine = build(liar(), audit_fraction=0.0)
    assert answers(engine) == EXPECTED
    stats = engine.stats()
    assert (stats.audits, stats.revocations) == (0, 1)
    assert "spot check found other bits" in caplog.text
    states = engine.certificates.states()
    assert "revoked" in states.values()
    assert "certified by construction" not in states.values(), "what was shown wrong is still believed"
    assert {shape[0] for shape, state in states.items() if state == "revoked"} == {6}


@pytest.mark.usefixtures("no_spot_checks")
def test_an_audit_finds_the_liar() -> None:
    engine = build(liar(), audit_fraction=0.5)
    assert answers(engine) == EXPECTED
    assert engine.stats().revocations == 1
    assert "certified by construction" not in engine.certificates.states().values()


class _Neighbours(ToyModel):
    """The last row's bits depend on how many rows stand before it."""

    def disturb_logits(self, batch: Any, logits: Any) -> Any:
        if batch.n:
            logits[batch.rows == batch.n - 1, 1] += batch.n * 2.0**-18
        return logits


@pytest.mark.usefixtures("spot_checks")
def test_a_verifier_graph_that_lies_is_convicted(tmp_path: Path) -> None:
    engine = build(_Neighbours(), _Neighbours(), certificates_path=str(tmp_path))
    with pytest.raises(IntegrityError, match="not row independent"):
        answers(engine)
    with pytest.raises(IntegrityError, match="found before"):
        build(_Neighbours(), _Neighbours(), certificates_path=str(tmp_path))


@pytest.mark.usefixtures("spot_checks")
def test_a_revocation_is_remembered(tmp_path: Path) -> None:
    answers(build(liar(), audit_fraction=0.0, certificates_path=str(tmp_path)))
    later = build(certificates_path=str(tmp_path))
    assert "revoked" in later.certificates.states().values()
    assert "certified by construction" not in later.certificates.states().values()


@pytest.mark.usefixtures("spot_checks")
def test_what_was_spot_checked_is_kept_as_probed(tmp_path: Path) -> None:
    engine = build(certificates_path=str(tmp_path))
    assert answers(engine) == EXPECTED
    checked = {s for s, state in engine.certificates.states().items() if state == "certified"}
    assert checked, "no spot check came to its end"
    assert engine.stats().spot_checks == 1 + len(checked)
    later = build(certificates_path=str(tmp_path)).certificates.states()
    assert {s for s, state in later.items() if state == "certified"} == checked
    assert set(later.values()) == {"certified", "certified by construction"}


def test_spot_checks_keep_to_their_share_of_the_time() -> None:
    engine, most = build(), 0.0
    for _ in range(4):
        for prompt in PROMPTS:
            engine.submit(prompt, PARAMS)
        while engine.has_unfinished():
            engine.step()
            stats = engine.stats()
            # A forward that took longer than any before it is known to be so long afterwards only.
            late = engine._longest_spot
            assert stats.seconds_spot <= engine_module.SPOT_SHARE * stats.seconds_total + late
            most = max(most, stats.seconds_spot)
    assert most > 0, "there was none"


def test_the_complete_probe_on_request() -> None:
    engine = build(certify="startup")
    assert engine.stats().probes == 0
    engine.certify(full=True)
    assert set(engine.certificates.states().values()) == {"certified"}
    assert engine.stats().probes == len(engine.config.shapes())

    engine = build(NoisyModel(noisy=lambda tokens, call: tokens == 8, flip=0.0))
    engine.certify(full=True)
    states = engine.certificates.states()
    assert {shape[0] for shape, state in states.items() if state == "revoked"} == {8}
    assert "certified by construction" not in states.values()


@pytest.mark.usefixtures("spot_checks")
def test_requests_do_not_wait_for_a_spot_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few pages: the spot check is put off, nobody is preempted for it, and no admission is held up."""
    engine = build(num_pages=8)
    outputs = engine.generate(PROMPTS[:1], SamplingParams(max_tokens=20, ignore_eos=True))
    assert outputs[0].token_ids == EXPECTED[0][:20]
    assert engine.stats().preemptions == 0
    assert not engine.certificates._short


def test_exactness_does_not_hang_on_the_toy() -> None:
    assert answers(make_engine()) == EXPECTED

"""Certificates: what probing finds, what is kept, what an audit takes back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from toy import VOCAB, NoisyModel, ToyModel, ToySampler, make_engine, reference, small_config, solo

from llm42c.capture.packed import KVCache
from llm42c.errors import ConfigError, IntegrityError
from llm42c.runtime import probe
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams

PROMPTS = [[(11 * i + 5 * j) % VOCAB for j in range(5 + 3 * i)] for i in range(6)]
PARAMS = SamplingParams(max_tokens=40, ignore_eos=True)


def test_every_shape_of_an_exact_model_is_certified() -> None:
    config = small_config(certify="startup")
    engine = make_engine(config=config)
    assert set(engine.certificates.status) == set(config.shapes())
    assert set(engine.certificates.status.values()) == {"certified"}


def test_the_scheduler_runs_no_shape_that_start_up_does_not_probe() -> None:
    config = small_config(certify="startup")
    engine = make_engine(config=config)
    fast = engine._fast
    assert isinstance(fast, ToyModel)
    fast.shapes.clear()
    for deterministic in (True, False):
        engine.generate(PROMPTS * 2, SamplingParams(max_tokens=13), deterministic)
    assert {(t, r) for t, _, r in fast.shapes} <= set(config.shapes())


@pytest.mark.parametrize("bad", [1, 3, 8, 24])
def test_a_shape_that_differs_is_speculative(bad: int) -> None:
    fast = NoisyModel(noisy=lambda tokens, call: tokens == bad, flip=0.0)
    engine = make_engine(fast, small_config(certify="startup"))
    for (tokens, _), status in engine.certificates.status.items():
        assert status == ("speculative" if tokens == bad else "certified")


class _Culprit(ToyModel):
    """Wrong in one respect only."""

    kind = ""

    def disturb_states(self, batch, h):  # type: ignore[no-untyped-def]
        if self.kind == "kv of one row":
            h = h.copy()
            h[-1] ^= 1
        return h

    def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
        row = batch.rows.astype(np.int64)
        where = {
            "last row": row == batch.n - 1,
            "position": batch.positions[row] > 200,
            "decode": np.isin(batch.seq_of_row[row], np.flatnonzero(np.diff(batch.cu) == 1)),
            "kv of one row": np.zeros(len(row), dtype=bool),
        }[self.kind]
        logits[where, 1] += np.float32(2.0**-18)
        return logits


@pytest.mark.parametrize("kind", ["last row", "position", "decode", "kv of one row"])
def test_a_difference_in_one_respect_is_found(kind: str) -> None:
    fast = _Culprit()
    fast.kind = kind
    engine = make_engine(fast, small_config(certify="startup", num_pages=512))
    assert engine.certificates.status[8, 8] == "speculative"


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (24, 2), (24, 8), (512, 32), (300, 32)])
@pytest.mark.parametrize("kind", range(6))
def test_compositions_fit_their_shape(shape: tuple[int, int], kind: int) -> None:
    rng = np.random.default_rng(kind)
    for num_seqs, max_len in ((1, 64), (6, 256), (32, 4096)):
        sizes = probe.lengths(max_len, 10**4, 16)
        cuts = probe.compose(rng, kind, shape, num_seqs, sizes, 10**4, 16)
        assert 1 <= len(cuts) <= num_seqs
        assert 1 <= sum(c.end - c.start for c in cuts) <= shape[0]
        assert sum(c.rows for c in cuts) <= shape[1]
        for cut in cuts:
            assert 0 <= cut.start < cut.end <= sizes[cut.source]
            assert 0 <= cut.rows <= cut.end - cut.start
        if kind % 3 != 2 and num_seqs == 32:
            assert sum(c.end - c.start for c in cuts) == shape[0], "the bucket is not filled"


@pytest.mark.parametrize("kind", ["last row", "decode", "kv of one row"])
@pytest.mark.parametrize("num_pages", [3, 6, 14, 40])
def test_a_small_pool_shortens_probes_and_they_still_find_a_difference(kind: str, num_pages: int) -> None:
    fast = _Culprit()
    fast.kind = kind
    engine = make_engine(fast, small_config(certify="startup", num_pages=num_pages), check=True)
    assert engine.certificates.status[2, 2] == "speculative"
    exact = make_engine(config=small_config(certify="startup", num_pages=num_pages), check=True)
    assert set(exact.certificates.status.values()) == {"certified"}


@pytest.mark.parametrize("page_size", [1, 4, 16, 64])
def test_reference_sequences_leave_room_for_a_composition(page_size: int) -> None:
    for num_pages in (*range(probe.LEAST_PAGES, 40), 100, 256, 600):
        for max_len in (1, 40, 150, 4096):
            sizes = probe.lengths(max_len, num_pages, page_size)
            used = probe.num_pages(sizes, page_size)
            assert min(sizes) >= 1
            assert 2 * used + 1 <= num_pages
            assert used <= max(1, num_pages // 4)
            room = num_pages - 2 * used
            for kind in range(3):
                cuts = probe.compose(np.random.default_rng(kind), kind, (24, 8), 6, sizes, room, page_size)
                assert cuts
                assert sum(c.num_pages(page_size) for c in cuts) <= room


def test_a_pool_too_small_to_compare_anything_is_refused() -> None:
    with pytest.raises(ConfigError, match="the KV budget holds 2 pages, and comparing graphs takes 3; raise"):
        make_engine(config=small_config(num_pages=2))


def test_probing_takes_no_memory_of_its_own() -> None:
    caches = []

    class Counting(ToyModel):
        def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
            caches.append(num_pages)
            return super().new_kv_cache(num_pages, page_size)

    config = small_config(num_pages=20)
    verifier = Counting(fixed=(config.verify_tokens, config.verify_seqs, config.rows))
    engine = Engine(Counting(), verifier, config, sampler=ToySampler())
    engine.certify()
    outputs = engine.generate(PROMPTS, PARAMS)
    assert [o.token_ids for o in outputs] == [reference(p, 40, frozenset()) for p in PROMPTS]
    assert engine.stats().probes > 3
    assert caches == [20]
    assert engine._pool.num_free == 20


def test_requests_take_pages_back_from_a_probe_which_begins_anew() -> None:
    engine = make_engine(config=small_config(num_pages=16, certify="startup"))
    engine.certificates.status.clear()
    engine.certificates.want((24, 8))
    engine.certificates.advance()
    recalls = engine._pool.recalls
    assert engine._pool._borrowed
    params = SamplingParams(max_tokens=15, ignore_eos=True)
    outputs = engine.generate(PROMPTS, params)
    assert engine._pool.recalls > recalls, "vacuous: there were pages enough"
    assert [o.token_ids for o in outputs] == [reference(p, 15, frozenset()) for p in PROMPTS]
    engine.certificates.settle()
    assert engine.certificates.status[24, 8] == "certified"


def test_a_check_of_the_verifier_that_finds_no_pages_gets_them_from_the_next_that_end() -> None:
    engine = make_engine(config=small_config(num_pages=16, prefix_cache=False), check=True)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    ordinary = [engine.submit(PROMPTS[i % 6], params, deterministic=False) for i in range(4)]
    for _ in range(9):
        engine.step()
    mine = engine.submit(PROMPTS[2], SamplingParams(max_tokens=8, ignore_eos=True))
    starved, done = 0, {}
    while mine not in done:
        engine.submit(PROMPTS[0], params, deterministic=False)  # traffic that never ends
        done |= {o.request_id: o for o in engine.step() if o.finished}
        starved += engine.certificates.waited > 0
        assert len(done) < 40, "the check never got its pages"
    assert starved, "vacuous: there were pages enough"
    assert done[mine].token_ids == reference(PROMPTS[2], 8, frozenset())
    assert set(ordinary) & set(done)


def test_certificates_survive_a_restart(tmp_path: Path) -> None:
    config = small_config(certificates_path=str(tmp_path), certify="startup")
    fast = NoisyModel(noisy=lambda tokens, call: tokens < 4)
    first = make_engine(fast, config, check=True)
    (file,) = tmp_path.glob("*.json")
    again = ToyModel(digest="noisy")
    second = make_engine(again, config, check=True)
    assert second.certificates.status == first.certificates.status
    assert second.certificates.verifier_checked
    assert again.calls == 0, "probed again"
    other = make_engine(ToyModel(digest="other graph"), config, check=True)
    assert set(other.certificates.status.values()) == {"certified"}
    for text in (
        "",
        "{",
        "[]",
        '{"shapes": 3}',
        json.dumps({"shapes": {"1x1": "maybe"}, "pages": {}, "verifier": "unchecked"}),
    ):
        file.write_text(text)
        third = make_engine(NoisyModel(noisy=lambda tokens, call: tokens < 4), config, check=True)
        assert third.certificates.status == first.certificates.status


def test_another_contract_does_not_use_the_certificates(tmp_path: Path) -> None:
    config = small_config(certificates_path=str(tmp_path), certify="startup")
    make_engine(config=config, check=True)
    make_engine(config=dataclasses.replace(config, verify_tokens=16), check=True)
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_probing_delays_ordinary_requests_by_no_step() -> None:
    engine = make_engine(check=True)
    engine.submit(PROMPTS[0], PARAMS)
    mine = engine.submit(PROMPTS[1], SamplingParams(max_tokens=10, ignore_eos=True), deterministic=False)
    steps = 0
    while mine in engine._requests:
        engine.step()
        steps += 1
    assert steps <= 12


# -- audits --------------------------------------------------------------------------------------------------


def test_audits_of_an_exact_model_find_nothing() -> None:
    engine = make_engine(config=small_config(audit_fraction=1.0, certify="startup"))
    outputs = engine.generate(PROMPTS, PARAMS)
    stats = engine.stats()
    assert stats.audits > 3
    assert stats.audited_tokens > 20
    assert stats.revocations == stats.rollbacks == 0
    assert [o.token_ids for o in outputs] == [reference(p, 40, frozenset()) for p in PROMPTS]


def test_the_share_of_audited_positions_is_as_configured() -> None:
    engine = make_engine(config=small_config(audit_fraction=0.25, certify="startup"))
    engine.generate(PROMPTS * 3, PARAMS)
    stats = engine.stats()
    certified = stats.certified_tokens + sum(map(len, PROMPTS * 3))
    # Windows are cut short at the end of a request, so somewhat less is replayed than is due.
    assert 0.05 * certified < stats.audited_tokens <= 0.25 * certified + 12


def _turning_bad(
    flip: float, tokens: frozenset[int] = frozenset(range(100)), audit_fraction: float = 1.0
) -> Engine:
    """An engine whose fast path is certified, and then turns noisy at buckets of `tokens`."""
    bad = {"now": False}
    fast = NoisyModel(noisy=lambda t, call: bad["now"] and t in tokens, flip=flip)
    engine = make_engine(fast, small_config(audit_fraction=audit_fraction, certify="startup"))
    assert set(engine.certificates.status.values()) == {"certified"}
    bad["now"] = True
    return engine


@contextlib.contextmanager
def _revoked(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """A certificate is revoked here: an error record says so."""
    with caplog.at_level(logging.INFO, "llm42c.runtime"):
        caplog.clear()
        yield
    errors = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert errors
    assert all(r.name == "llm42c.runtime.audit" and "revoked" in r.getMessage() for r in errors)


def _run(engine: Engine) -> dict[str, tuple[list[int], RequestOutput]]:
    """Everything that is queued to its end: what was streamed, and the finished output."""
    streams: dict[str, list[int]] = {}
    done = {}
    while engine.has_unfinished():
        for output in engine.step():
            streams.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finished:
                done[output.request_id] = output
    return {i: (streams[i], done[i]) for i in done}


@pytest.mark.parametrize("tokens", [frozenset({6}), frozenset({6, 12, 16, 24}), frozenset(range(100))])
@pytest.mark.parametrize("flip", [0.0, 0.1])
def test_a_revoked_certificate_is_repaired_before_anything_is_delivered(
    flip: float, tokens: frozenset[int], caplog: pytest.LogCaptureFixture
) -> None:
    engine = _turning_bad(flip, tokens)
    with _revoked(caplog):
        outputs = engine.generate(PROMPTS, PARAMS)
    stats = engine.stats()
    assert stats.revocations > 0
    assert "revoked" in engine.certificates.status.values()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.finish_reason == "length"
        if output.request_id not in stats.suspects:
            assert (output.token_ids, output.logprobs) == solo(prompt, PARAMS)
    assert len(stats.suspects) < len(PROMPTS), "vacuous: all finished before the first audit"


def test_a_stream_that_the_verifier_does_not_confirm_fails(caplog: pytest.LogCaptureFixture) -> None:
    engine = _turning_bad(0.3, frozenset({6}), audit_fraction=0.1)  # decodes of all
    ids = [engine.submit(p, PARAMS) for p in PROMPTS]
    with _revoked(caplog):
        results = _run(engine)
    failed = [o for _, o in results.values() if o.finish_reason == "error"]
    assert failed
    assert all("certificate was revoked" in (o.error or "") for o in failed)
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        stream, output = results[request_id]
        if output.finish_reason != "error" and request_id not in engine.stats().suspects:
            assert stream == output.token_ids == reference(prompt, 40, frozenset())


def test_a_stream_whose_tokens_are_confirmed_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = _turning_bad(0.0, frozenset({1, 2}))
    # The noise moves log-probs of odd tokens only, and is too small to change a token that is not tied.
    request_id = engine.submit(PROMPTS[0], PARAMS)
    with _revoked(caplog):
        results = _run(engine)
    stream, output = results[request_id]
    right = reference(PROMPTS[0], 40, frozenset())
    assert stream == right or output.finish_reason == "error"
    assert stream[: len(output.token_ids) - 1] == right[: len(output.token_ids) - 1]


def test_revocation_names_finished_requests(caplog: pytest.LogCaptureFixture) -> None:
    engine = _turning_bad(0.0, frozenset({24}))
    early = engine.submit(PROMPTS[0], SamplingParams(max_tokens=2, ignore_eos=True))
    _run(engine)
    assert engine.stats().suspects == []
    with _revoked(caplog):
        engine.generate(PROMPTS, PARAMS)
    assert early in engine.stats().suspects


def test_pages_that_a_revoked_certificate_wrote_are_not_shared(caplog: pytest.LogCaptureFixture) -> None:
    engine = _turning_bad(0.0, frozenset({1, 2}))  # the decodes of one request
    prompt = [(3 * j) % VOCAB for j in range(40)]
    engine.submit(prompt, SamplingParams(max_tokens=150, ignore_eos=True))
    unproved: list[set[int]] = []
    pool = engine._pool

    def run_until_revoked() -> None:
        while engine.has_unfinished() and not engine.stats().revocations:
            unproved.append({p for p in pool._key_of if not pool.proved[p]})
            engine.step()

    with _revoked(caplog):
        run_until_revoked()
    assert unproved[-1], "vacuous: nothing unproved was shared"
    assert all(pool.proved[p] for p in pool._key_of)


def test_other_certificates_are_probed_again_after_a_revocation(caplog: pytest.LogCaptureFixture) -> None:
    engine = _turning_bad(0.0, frozenset({6}))
    with _revoked(caplog):
        engine.generate(PROMPTS, PARAMS)
    status = engine.certificates.status
    assert status[6, 6] == "revoked"
    assert len(status) < len(engine.config.shapes())
    engine.certify()
    assert {s for s, v in status.items() if v != "certified"} <= {s for s in status if s[0] == 6}


def test_an_audit_that_convicts_the_verifier_itself_stops_the_engine() -> None:
    class Drifting(ToyModel):
        def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
            odd = (np.arange(VOCAB) % 2).astype(np.float32)
            return logits + np.float32(2.0**-14) * (self.calls % 2) * odd

    fast = NoisyModel(noisy=lambda tokens, call: tokens < 3, flip=0.0)
    engine = make_engine(fast, small_config(audit_fraction=1.0, certify="startup"))
    engine._verifier = Drifting(fixed=(12, 4, 12))

    def convict() -> None:
        for _ in range(20):
            # Certified prompts, verified decodes: replays of the latter blame the verifier.
            engine.submit([(3 * j) % VOCAB for j in range(40)], PARAMS)
            while engine.has_unfinished():
                engine._auditor._credit = 12.0
                engine.step()

    with pytest.raises(IntegrityError, match="not row independent"):
        convict()

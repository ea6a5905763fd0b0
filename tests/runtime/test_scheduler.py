from __future__ import annotations

from typing import Any

import pytest
from toy import VOCAB, NoisyModel, ToyModel, make_engine, small_config

from llm42c.runtime.engine import Engine
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.scheduler import FastPlan, VerifyPlan

LONG = SamplingParams(max_tokens=30, ignore_eos=True)


def planned(engine: Engine) -> tuple[list[FastPlan | None], list[VerifyPlan | None]]:
    """Collects the plans of every step from now on."""
    scheduler: Any = engine._scheduler
    fast, verify = scheduler.plan_fast, scheduler.plan_verify
    plans: tuple[list[Any], list[Any]] = ([], [])
    scheduler.plan_fast = lambda: (plans[0].append(fast()), plans[0][-1])[1]
    scheduler.plan_verify = lambda: (plans[1].append(verify()), plans[1][-1])[1]
    return plans


def prompt(length: int) -> list[int]:
    return [(3 * j + length) % VOCAB for j in range(length)]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 17, 23, 24, 25, 40, 50])
def test_prompt_chunks_fill_buckets(length: int) -> None:
    config = small_config(certify="startup", fast_buckets=(1, 2, 4, 12), max_num_batched_tokens=24)
    engine = make_engine(config=config)
    plans, _ = planned(engine)
    engine.generate([prompt(length)], SamplingParams(max_tokens=1))
    for plan in filter(None, plans):
        used = sum(c.num_tokens for c in plan.chunks)
        assert used <= plan.num_tokens
        assert plan.num_tokens - used <= 8
    assert sum(c.num_tokens for p in plans if p for c in p.chunks) == length


def test_decodes_and_prompts_share_a_step() -> None:
    engine = make_engine(config=small_config(certify="startup"))
    engine.submit(prompt(5), LONG)
    engine.step()
    plans, _ = planned(engine)
    engine.submit(prompt(11), LONG)
    engine.step()
    (plan,) = plans
    assert plan is not None
    assert [c.num_tokens for c in plan.chunks] == [1, 11]
    assert plan.shape == (12, 2)
    assert plan.commits


def test_a_deterministic_prompt_goes_to_the_verifier_unless_the_bucket_is_certified() -> None:
    engine = make_engine(NoisyModel(), small_config(certify="startup"))
    fast, verify = planned(engine)
    engine.submit(prompt(20), LONG)
    engine.submit(prompt(21), LONG, deterministic=False)
    engine.step()
    assert fast[0] is not None
    assert verify[0] is not None
    assert [c.request.prompt_len for c in fast[0].chunks] == [21]
    assert [(c.request.prompt_len, c.num_tokens) for c in verify[0].chunks] == [(20, 12)]


def test_the_verifier_batch_mixes_windows_and_prompts() -> None:
    engine = make_engine(NoisyModel(flip=0.0), small_config(verify="always", verify_window=3))
    engine.submit(prompt(4), LONG)
    for _ in range(3):
        engine.step()
    engine.submit(prompt(30), LONG)
    _, verify = planned(engine)
    for _ in range(4):
        engine.step()
    mixed = [
        p for p in verify if p and {c.start >= c.request.prompt_len - 1 for c in p.chunks} == {True, False}
    ]
    assert mixed
    for plan in filter(None, verify):
        assert sum(c.num_tokens for c in plan.chunks) <= 12
        assert len(plan.chunks) <= 4


@pytest.mark.parametrize("long_first", [True, False])
def test_neither_windows_nor_prompts_starve(long_first: bool) -> None:
    config = small_config(verify="always", verify_window=2, max_num_seqs=6, num_pages=200)
    engine = make_engine(NoisyModel(flip=0.0), config)
    ids = []
    if long_first:
        ids.append(engine.submit(prompt(200), SamplingParams(max_tokens=4, ignore_eos=True)))
    ids += [engine.submit(prompt(4 + i), LONG) for i in range(4)]
    if not long_first:
        for _ in range(5):
            engine.step()
        ids.append(engine.submit(prompt(200), SamplingParams(max_tokens=4, ignore_eos=True)))
    requests = [engine._requests[i] for i in ids]
    for _ in range(60):
        before = [(r.lease.num_computed, r.num_outputs) for r in requests]
        for _ in range(20):  # the long prompt alone takes 17 verifier steps
            engine.step()
        for request, old in zip(requests, before, strict=True):
            assert request.finish_reason or (request.lease.num_computed, request.num_outputs) > old, "starved"
    assert not engine.has_unfinished()


def test_first_come_first_served_and_the_newest_is_preempted() -> None:
    engine = make_engine(ToyModel(), small_config(certify="startup", num_pages=12, prefix_cache=False))
    ids = [engine.submit(prompt(6), LONG) for _ in range(4)]
    arrivals = {i: n for n, i in enumerate(ids)}
    victims: list[str] = []
    preempt = engine._scheduler.preempt

    def watched(request):  # type: ignore[no-untyped-def]
        assert request is engine._scheduler.running[-1]
        victims.append(request.id)
        return preempt(request)

    engine._scheduler.preempt = watched  # type: ignore[method-assign]
    finished: list[str] = []
    while engine.has_unfinished():
        finished += [o.request_id for o in engine.step() if o.finished]
    assert victims
    assert ids[0] not in victims
    assert [arrivals[i] for i in finished] == sorted(arrivals.values())


def test_an_admission_waits_rather_than_preempting_at_once() -> None:
    engine = make_engine(ToyModel(), small_config(certify="startup", num_pages=10, prefix_cache=False))
    engine.submit(prompt(20), SamplingParams(max_tokens=20, ignore_eos=True))
    engine.submit(prompt(18), SamplingParams(max_tokens=2, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
    assert engine.stats().preemptions == 0


def test_a_request_at_its_pending_limit_waits_for_the_verifier() -> None:
    config = small_config(verify="always", max_pending=5, verify_window=5, verify_tokens=6, verify_seqs=1)
    engine = make_engine(NoisyModel(flip=0.0), config)
    for i in range(5):
        engine.submit(prompt(3 + i), LONG)
    most = 0
    while engine.has_unfinished():
        engine.step()
        most = max([most, *(len(r.proposal.tokens) for r in engine._scheduler.running)])
    assert most == 5


def test_preempted_requests_come_back_through_the_prefix_cache() -> None:
    engine = make_engine(ToyModel(), small_config(certify="startup"))
    request_id = engine.submit(prompt(17), LONG)
    for _ in range(6):
        engine.step()
    request = engine._requests[request_id]
    engine._scheduler.preempt(request)
    engine.step()
    assert engine.stats().prefix_hit_tokens >= 20

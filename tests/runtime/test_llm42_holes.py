"""One test for each hole found in the published decode-verify-rollback system, named after it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from toy import (
    EOS,
    VOCAB,
    FlipModel,
    NoisyModel,
    ToyModel,
    ToySampler,
    expected_digest,
    make_engine,
    reference,
    small_config,
    solo,
    toy_decode,
)

from llm42c.capture.packed import KVCache
from llm42c.errors import ConfigError, IntegrityError
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams

WINDOW = 5
PROMPTS = [[(11 * i + 5 * j) % VOCAB for j in range(3 + 4 * i)] for i in range(6)]


def run(engine: Engine) -> dict[str, RequestOutput]:
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    return done


def long_greedy(prompt: list[int], count: int) -> list[int]:
    return reference(prompt, count, frozenset())


def test_hole_01_preemption_keeps_unverified_tokens() -> None:
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    engine = make_engine(NoisyModel(), small_config(num_pages=14, verify="always"))
    scheduler = engine._scheduler
    preempt, dropped = scheduler.preempt, []

    def watched(request):  # type: ignore[no-untyped-def]
        dropped.append(preempt(request))
        assert request.proposal.tokens == []
        assert request.lease.num_computed == 0
        assert not request.proposal.ended
        return dropped[-1]

    scheduler.preempt = watched  # type: ignore[method-assign]
    outputs = engine.generate(PROMPTS, params)
    assert engine.stats().preemptions > 2
    assert sum(dropped) > 0, "vacuous: no preempted request had unverified tokens"
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert (output.token_ids, output.logprobs) == solo(prompt, params)


def test_hole_02_mismatch_at_the_last_slot_of_a_window_counts() -> None:
    prompt = PROMPTS[2]
    # The first window proposes outputs 1 … WINDOW (output 0 comes from the prompt chunk); the last is wrong.
    position = len(prompt) - 1 + WINDOW
    engine = make_engine(
        FlipModel(positions=frozenset({position}), armed=True), small_config(verify="always")
    )
    request_id = engine.submit(prompt, SamplingParams(max_tokens=20, ignore_eos=True))
    request = engine._requests[request_id]
    while engine.stats().rollbacks == 0:
        engine.step()
        assert request.num_outputs <= WINDOW + 1
    assert request.outputs == long_greedy(prompt, WINDOW + 1), "the verifier's own token takes the place"
    assert request.proposal.tokens == []
    assert engine.stats().rollbacks == 1
    assert run(engine)[request_id].token_ids == long_greedy(prompt, 20)
    assert engine.stats().rollbacks == 1


def test_hole_03_speculative_finish_is_forgotten_on_rollback() -> None:
    prompt = PROMPTS[3]
    full = long_greedy(prompt, 30)
    text = toy_decode(full)
    stop = text[16:18]
    assert text.index(stop) == 16
    # A wrong end-of-sequence ends the request speculatively at output 3; the true end is a stop string later.
    fast = FlipModel(positions=frozenset({len(prompt) + 2}), token=EOS, armed=True)
    engine = make_engine(fast, small_config(verify="always"))
    request_id = engine.submit(prompt, SamplingParams(max_tokens=30, stop=(stop,), ignore_eos=False))
    request = engine._requests[request_id]
    proposals_ended = False
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
        proposals_ended |= engine.stats().rollbacks == 1 and not request.proposal.ended
    assert proposals_ended
    output = done[request_id]
    assert output.text == text[:16]
    assert output.token_ids == full[: len(output.token_ids)]
    assert output.stop_reason == stop


def test_hole_04_more_pending_tokens_than_a_window() -> None:
    # The verifier has room for one window a step, so proposals of the others pile up behind it.
    config = small_config(verify="always", verify_tokens=WINDOW + 1, verify_seqs=1, max_pending=4 * WINDOW)
    engine = make_engine(NoisyModel(flip=0.02), config)
    params = SamplingParams(max_tokens=23, stop=("ab",))
    ids = [engine.submit(p, params) for p in PROMPTS]
    requests = [engine._requests[i] for i in ids]
    most, done = 0, {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
        most = max(most, *(len(r.proposal.tokens) for r in requests))
    assert most > WINDOW + 1
    for request_id, prompt in zip(ids, PROMPTS, strict=True):
        assert (done[request_id].token_ids, done[request_id].logprobs) == solo(prompt, params)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=30, repetition_penalty=1.4),
        SamplingParams(max_tokens=30, frequency_penalty=1.5, presence_penalty=0.5),
        SamplingParams(max_tokens=30, logit_bias={3: 4.0, 4: 4.0, 5: -9.0}, min_tokens=12),
        SamplingParams(
            max_tokens=30, temperature=0.9, top_k=9, top_p=0.9, repetition_penalty=1.2, logit_bias={3: 3.0}
        ),
    ],
)
def test_hole_05_penalties_and_bias_inside_windows(params: SamplingParams) -> None:
    engine = make_engine(NoisyModel(), small_config(verify="always"))
    outputs = engine.generate(PROMPTS, params)
    assert engine.stats().rollbacks > 0
    expected = []
    for prompt in PROMPTS:
        # Windows of one token: the state of the penalties cannot be anything but the committed one.
        expected.append(solo(prompt, params, verify_window=1, verify_tokens=2, verify_seqs=1))
    assert [(o.token_ids, o.logprobs) for o in outputs] == expected
    plain = make_engine().generate(PROMPTS, SamplingParams(max_tokens=30))
    assert [o.token_ids for o in plain] != [o.token_ids for o in outputs], (
        "vacuous: the parameters do nothing"
    )


def test_hole_06_min_p() -> None:
    params = SamplingParams(max_tokens=24, temperature=1.3, min_p=0.2, seed=11)
    engine = make_engine(NoisyModel())
    outputs = engine.generate(PROMPTS, params)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.finish_reason != "error"
        assert (output.token_ids, output.logprobs) == solo(prompt, params)


def test_hole_07_greedy_row_grouped_with_sampled_rows_at_exact_ties() -> None:
    class TiedModel(ToyModel):
        """Every logit is one of two values, so the greatest is tied in every row."""

        def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
            return np.minimum(np.floor(logits), np.float32(5))

    def engine() -> Engine:
        config = small_config(verify="always")
        return Engine(TiedModel(), TiedModel(fixed=(12, 4, 12)), config, sampler=ToySampler())

    greedy, sampled = SamplingParams(max_tokens=16), SamplingParams(max_tokens=16, temperature=1.0, seed=5)
    (alone,) = engine().generate([PROMPTS[1]], greedy)
    together = engine().generate([PROMPTS[1], *PROMPTS], [greedy] + [sampled] * len(PROMPTS))
    assert (together[0].token_ids, together[0].logprobs) == (alone.token_ids, alone.logprobs)
    assert max(alone.token_ids) < VOCAB // 4, "vacuous: no ties, which the lowest index wins"


def test_hole_08_failed_pool_initialisation_is_an_error() -> None:
    class NoMemory(ToyModel):
        def new_kv_cache(self, num_pages: int, page_size: int) -> KVCache:
            raise MemoryError("no room for KV")

    with pytest.raises(MemoryError):
        Engine(ToyModel(), NoMemory(), small_config(), sampler=ToySampler())
    with pytest.raises(ConfigError):
        make_engine(config=small_config(num_pages=None, kv_cache_bytes=1))
    engine = make_engine(NoisyModel(), small_config(num_pages=14))
    engine.generate(PROMPTS, SamplingParams(max_tokens=20))
    verifier = engine._verifier
    assert isinstance(verifier, ToyModel)
    assert verifier.shapes == {(12, 4, 12)}, "the verifier ran at another shape"


def test_hole_09_ordinary_requests_do_not_pay() -> None:
    def steps_of_ordinary(num_deterministic: int) -> tuple[int, list[str]]:
        engine = make_engine(NoisyModel(), small_config(verify="always"))
        order: list[str] = []
        for name in ("_fast", "_verifier"):
            model = getattr(engine, name)
            forward = model.forward
            model.forward = lambda *a, f=forward, n=name: (order.append(n), f(*a))[1]
        for prompt in PROMPTS[:num_deterministic]:
            engine.submit(prompt, SamplingParams(max_tokens=40, ignore_eos=True))
        mine = engine.submit(PROMPTS[2], SamplingParams(max_tokens=20, ignore_eos=True), deterministic=False)
        count = 0
        while mine in engine._requests:
            engine.step()
            count += 1
        return count, order

    alone, _ = steps_of_ordinary(0)
    crowded, order = steps_of_ordinary(5)
    assert "_verifier" in order
    assert crowded == alone, "an ordinary request took more steps because others are verified"
    assert ("_verifier", "_verifier") not in set(pairwise(order)), "it waited for two verifier steps"


class _RowDependent(ToyModel):
    """A verifier of constant shape whose rows nevertheless depend on something around them."""

    kind = "row"

    def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
        if not batch.n:
            return logits
        row = batch.rows.astype(np.int64)
        seq = batch.seq_of_row[row]
        what = {
            "row": row % 3,
            "offset": (row - batch.cu[seq]) % 2,
            "neighbour": np.full(len(row), batch.ids[: batch.n].sum() % 2),
            "page": batch.slots[row] // batch.page % 2,
            "sequence": seq % 2,
        }[self.kind]
        logits[what == 1, 3] += np.float32(2.0**-20)
        logits[what == 1, 4] += np.float32(2.0**-16)
        return logits


@pytest.mark.parametrize("kind", ["row", "offset", "neighbour", "page", "sequence"])
def test_hole_10_position_independence_is_checked_not_assumed(kind: str) -> None:
    config = EngineConfig(
        max_num_seqs=8, page_size=16, num_pages=64, verify_tokens=64, verify_seqs=8, certify="startup"
    )
    verifier = _RowDependent()
    verifier.kind = kind
    with pytest.raises(IntegrityError, match="not row independent"):
        Engine(ToyModel(), verifier, config, sampler=ToySampler())
    lazy = Engine(ToyModel(), verifier, small_config(), sampler=ToySampler())
    request_id = lazy.submit(PROMPTS[1])
    delivered: list[object] = []

    def run_on() -> None:
        while len(delivered) < 200:
            delivered.append(lazy.step())

    with pytest.raises(IntegrityError, match="not row independent"):
        run_on()
    assert not any(delivered), "something was delivered before the verifier was checked"
    assert request_id in lazy._requests


def test_hole_11_one_definition_of_every_operation_means_no_avoidable_mismatch() -> None:
    engine = make_engine(ToyModel(), small_config(verify="always"))
    ids = [engine.submit(p, SamplingParams(max_tokens=30)) for p in PROMPTS]
    requests = {i: engine._requests[i] for i in ids}
    while engine.has_unfinished():
        engine.step()
        for request_id in ids:
            if request_id in engine._requests:
                request = requests[request_id]
                digest = engine.kv_digest(request_id)
                assert digest == expected_digest(request.history.tokens, request.lease.num_computed)
    assert engine.stats().speculated_tokens > 0
    assert engine.stats().rollbacks == 0
    assert engine.stats().recomputed_tokens == 0


def test_hole_11_no_sync_a_request() -> None:
    """A step copies tokens and log-probs out of torch once, not once a request."""
    engine = make_engine(config=small_config(certify="startup"))
    for prompt in PROMPTS:
        engine.submit(prompt, SamplingParams(max_tokens=12, ignore_eos=True))
    for _ in range(4):
        engine.step()
    calls = {"n": 0}
    tolist, item = torch.Tensor.tolist, torch.Tensor.item

    def counted(function):  # type: ignore[no-untyped-def]
        def wrapper(self):  # type: ignore[no-untyped-def]
            calls["n"] += 1
            return function(self)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", counted(tolist))
        patch.setattr(torch.Tensor, "item", counted(item))
        engine.step()
    assert calls["n"] == 2

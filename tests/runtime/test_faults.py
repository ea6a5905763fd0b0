"""Faults put into the fast path at chosen places: what is committed does not change."""

from __future__ import annotations

import pytest
from toy import EOS, VOCAB, FlipModel, NoisyModel, ToyModel, make_engine, reference, small_config, solo

from llm42c.runtime.sampling import SamplingParams

WINDOW = 5
PROMPT = [(5 * j + 2) % VOCAB for j in range(9)]
COUNT = 3 * WINDOW + 2
PARAMS = SamplingParams(max_tokens=COUNT, ignore_eos=True)


# Output 0 comes from the prompt's last chunk, so a window proposes outputs 1 … WINDOW.
@pytest.mark.parametrize(
    "output", range(1, 2 * WINDOW + 3), ids=lambda o: f"output{o}-offset{(o - 1) % WINDOW}"
)
def test_flip_at_every_window_offset(output: int) -> None:
    engine = make_engine(
        FlipModel(positions=frozenset({len(PROMPT) - 1 + output}), armed=True), small_config(verify="always")
    )
    (got,) = engine.generate([PROMPT], PARAMS)
    assert (got.token_ids, got.logprobs) == solo(PROMPT, PARAMS)
    # The verifier's own next token may be the flipped one's place; then the fast path never proposes there.
    assert engine.stats().rollbacks <= 1


def test_flips_do_lead_to_rollbacks() -> None:
    rolled_back = []
    for output in range(1, 2 * WINDOW + 3):
        position = len(PROMPT) - 1 + output
        engine = make_engine(
            FlipModel(positions=frozenset({position}), armed=True), small_config(verify="always")
        )
        engine.generate([PROMPT], PARAMS)
        rolled_back.append(engine.stats().rollbacks)
    # Windows propose outputs 1…5 and 7…11; outputs 6 and 12 are the verifier's own.
    assert rolled_back == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    "output", [1, 2, COUNT - 2, COUNT - 1], ids=["first", "second", "last-but-one", "last"]
)
@pytest.mark.parametrize("verify", ["auto", "always"])
def test_flip_at_the_ends_of_a_request(output: int, verify: str) -> None:
    fast = FlipModel(positions=frozenset({len(PROMPT) - 1 + output}), armed=True)
    engine = make_engine(fast, small_config(verify=verify))
    # No sample of batches finds a fault at a single position, so no shape gets a certificate here.
    engine.certificates.want = lambda shape: False  # type: ignore[method-assign]
    (got,) = engine.generate([PROMPT], PARAMS)
    assert engine.stats().certified_tokens == 0
    assert (got.token_ids, got.logprobs) == solo(PROMPT, PARAMS)


@pytest.mark.parametrize("output", range(1, WINDOW + 2))
def test_a_false_end_of_sequence_at_every_offset(output: int) -> None:
    params = SamplingParams(max_tokens=COUNT, stop=("AB",))
    fast = FlipModel(positions=frozenset({len(PROMPT) - 1 + output}), token=EOS, armed=True)
    engine = make_engine(fast, small_config(verify="always"))
    (got,) = engine.generate([PROMPT], params)
    assert (got.token_ids, got.logprobs) == solo(PROMPT, params)
    assert got.finish_reason == "length"


@pytest.mark.parametrize("output", range(1, WINDOW + 2))
def test_a_missed_end_of_sequence_at_every_offset(output: int) -> None:
    full = reference(PROMPT, COUNT, frozenset())
    stop = full[output]
    output = full.index(stop)  # perhaps earlier
    params = SamplingParams(max_tokens=COUNT, stop_token_ids=(stop,), ignore_eos=True)
    fast = FlipModel(positions=frozenset({len(PROMPT) - 1 + output}), armed=True)
    (got,) = make_engine(fast, small_config(verify="always")).generate([PROMPT], params)
    assert got.token_ids == full[: output + 1]
    assert (got.finish_reason, got.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 23, 24, 25])
def test_prompt_lengths_around_pages_chunks_and_buckets(length: int) -> None:
    prompt = [(7 * j + length) % VOCAB for j in range(length)]
    params = SamplingParams(max_tokens=WINDOW + 2, temperature=0.6, seed=4)
    for fast in (ToyModel(), NoisyModel(flip=0.3)):
        for verify in ("auto", "always"):
            (got,) = make_engine(fast, small_config(verify=verify)).generate([prompt], params)
            assert (got.token_ids, got.logprobs) == solo(prompt, params)


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
def test_negative_control_without_verification_outputs_differ(noise: float) -> None:
    """The same noisy fast path, trusted: log-prob bits differ always, tokens when the noise is gross."""
    prompts = [[(3 * i + 7 * j) % VOCAB for j in range(6 + i)] for i in range(6)]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    expected = [solo(p, params) for p in prompts]
    trusted = make_engine(NoisyModel(flip=noise), small_config(audit_fraction=0.0))
    trusted.certificates.commits = lambda shape: True  # type: ignore[method-assign]
    got = [(o.token_ids, o.logprobs) for o in trusted.generate(prompts, params)]
    assert all(a[1] != b[1] for a, b in zip(got, expected, strict=True))
    if noise:
        assert any(a[0] != b[0] for a, b in zip(got, expected, strict=True))
    verified = make_engine(NoisyModel(flip=noise))
    assert [(o.token_ids, o.logprobs) for o in verified.generate(prompts, params)] == expected


def test_shared_prefixes_hit_and_do_not_change_bits() -> None:
    prefix = [(13 * j) % VOCAB for j in range(21)]
    prompts = [[*prefix, *range(i)] for i in (1, 2, 3, 4, 5)] + [prefix, prefix[:16], prefix[:17]]
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    for fast in (ToyModel(), NoisyModel()):
        engine = make_engine(fast)
        cold = engine.generate(prompts, params)
        before = engine.stats().prefix_hits
        warm = engine.generate(prompts, params)
        assert engine.stats().prefix_hits >= before + len(prompts) * 3
        for prompt, a, b in zip(prompts, cold, warm, strict=True):
            assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs) == solo(prompt, params)


def test_ordinary_pages_never_enter_the_prefix_cache() -> None:
    engine = make_engine(NoisyModel())
    prompt = [(13 * j) % VOCAB for j in range(24)]
    engine.generate([prompt], SamplingParams(max_tokens=10), deterministic=False)
    (got,) = engine.generate([prompt], SamplingParams(max_tokens=10))
    assert engine.stats().prefix_hits == 0
    assert (got.token_ids, got.logprobs) == solo(prompt, SamplingParams(max_tokens=10))
    engine.generate([prompt], SamplingParams(max_tokens=10), deterministic=False)
    assert engine.stats().prefix_hits > 0, "an ordinary request may read canonical pages"

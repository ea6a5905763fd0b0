"""Receipts and their replay, and scoring: drafts that must be accepted whole, and drafts that are taken."""

from __future__ import annotations

import dataclasses
import json

import pytest
from toy import EOS, VOCAB, NoisyModel, ToyModel, make_engine, small_config, solo

from llm42c.errors import ReceiptError, RequestError
from llm42c.runtime import sealed
from llm42c.runtime.engine import Engine
from llm42c.runtime.receipt import Receipt
from llm42c.runtime.sampling import SamplingParams

PROMPT = [(3 * j + 1) % VOCAB for j in range(9)]
PARAMS = {
    "greedy": SamplingParams(max_tokens=30, ignore_eos=True),
    "sampled, seed derived": SamplingParams(max_tokens=30, temperature=0.9, top_p=0.9),
    "no limit given": SamplingParams(stop_token_ids=(3, 11, 19)),
    "penalties and bias": SamplingParams(
        max_tokens=30, repetition_penalty=1.3, logit_bias={0: 5.0, 1: 5}, min_tokens=4, logprobs=2
    ),
    "stop string": SamplingParams(
        max_tokens=60, logit_bias={0: 9.0, 1: 9.0}, stop=("ABBA", "BBB"), temperature=1
    ),
}
MODES = {
    "certified": (ToyModel, {"certify": "startup"}),
    "verified": (ToyModel, {"verify": "always", "prefix_cache": False}),
    "speculative": (lambda: NoisyModel(flip=0.2), {"certify": "startup"}),
}


def receipt_of(params: SamplingParams, engine: Engine | None = None) -> Receipt:
    engine = engine or make_engine(config=small_config(verify="always"))
    engine.submit(PROMPT, params, receipt=True)
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    assert all(o.receipt is None for o in outputs[:-1])
    receipt = outputs[-1].receipt
    assert receipt is not None
    assert (receipt.prompt, receipt.tokens) == (PROMPT, outputs[-1].token_ids)
    return receipt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PARAMS)
def test_a_replay_is_exact(name: str, mode: str) -> None:
    text = receipt_of(PARAMS[name]).to_json()
    fast, changes = MODES[mode]
    engine = make_engine(fast(), small_config(**changes, eos_token_ids=(EOS, 5)))  # its own ends do not count
    result = engine.replay(Receipt.from_json(text + "\n"))
    assert (result.verdict, result.position) == ("exact", None), result.detail
    assert engine.stats().accepted_drafts > 0


def test_a_replay_takes_few_passes() -> None:
    receipt = receipt_of(PARAMS["greedy"])
    engine = make_engine(config=small_config(certify="startup"))
    engine.replay(receipt)
    assert engine.stats().steps <= 6


@pytest.mark.parametrize("at", [0, 7, 29])
def test_what_differs_is_named(at: int) -> None:
    receipt = receipt_of(PARAMS["greedy"])
    engine = make_engine(config=small_config(certify="startup"))
    tokens = [*receipt.tokens[:at], (receipt.tokens[at] + 1) % VOCAB, *receipt.tokens[at + 1 :]]
    chain = [*receipt.chain[:at], *("0" * 16 for _ in receipt.chain[at:])]
    wrong = engine.replay(dataclasses.replace(receipt, tokens=tokens, chain=chain))
    assert (wrong.verdict, wrong.position) == ("differs", at)
    assert f"at token {at}: [{receipt.tokens[at]}], and in the receipt [{tokens[at]}]" in wrong.detail
    bits = engine.replay(dataclasses.replace(receipt, chain=chain))
    assert (bits.verdict, bits.position) == ("differs", at)
    assert "another log-prob" in bits.detail
    short = engine.replay(dataclasses.replace(receipt, tokens=tokens[:at], chain=receipt.chain[:at]))
    assert (short.verdict, short.position) == ("differs", at)
    ended = engine.replay(dataclasses.replace(receipt, finish_reason="stop", stop_reason=3))
    assert ended.verdict == "differs"
    assert engine.replay(receipt).verdict == "exact"


def test_another_contract_is_named_by_its_fields() -> None:
    receipt = receipt_of(PARAMS["greedy"])
    result = make_engine(config=small_config(verify_tokens=16)).replay(receipt)
    assert result.verdict == "another contract"
    assert result.fields == ("verify_rows: 12 -> 16", "verify_tokens: 12 -> 16")
    assert "verify_tokens: 12 -> 16" in result.detail


def test_one_bit_anywhere_is_damage() -> None:
    text = receipt_of(PARAMS["penalties and bias"]).to_json().encode()
    whole = Receipt.from_json(text.decode())
    assert whole.to_json().encode() == text
    for i in range(len(text)):
        for bit in range(8):
            edited = bytes([*text[:i], text[i] ^ (1 << bit), *text[i + 1 :]])
            with pytest.raises(ReceiptError, match="damaged"):
                Receipt.from_json(edited.decode("latin-1"))


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", "[" * 5000, '{"llm42_receipt":1}', "null", "7"])
def test_what_is_no_receipt(text: str) -> None:
    with pytest.raises(ReceiptError, match="damaged"):
        Receipt.from_json(text)


def test_another_version_and_a_spaced_copy() -> None:
    text = receipt_of(PARAMS["greedy"]).to_json()
    with pytest.raises(ReceiptError, match="damaged"):
        Receipt.from_json(json.dumps(json.loads(text)))
    with pytest.raises(ReceiptError, match="damaged"):
        Receipt.from_json(text.replace('"llm42_receipt":2', '"llm42_receipt":3'))
    later = json.loads(text)
    del later["sha256"]
    with pytest.raises(ReceiptError, match="has version 7; this release of llm42 reads 2"):
        Receipt.from_json(sealed.seal("llm42_receipt", 7, later))


def test_what_has_no_receipt_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match="deterministic"):
        engine.submit(PROMPT, deterministic=False, receipt=True)
    with pytest.raises(RequestError, match="processors are code"):
        engine.submit(PROMPT, SamplingParams(logits_processors=(lambda ids, row: row,)), receipt=True)
    assert not engine.has_unfinished()


# -- scoring -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_the_log_probs_of_generating(mode: str) -> None:
    fast, changes = MODES[mode]
    engine = make_engine(fast(), small_config(**changes))
    params = [PARAMS["greedy"], SamplingParams(max_tokens=30, ignore_eos=True, temperature=1.3, seed=5)]
    plain = [solo(PROMPT[:n], p) for n in (1, 4, 9) for p in params]
    prompts = [PROMPT[:n] for n in (1, 4, 9) for _ in params]
    for _ in range(2):  # again, with prefixes cached
        found = engine.score_batch(
            (prompt, tokens) for prompt, (tokens, _) in zip(prompts, plain, strict=True)
        )
        assert [s.logprobs for s in found] == [logprobs for _, logprobs in plain]
        assert [all(s.greedy) for s in found] == [True, False] * 3
    assert engine.score(PROMPT, plain[-1][0]).total == sum(plain[-1][1])


def test_scores_do_not_depend_on_how_a_text_is_divided() -> None:
    engine = make_engine(config=small_config(certify="startup"))
    text = [(7 * i) % VOCAB for i in range(40)]
    whole = engine.score(text[:1], text[1:]).logprobs
    for at in (2, 11, 12, 13, 39):
        assert engine.score(text[:at], text[at:]).logprobs == whole[at - 1 :]


def test_scoring_takes_few_passes() -> None:
    engine = make_engine(config=small_config(verify="always"))
    engine.score(PROMPT, [(5 * i) % VOCAB for i in range(100)])
    assert engine.stats().verifier_steps <= -(-109 // 12) + 1


def test_what_cannot_be_scored_is_refused() -> None:
    engine = make_engine()
    for prompt, completion in (([], [1]), ([1], []), ([1], [VOCAB]), ([1], [0] * 300), ([1], "ab")):
        with pytest.raises(RequestError):
            engine.score_batch([([1], [2]), (prompt, completion)])  # type: ignore[list-item]
        assert not engine.has_unfinished()

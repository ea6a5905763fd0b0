"""Structured output: what comes out is what the grammar says, and the same bits however it is computed."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from test_drafts import MODES, PROMPT, adversaries, run
from test_resumption import complete, finish
from toy import EOS, VOCAB, Flat, NoisyModel, ToyModel, make_engine, small_config

from llm42c.errors import ContractMismatchError, RequestError
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.receipt import Receipt
from llm42c.runtime.request import Request
from llm42c.runtime.resumption import RequestState
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.structured import Matcher

pytest.importorskip("llguidance")

mask = Matcher.mask
BALANCED = re.compile("(A*)([C-E]{1,3})(B*)")
# Parameters, and whether a whole text is what they ask for.
CASES: dict[str, tuple[SamplingParams, Callable[[str], bool]]] = {
    "regex": (
        SamplingParams(max_tokens=24, regex="[A-F]{5,15}(GI|IJ)*L"),
        lambda text: re.fullmatch("[A-F]{5,15}(GI|IJ)*L", text) is not None,
    ),
    "sampled": (
        SamplingParams(max_tokens=24, regex="([A-C][D-F])+L", temperature=1.5, seed=6, logprobs=2),
        lambda text: re.fullmatch("([A-C][D-F])+L", text) is not None,
    ),
    "choice": (
        SamplingParams(max_tokens=24, choice=("ABBA", "ABBAABBABC", 'A"B'), temperature=2.0, seed=1),
        lambda text: text in ("ABBA", "ABBAABBABC"),
    ),
    "grammar": (
        SamplingParams(
            max_tokens=40, grammar='start: "A" start "B" | /[C-E]{1,3}/', logit_bias={0: 2.0}, temperature=1.0
        ),
        lambda text: (m := BALANCED.fullmatch(text)) is not None and len(m[1]) == len(m[3]),
    ),
    "filters": (
        SamplingParams(max_tokens=24, regex="[A-F]{5,15}L", temperature=1.2, top_k=9, top_p=0.9, seed=3),
        lambda text: re.fullmatch("[A-F]{5,15}L", text) is not None,
    ),
    "penalties": (
        SamplingParams(max_tokens=24, regex="[A-F]{9,15}", repetition_penalty=1.4, frequency_penalty=0.5),
        lambda text: re.fullmatch("[A-F]{9,15}", text) is not None,
    ),
    "min_tokens": (
        SamplingParams(
            max_tokens=24, regex="[A-C]*", min_tokens=7, stop_token_ids=(5,), seed=2, temperature=1
        ),
        lambda text: re.fullmatch("[A-C]{6,}", text) is not None,
    ),
}


def undisturbed(params: SamplingParams) -> RequestOutput:
    engine = make_engine(config=small_config(verify="always"))
    engine.submit(PROMPT, params, receipt=True, request_id="r")
    return finish(engine)[-1]


def valid(name: str, output: RequestOutput) -> bool:
    return output.finish_reason != "stop" or CASES[name][1](output.text)


@pytest.mark.parametrize("name", CASES)
def test_the_output_is_what_was_asked_for(name: str) -> None:
    params, is_right = CASES[name]
    found = []
    for i in range(8):
        prompt = [(3 * j + i) % VOCAB for j in range(9)]
        (output,) = make_engine().generate([prompt], params)
        assert output.error is None
        assert valid(name, output), output.text
        found.append(output)
        (free,) = make_engine().generate([prompt], dataclasses.replace(params, **dict.fromkeys(KINDS)))
        assert not is_right(free.text), "vacuous: the model says it anyway"
    ended = [o for o in found if o.finish_reason == "stop"]
    assert len(ended) > 3
    assert all(o.stop_reason in (EOS, 5) for o in ended)


KINDS = ("regex", "choice", "grammar")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_no_draft_changes_a_bit(name: str, mode: str) -> None:
    fast, changes = MODES[mode]
    params = CASES[name][0]
    plain = undisturbed(params)
    engine = make_engine(fast(), small_config(**changes))
    for draft in adversaries(plain.token_ids).values():
        output = run(engine, draft, params)
        for field in ("token_ids", "logprobs", "top_logprobs", "text", "finish_reason", "stop_reason"):
            assert getattr(output, field) == getattr(plain, field), field
    stats = engine.stats()
    assert 0 < stats.accepted_drafts <= stats.drafted_tokens


@pytest.mark.parametrize("name", CASES)
def test_what_a_token_is_asked_for_is_what_its_mask_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token at each row; and who always computes the mask gets the same bits."""
    plain, permits, seen = undisturbed(CASES[name][0]), Matcher.permits, Counter[bool]()

    def compared(self: Matcher, request: Request, length: int, token: int) -> bool:
        words = mask(self, request, length)
        for one in range(VOCAB):
            wanted = bool(words[one // 32] >> one % 32 & 1)
            assert permits(self, request, length, one) == wanted
            seen[wanted] += 1
        return permits(self, request, length, token)

    monkeypatch.setattr(Matcher, "permits", compared)
    assert complete(undisturbed(CASES[name][0])) == complete(plain)
    assert (min(seen[True], seen[False]) > 10) == (
        name not in ("filters", "penalties", "grammar", "min_tokens")
    )
    monkeypatch.setattr(Matcher, "permits", lambda self, request, length, token: False)
    assert complete(undisturbed(CASES[name][0])) == complete(plain)


def test_drafts_are_filtered_by_the_grammar() -> None:
    """So what a wrong draft costs ends where the grammar does."""
    params = SamplingParams(max_tokens=12, regex="[A-C]{12}")
    right = undisturbed(params).token_ids
    engine = make_engine(config=small_config(certify="startup"))
    run(engine, [right[0], *([VOCAB - 1] * 30)], params)
    assert engine.stats().drafted_tokens <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_preemption_and_resumption(name: str, mode: str) -> None:
    fast, changes = MODES[mode]
    params = CASES[name][0]
    whole = undisturbed(params)
    engine = make_engine(fast(), small_config(**changes))
    engine._speculator.times = Flat()
    engine.submit(PROMPT, params, request_id="r", speculate="ngram")
    found = [engine.export("r")]
    while True:
        outputs = engine.step()
        if outputs and outputs[-1].finished:
            break
        if engine._requests["r"].num_outputs > len(found[-1].tokens):
            engine._scheduler.preempt(engine._requests["r"])
            found.append(engine.export("r"))
    assert (outputs[-1].token_ids, outputs[-1].logprobs) == (whole.token_ids, whole.logprobs)
    for state in found[:: max(1, len(found) // 4)]:
        other = make_engine(fast(), small_config(**changes))
        other.resume(RequestState.from_json(state.to_json()), request_id="r", receipt=True)
        assert complete(finish(other)[-1]) == complete(whole)


def test_a_receipt_holds_the_grammar_and_who_reads_it() -> None:
    receipt = undisturbed(CASES["sampled"][0]).receipt
    assert receipt is not None
    receipt = Receipt.from_json(receipt.to_json())
    assert receipt.params.regex == "([A-C][D-F])+L"
    by = receipt.params.structured_by
    assert by is not None
    assert re.fullmatch(r"masks/1, llguidance \d+\.\d+\.\d+, tokens [0-9a-f]{16}", by)
    engine = make_engine(config=small_config(certify="startup"))
    assert engine.replay(receipt).verdict == "exact"
    other = dataclasses.replace(receipt, params=dataclasses.replace(receipt.params, structured_by="other 1"))
    result = engine.replay(other)
    assert result.verdict == "another contract"
    assert f"structured_by: other 1 -> {by}" in result.detail
    with pytest.raises(ContractMismatchError, match="structured_by"):
        engine.submit(PROMPT, other.params)


@pytest.mark.parametrize("where", [slice(None), slice(0, 6), slice(6, 7)])
def test_a_row_of_nan_is_refused_whatever_its_mask_hides(where: slice) -> None:
    """Alone, and beside a request without a grammar: all of a row is looked at."""

    class Broken(ToyModel):
        def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
            logits[:, where] = np.nan
            return logits

    said = set()
    for others in (0, 1):
        engine = make_engine(Broken(), small_config(audit_fraction=0.0))
        engine.certificates.commits = lambda shape: True  # type: ignore[method-assign]
        bad = engine.submit(PROMPT, SamplingParams(max_tokens=9, regex="[A-F]{9}"))
        for _ in range(others):
            engine.submit(PROMPT, SamplingParams(max_tokens=9))
        done = {o.request_id: o for o in finish(engine) if o.finished}
        said.add(done[bad].error)
    assert len(said) == 1
    assert "NaN" in (said.pop() or "")


def test_ordinary_requests_have_grammars_too() -> None:
    params = dataclasses.replace(CASES["regex"][0], temperature=1.0)
    (output,) = make_engine(NoisyModel()).generate([PROMPT], params, deterministic=False)
    assert valid("regex", output)


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"regex": "A[0-9]"}, "the grammar allows no token after 1"),
        ({"regex": "[0-9]"}, "the grammar allows no token after 0"),
        ({"choice": ("0",)}, "the grammar allows no token after 0"),
        ({"regex": "AB", "min_tokens": 9}, "min_tokens"),
    ],
)
def test_an_impossible_grammar_ends_its_own_request_only(params: dict[str, object], words: str) -> None:
    plain = undisturbed(CASES["regex"][0])
    for fast, changes in MODES.values():
        engine = make_engine(fast(), small_config(**changes))
        bad = engine.submit(PROMPT, SamplingParams(max_tokens=20, **params))  # type: ignore[arg-type]
        engine.submit(PROMPT, CASES["regex"][0], request_id="r", receipt=True)
        done = {o.request_id: o for o in finish(engine) if o.finished}
        assert words in (done[bad].error or "")
        assert "\n" not in (done[bad].error or "")
        assert complete(done["r"]) == complete(plain)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"regex": "(A"}, "regex cannot be used"),
        ({"grammar": "start: foo"}, "grammar cannot be used"),
        ({"json_schema": "{"}, "json_schema cannot be used"),
        ({"json_schema": {"type": "nothing"}}, "json_schema cannot be used"),
        ({"json_schema": False}, "json_schema cannot be used"),
        ({"json_schema": {1, 2}}, "json_schema is no JSON"),
        ({"json_schema": {"a": float("nan")}}, "json_schema is no JSON"),
        ({"regex": 5}, "regex must be a string"),
        ({"choice": "AB"}, "choice must be a list"),
        ({"choice": ()}, "choice must hold non-empty strings"),
        ({"choice": ("A", "")}, "choice must hold non-empty strings"),
        ({"regex": "A", "grammar": "start: /A/"}, "regex and grammar exclude each other"),
    ],
)
def test_what_is_no_grammar_is_one_line(params: dict[str, object], words: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=words) as caught:
        engine.submit(PROMPT, SamplingParams(**params))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not engine.has_unfinished()


def test_what_structured_output_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(regex="A")
    engine = make_engine(config=small_config(eos_token_ids=()))
    with pytest.raises(RequestError, match="end-of-sequence"):
        engine.submit(PROMPT, params)
    engine = make_engine()
    with pytest.raises(RequestError, match="forced draft"):
        engine.submit(PROMPT, dataclasses.replace(params, max_tokens=2), draft=[0, 1], forced=True)
    engine._door._grammars = None
    with pytest.raises(RequestError, match="tokenizer"):
        engine.submit(PROMPT, params)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'llm42c\[structured\]'"):
        make_engine().submit(PROMPT, params)


# -- negative controls ---------------------------------------------------------------------------------------


def test_a_mask_that_is_applied_late_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the row before."""
    late = lambda self, request, length: mask(self, request, max(request.prompt_len, length - 1))  # noqa: E731
    monkeypatch.setattr(Matcher, "mask", late)
    with pytest.raises(AssertionError):
        test_the_output_is_what_was_asked_for("regex")


def test_a_mask_that_knows_no_proposals_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row of a window gets the mask of its first one."""
    certain = lambda self, request, length: mask(self, request, min(length, len(request.history.tokens)))  # noqa: E731
    monkeypatch.setattr(Matcher, "mask", certain)
    engine = make_engine(config=small_config(certify="startup", audit_fraction=0.0))
    (output,) = engine.generate([PROMPT], CASES["regex"][0])
    assert valid("regex", output), "with one row at a time nothing is wrong"
    with pytest.raises(AssertionError):
        test_no_draft_changes_a_bit("regex", "certified")


def test_a_matcher_that_is_not_rolled_back_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the filter and of rows that see other proposals."""

    def forward_only(self: Matcher, tokens: list[int]) -> None:
        for token in tokens[len(self._read) :]:
            self._read.append(token)
            self._matcher.consume_token(token)

    monkeypatch.setattr(Matcher, "_seek", forward_only)
    with pytest.raises(AssertionError):
        test_no_draft_changes_a_bit("grammar", "speculative")

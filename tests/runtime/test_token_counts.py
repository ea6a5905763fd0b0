"""Counts of a request's tokens equal counting anew, whatever is proposed, kept, thrown away or taken back."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm42c.runtime.request import Proposal, Request
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.token_counts import RowCounts, TokenCounts

TOKENS = st.integers(0, 5)


def new_request(prompt: list[int]) -> Request:
    return Request(
        *("id", 0, prompt, SamplingParams()),
        deterministic=True,
        stream=True,
        seed=0,
        max_tokens=1000,
        eos_ids=frozenset(),
        max_pages=1,
        text=None,
    )


def as_counter(counts: TokenCounts) -> Counter[int]:
    return Counter(dict(zip(counts.ids.tolist(), map(int, counts.times.tolist()), strict=True)))


@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=60))
def test_a_multiset(steps: list[tuple[bool, int]]) -> None:
    counts, naive = TokenCounts(), Counter[int]()
    for adding, token in steps:
        if adding:
            counts.add(token)
            naive[token] += 1
        elif naive[token]:
            counts.remove(token)
            naive[token] -= 1
        assert as_counter(counts) == +naive


ACTIONS = st.one_of(
    st.tuples(st.just("commit"), TOKENS),
    st.tuples(st.just("propose"), TOKENS),
    st.tuples(st.just("drop"), st.just(0)),
    st.tuples(st.just("take back"), st.integers(0, 6)),
    st.tuples(st.just("row"), st.integers(0, 6)),
)


@given(st.lists(TOKENS, min_size=1, max_size=8), st.lists(ACTIONS, max_size=80))
def test_counts_equal_counting_anew(prompt: list[int], actions: list[tuple[str, int]]) -> None:
    request = new_request(prompt)
    for action, value in actions:
        if action == "commit":
            request.proposal = Proposal()
            request.commit(value, 0.0, None, 0)
        elif action == "propose":
            request.propose(value)
        elif action == "drop":
            request.proposal = Proposal()
        elif action == "take back":
            request.history.proved = max(0, request.num_outputs - value)
            request.take_back_unproved()
        else:
            history = request.history.tokens + request.proposal.tokens
            length = max(len(prompt), len(history) - value)
            assert as_counter(request.seen.at(request, length)) == Counter(history[:length])
            assert as_counter(request.emitted.at(request, length)) == Counter(history[len(prompt) : length])


@pytest.mark.parametrize("length", [200, 800])
def test_a_row_costs_what_is_new(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    add = TokenCounts.add

    def counting(self: TokenCounts, token: int) -> None:
        added.append(token)
        add(self, token)

    monkeypatch.setattr(TokenCounts, "add", counting)
    request, counts = new_request([1]), RowCounts(0)
    for i in range(length):
        request.propose(i % 7)
        counts.at(request, request.num_tokens)
        if len(request.proposal.tokens) == 8:  # a verification keeps seven of eight proposals
            kept = request.proposal.tokens[:7]
            request.proposal = Proposal()
            for token in kept:
                request.commit(token, 0.0, None, 0)
    assert len(added) <= 5.5 * length, "each proposal anew for each of the window's rows, never the history"

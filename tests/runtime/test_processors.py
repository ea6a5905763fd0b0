from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_decode

from llm42c.runtime.processors import TextState, process_row
from llm42c.runtime.request import Request
from llm42c.runtime.sampling import SamplingParams

V = 16


def request(params: SamplingParams, prompt: list[int], eos: frozenset[int] = frozenset()) -> Request:
    return Request(
        *("id", 0, prompt, params),
        deterministic=True,
        stream=True,
        seed=0,
        max_tokens=10,
        eos_ids=eos,
        max_pages=1,
        text=None,
    )


def processed(
    params: SamplingParams, row: torch.Tensor, prompt: list[int], output: list[int]
) -> torch.Tensor:
    row = row.clone()
    asked = request(params, prompt, frozenset({15}))
    for token in output:
        asked.propose(token)
    process_row(asked, row, len(prompt) + len(output))
    return row


ROW = torch.linspace(-3, 4, V)


def test_repetition_penalty_is_that_of_hugging_face() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt, output = [1, 2, 3, 12], [12, 9, 9, 0]
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), ROW[None].clone())[0]
    got = processed(SamplingParams(repetition_penalty=1.3), ROW, prompt, output)
    assert torch.equal(got, expected)
    assert not torch.equal(got, ROW)


def test_frequency_and_presence_count_the_output_only() -> None:
    params = SamplingParams(frequency_penalty=0.5, presence_penalty=0.25)
    got = processed(params, ROW, [1, 1, 9], [9, 9, 4])
    expected = ROW.clone()
    expected[9] -= 2 * 0.5 + 0.25
    expected[4] -= 0.5 + 0.25
    assert torch.equal(got, expected)
    assert torch.equal(processed(params, ROW, [1, 9], []), ROW)


def test_bias_then_min_tokens() -> None:
    params = SamplingParams(logit_bias={15: 100.0, 2: 1.5}, min_tokens=2, stop_token_ids=(3,))
    got = processed(params, ROW, [1], [5])
    assert got[15] == got[3] == -torch.inf
    assert got[2] == ROW[2] + 1.5
    late = processed(params, ROW, [1], [5, 5])
    assert late[15] == ROW[15] + 100
    assert late[3] == ROW[3]


def test_user_processors_see_copies_and_cannot_undo_min_tokens() -> None:
    calls = []

    def user(ids: list[int], row: torch.Tensor) -> torch.Tensor:
        calls.append(list(ids))
        ids.clear()
        row[15] = 1000.0
        row[0] = 5.0
        return row.double()

    row = ROW.clone()
    params = SamplingParams(logits_processors=(user, user), min_tokens=1)
    asked = request(params, [1, 2], frozenset({15}))
    process_row(asked, row, 2)
    assert calls == [[1, 2], [1, 2]]
    assert asked.history.tokens == [1, 2]
    assert row[15] == -torch.inf
    assert row[0] == 5.0


@given(st.lists(st.integers(0, V - 1), min_size=1, max_size=20), st.lists(st.integers(0, V - 1), max_size=20))
def test_a_row_is_a_function_of_the_history_alone(prompt: list[int], output: list[int]) -> None:
    params = SamplingParams(repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=-0.2)
    one = processed(params, ROW, prompt, output)
    two = processed(params, ROW, prompt[::-1], output[::-1])
    assert torch.equal(one.view(torch.int32), two.view(torch.int32))


# -- text ----------------------------------------------------------------------------------------------------


def tokens(text: str) -> list[int]:
    return [ord(c) - ord("A") for c in text]


@given(st.lists(st.integers(0, 30), max_size=40))
def test_text_equals_decoding_everything_at_once(ids: list[int]) -> None:
    state = TextState(toy_decode, ())
    for token in ids:
        state.push(token)
        assert toy_decode(ids).startswith(state.text)
    state.finish(False, False)
    assert state.text == toy_decode(ids)


@pytest.mark.parametrize("seed", range(4))
def test_a_token_costs_one_decoding_of_a_few_tokens(seed: int) -> None:
    ids = torch.randint(0, 31, (400,), generator=torch.Generator().manual_seed(seed)).tolist()
    decoded: list[int] = []

    def counting(window: list[int]) -> str:
        decoded.append(len(window))
        return toy_decode(window)

    state = TextState(counting, ())
    for token in ids:
        state.push(token)
    assert len(decoded) <= 1.25 * len(ids)
    assert max(decoded) <= 16
    state.finish(False, False)
    assert state.text == toy_decode(ids)


@given(st.lists(st.integers(0, 3), max_size=30), st.sampled_from([("AB",), ("BBA", "AC"), ("D", "CD")]))
def test_stop_strings_are_found_when_complete(ids: list[int], stops: tuple[str, ...]) -> None:
    state = TextState(toy_decode, stops)
    for i, token in enumerate(ids):
        found = state.push(token)
        text = toy_decode(ids[: i + 1])
        ending = [s for s in stops if text.endswith(s)]
        assert (found is not None) == bool(ending)
        if found is not None:
            assert found == max(ending, key=len)
            safe = state.copy()
            safe.finish(True, False)
            assert safe.text == text[: -len(found)]
            safe = state.copy()
            safe.finish(True, True)
            assert safe.text == text
            return
        assert not any(s in text[: state.safe_length() + 1] for s in stops)


def test_what_is_safe_to_show_is_never_taken_back() -> None:
    state = TextState(toy_decode, ("BAD",))
    shown = ""
    for token in tokens("ABABA"):
        state.push(token)
        shown = state.text[: state.safe_length()]
    assert shown == "ABA"
    assert state.push(3) == "BAD"
    state.finish(True, False)
    assert state.text == "ABA"


def test_copies_are_independent_and_restart_replays() -> None:
    state = TextState(toy_decode, ("ZZ",))
    for token in [1, 2, 10]:
        state.push(token)
    twin = state.copy()
    twin.push(5)
    twin.push(6)
    assert state.text == "BC"
    again = state.restart([1, 2, 10, 5, 6])
    assert (again.text, again.safe_length()) == (twin.text, twin.safe_length())


def test_a_stop_string_inside_an_incomplete_character_waits() -> None:
    state = TextState(toy_decode, ("é",))
    assert state.push(10) is None
    assert state.push(0) == "é"


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(V, dtype=torch.int64), None, [0.0] * V])
def test_a_processor_that_returns_nonsense(bad: object) -> None:
    params = SamplingParams(logits_processors=(lambda ids, row: bad,))  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="float tensor"):
        processed(params, ROW, [1], [])

"""Bad submissions to a running engine: one line each, at once, and nobody else notices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import VOCAB, NoisyModel, ToyModel, make_engine, small_config, solo, toy_decode

from llm42c.errors import IntegrityError, RequestError
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams

HUGE = 10**400  # beyond every float


class Hostile:
    """Fails in ways that nobody expects of an argument."""

    def __iter__(self) -> Any:
        raise RuntimeError("a fault\nof the caller's own")

    __len__ = __index__ = __hash__ = __iter__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("cannot compare")


def _raising() -> Any:
    yield 1
    raise OSError("the source of the prompt broke")


BAD_PROMPTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "empty": list,
    "number": lambda: 5,
    "text": lambda: "123",
    "bytes": lambda: b"123",
    "texts": lambda: ["1", "2"],
    "floats": lambda: [1.0, 2.0],
    "nan": lambda: [math.nan],
    "infinite": lambda: [math.inf],
    "bools": lambda: [True, False],
    "nones": lambda: [1, None],
    "negative": lambda: [1, -1],
    "beyond": lambda: [1, VOCAB],
    "far beyond": lambda: [1, 2**70],
    "nested": lambda: [[1, 2]],
    "dict": lambda: {1: 2},
    "set": lambda: {1, 2},
    "generator that breaks": _raising,
    "hostile": Hostile,
    "hostile token": lambda: [1, Hostile()],
    "matrix": lambda: torch.ones(1, 3, dtype=torch.int64),
    "float tensor": lambda: torch.ones(3),
    "bool tensor": lambda: torch.ones(3, dtype=torch.bool),
    "bool array": lambda: np.ones(3, dtype=bool),
    "scalar tensor": lambda: torch.tensor(3),
    "longer than the context": lambda: [1] * 300,
    "longer than the cache": lambda: [1] * 250,
    "longer than memory": lambda: range(10**12),
    "longer than a length": lambda: range(10**30),
}
BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "dict": lambda: {"max_tokens": 3},
    "class": lambda: SamplingParams,
    "text": lambda: "greedy",
    "nan": lambda: SamplingParams(temperature=math.nan),
    "infinite": lambda: SamplingParams(temperature=math.inf),
    "negative": lambda: SamplingParams(temperature=-1),
    "huge temperature": lambda: SamplingParams(temperature=HUGE),
    "temperature beyond float32": lambda: SamplingParams(temperature=1e39),
    "penalty of nothing in float32": lambda: SamplingParams(repetition_penalty=1e-60),
    "penalty beyond float32": lambda: SamplingParams(repetition_penalty=1e300),
    "top_p of nothing in float32": lambda: SamplingParams(temperature=1.0, top_p=1e-60),
    "text for a number": lambda: SamplingParams(temperature="0"),  # type: ignore[arg-type]
    "hostile": lambda: SamplingParams(stop=Hostile()),  # type: ignore[arg-type]
    "hostile number": lambda: SamplingParams(max_tokens=Hostile()),  # type: ignore[arg-type]
    "negative stop id": lambda: SamplingParams(stop_token_ids=(-1,)),
    "stop id beyond": lambda: SamplingParams(stop_token_ids=(VOCAB,)),
    "bias beyond": lambda: SamplingParams(logit_bias={VOCAB: 1.0}),
    "bias nan": lambda: SamplingParams(logit_bias={1: math.nan}),
    "huge max_tokens": lambda: SamplingParams(max_tokens=HUGE),
    "huge min_tokens": lambda: SamplingParams(min_tokens=HUGE),
    "huge seed": lambda: SamplingParams(seed=HUGE),
    "huge top_k": lambda: SamplingParams(temperature=1.0, top_k=-HUGE),
    "empty stop": lambda: SamplingParams(stop=("",)),
    "processors": lambda: SamplingParams(logits_processors=(3,)),  # type: ignore[arg-type]
}
BAD_KEYWORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "id in use": lambda: {"request_id": "good-0"},
    "empty id": lambda: {"request_id": ""},
    "number as id": lambda: {"request_id": 7},
    "id of two lines": lambda: {"request_id": "a\nb"},
    "list as id": lambda: {"request_id": []},
    "hostile id": lambda: {"request_id": Hostile()},
    "contract": lambda: {"contract": "0" * 64},
    "contract number": lambda: {"contract": 3},
    "contract lines": lambda: {"contract": "a\nb"},
    "hostile contract": lambda: {"contract": Hostile()},
    "deterministic": lambda: {"deterministic": "yes"},
    "stream": lambda: {"stream": None},
}


def _refuse(engine: Engine, prompt: Any, make_params: Callable[[], Any], **keywords: Any) -> None:
    """Submit; it must be refused by one line and leave nothing behind."""
    before = list(engine._requests), list(engine._scheduler.waiting), engine._pool.num_free
    with pytest.raises(RequestError) as caught:
        engine.submit(prompt, make_params(), **keywords)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300
    assert (list(engine._requests), list(engine._scheduler.waiting), engine._pool.num_free) == before


def _small() -> SamplingParams:
    return SamplingParams(max_tokens=4)


def _bad_submit(engine: Engine, kind: str, name: str) -> None:
    if kind == "prompt":
        _refuse(engine, BAD_PROMPTS[name](), _small)
    elif kind == "params":
        _refuse(engine, [1, 2, 3], BAD_PARAMS[name])
    else:
        _refuse(engine, [1, 2, 3], _small, **BAD_KEYWORDS[name]())


ALL_BAD = [
    *(("prompt", name) for name in BAD_PROMPTS),
    *(("params", name) for name in BAD_PARAMS),
    *(("keyword", name) for name in BAD_KEYWORDS),
]


@pytest.mark.parametrize(("kind", "name"), ALL_BAD)
def test_each_is_refused_by_one_line(kind: str, name: str) -> None:
    engine = make_engine(config=small_config(num_pages=62))
    engine.submit([1], _small(), request_id="good-0")
    _bad_submit(engine, kind, name)


GOOD = (
    SamplingParams(max_tokens=12, ignore_eos=True),
    SamplingParams(max_tokens=9, temperature=0.9, seed=5, top_k=2**40, logprobs=10**9),
    SamplingParams(max_tokens=11, repetition_penalty=1.3, frequency_penalty=0.5, stop=("AB",)),
    SamplingParams(temperature=3e38, seed=1, max_tokens=5),
)


@functools.cache
def _solo(i: int) -> tuple[list[int], list[float]]:
    return solo(_prompt(i), GOOD[i % len(GOOD)])


def _prompt(i: int) -> list[int]:
    return [(7 * i + 3 * j) % VOCAB for j in range(2 + 5 * (i % 5))]


ACTIONS = st.one_of(
    st.sampled_from(ALL_BAD),
    st.tuples(st.just("good"), st.integers(0, 7)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("abort"), st.sampled_from(["nobody", "", "good-999"])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTIONS, min_size=10, max_size=50), st.sampled_from([ToyModel, NoisyModel]))
def test_good_requests_among_bad_ones_say_what_they_say_alone(
    actions: list[tuple[str, Any]], fast: Callable[[], ToyModel]
) -> None:
    engine = make_engine(fast(), small_config(num_pages=62))
    engine.submit(_prompt(0), GOOD[0], request_id="good-0")
    wanted, done = {"good-0": 0}, {}

    def step() -> None:
        done.update({o.request_id: o for o in engine.step() if o.finished})

    for kind, what in actions:
        if kind == "good":
            wanted[engine.submit(_prompt(what), GOOD[what % len(GOOD)])] = what
        elif kind == "step":
            for _ in range(what):
                step()
        elif kind == "abort":
            assert engine.abort(what) is False
        elif what != "id in use" or "good-0" in engine._requests:
            _bad_submit(engine, kind, what)
    while engine.has_unfinished():
        step()
    assert done.keys() == wanted.keys()
    for request_id, i in wanted.items():
        assert (done[request_id].token_ids, done[request_id].logprobs) == _solo(i)


@pytest.mark.parametrize("unknown", [None, 3, [], Hostile()])
def test_what_is_no_id_is_refused_by_abort(unknown: Any) -> None:
    engine = make_engine()
    mine = engine.submit([1], _small())
    with pytest.raises(RequestError, match="request id"):
        engine.abort(unknown)
    with pytest.raises(RequestError, match="no request 'nobody' is running"):
        engine.kv_digest("nobody")
    assert engine.abort(mine)
    assert not engine.abort(mine)


def test_an_id_that_the_engine_would_choose_may_be_taken() -> None:
    engine = make_engine()
    engine.submit([1], _small(), request_id="request-1")
    engine.submit([1], _small(), request_id="request-2")
    other = engine.submit([2], _small())
    assert other not in ("request-1", "request-2")
    assert len(engine._requests) == 3


def test_integers_of_other_libraries_are_token_ids() -> None:
    engine = make_engine()
    expected = solo([1, 2, 3], _small())
    for prompt in (np.array([1, 2, 3], dtype=np.int32), torch.tensor([1, 2, 3]), (1, 2, 3), range(1, 4)):
        (output,) = engine.generate([prompt], _small())  # type: ignore[list-item]
        assert (output.token_ids, output.logprobs) == expected
        assert all(type(t) is int for t in output.prompt_token_ids)


def test_a_closed_engine_refuses() -> None:
    engine = make_engine()
    engine.submit([1], _small())
    engine.close()
    engine.close()
    assert not engine.has_unfinished()
    assert engine.stats().aborted == 1
    assert engine.step() == []
    assert engine.abort("request-0") is False
    with pytest.raises(RequestError, match=r"^the engine is closed$"):
        engine.submit([1], _small())
    with pytest.raises(RequestError, match=r"^the engine is closed$"):
        engine.generate([[1]], _small())


@pytest.mark.parametrize("prompts", [None, 3, Hostile(), {1: [2]}])
def test_generate_refuses_what_is_no_list_of_prompts(prompts: Any) -> None:
    with pytest.raises(RequestError, match="prompts must be a sequence"):
        make_engine().generate(prompts)


def test_generate_refuses_what_is_no_list_of_parameters() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match="params must be a SamplingParams or a list of them, not 3"):
        engine.generate([[1]], 3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="token id -1"):
        engine.generate([[1], [-1]])
    assert not engine.has_unfinished()


def test_parameters_are_what_they_were_at_submit() -> None:
    bias = {3: 5.0}
    params = SamplingParams(max_tokens=6, logit_bias=bias, ignore_eos=True)
    expected = solo([1, 2], params)
    engine = make_engine()
    engine.submit([1, 2], params, stream=False)
    bias[3], bias[10**9] = -5.0, 1.0
    done: list[RequestOutput] = []
    while engine.has_unfinished():
        done += engine.step()
    assert [(o.token_ids, o.logprobs) for o in done] == [expected]


def test_news_of_others_outlives_a_generate_that_is_broken_off() -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    other = engine.submit([5, 6], params)
    step = engine.step

    def until_done() -> list[RequestOutput]:
        if other not in engine._requests:
            raise IntegrityError("the verifier graph is not row independent")
        return step()

    engine.step = until_done  # type: ignore[method-assign]
    with pytest.raises(IntegrityError):
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=40, ignore_eos=True))
    assert not engine.has_unfinished()
    (output,) = [o for o in step() if o.finished]
    assert output.request_id == other
    assert (output.token_ids, output.logprobs) == solo([5, 6], params)


def test_a_detokenizer_that_gives_no_text_fails_its_request_alone() -> None:
    engine = make_engine(decode=lambda ids: None if 10 in ids else toy_decode(ids))  # type: ignore[arg-type,return-value]
    both = [SamplingParams(max_tokens=3, ignore_eos=True, logit_bias={t: 100.0}) for t in (10, 11)]
    bad, good = engine.generate([[1, 2], [1, 2]], both)
    assert (bad.finish_reason, bad.error) == ("error", "TypeError: the detokenizer returned NoneType")
    assert (good.finish_reason, good.text) == ("length", "LLL")


def test_a_closed_engine_runs_nothing() -> None:
    engine = make_engine()
    engine.certificates.want((2, 2))
    engine.step()
    calls = engine._verifier.calls  # type: ignore[attr-defined]
    assert calls > 0
    engine.close()
    assert engine.step() == []
    assert engine._verifier.calls == calls  # type: ignore[attr-defined]

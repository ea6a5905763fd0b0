"""A step that is broken off at any line: the engine is empty afterwards, and goes on saying the same."""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from toy import VOCAB, FlipModel, NoisyModel, ToyModel, make_engine, small_config, solo

from llm42c.errors import IntegrityError
from llm42c.runtime import engine as engine_module
from llm42c.runtime.engine import Engine
from llm42c.runtime.pump import Pump
from llm42c.runtime.sampling import SamplingParams

HOME = str(Path(engine_module.__file__).parent)
PROMPTS = [[(7 * i + 3 * j) % VOCAB for j in range(2 + 5 * i)] for i in range(4)]
PARAMS = [SamplingParams(max_tokens=12), SamplingParams(max_tokens=9, temperature=0.8, seed=5, stop=("AB",))]


@contextlib.contextmanager
def _interrupted_at(event: int | None) -> Iterator[list[int]]:
    """Ctrl-C at the `event`-th line that runs in runtime/ (None: never); yields the count of lines so far."""
    count = [0]

    def trace(frame: FrameType, kind: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if kind == "line":
            count[0] += 1
            if count[0] == event:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def _work(engine: Engine) -> list[tuple[list[int], list[float]]]:
    outputs = engine.generate(PROMPTS, [PARAMS[i % 2] for i in range(len(PROMPTS))])
    return [(o.token_ids, o.logprobs) for o in outputs]


@pytest.mark.parametrize("fast", [ToyModel, NoisyModel])
def test_at_any_line(fast: Callable[[], ToyModel]) -> None:
    """Scarce pages, so that preemptions and the prefix cache are broken off too; probes from the start."""
    config = small_config(num_pages=14)
    expected = [solo(p, PARAMS[i % 2]) for i, p in enumerate(PROMPTS)]
    engine = make_engine(fast(), config, check=True)
    with _interrupted_at(None) as cold:
        assert _work(engine) == expected
    with _interrupted_at(None) as warm:
        assert _work(engine) == expected
    rng = random.Random(0)
    broken = 0
    for i in range(60):
        if i % 4 == 0:
            engine = make_engine(fast(), config, check=True)
        try:
            with _interrupted_at(rng.randrange(1, (warm if i % 4 else cold)[0])):
                assert _work(engine) == expected
        except KeyboardInterrupt:
            broken += 1
        assert not engine.has_unfinished()
        assert engine._pool.num_free == config.num_pages
    assert broken > 20  # else nothing was shown
    assert _work(engine) == expected


def test_at_every_line_of_a_submission() -> None:
    engine = make_engine()
    other = engine.submit(PROMPTS[0], PARAMS[0])
    reached: list[int] = []
    engine.step = lambda: reached.append(lines) or []  # type: ignore[func-returns-value, method-assign]
    lines = 0
    while not reached:
        lines += 1
        with contextlib.suppress(KeyboardInterrupt), _interrupted_at(lines):
            engine.generate(PROMPTS[1:3], PARAMS[0])
        assert reached or list(engine._requests) == [other] == [r.id for r in engine._scheduler.waiting]
    assert lines > 100  # both submissions were walked through


def test_a_broken_step_fails_the_requests_of_other_threads_instead_of_hanging_them() -> None:
    engine = make_engine(FlipModel())
    pump = Pump(engine)
    mine = pump.submit(PROMPTS[0], PARAMS[0], stream=True)
    theirs = pump.submit(PROMPTS[1], PARAMS[0], stream=True)
    found: list[Any] = []
    models = engine._fast, engine._verifier

    def forward(*_: Any) -> Any:
        other.start()  # it waits for the step that is under way
        raise MemoryError

    for model in models:
        model.forward = forward  # type: ignore[method-assign]
    other = threading.Thread(target=lambda: found.extend(pump.poll([theirs])))
    with pytest.raises(MemoryError):
        pump.poll([mine])
    other.join(30)
    assert not other.is_alive()
    assert [(o.request_id, o.finish_reason) for o in found] == [(theirs, "error")]
    assert "MemoryError" in found[0].error
    for model in models:
        del model.forward  # type: ignore[method-assign]
    assert not engine.has_unfinished()
    assert [o.token_ids for o in engine.generate(PROMPTS[:1], PARAMS[0])] == [solo(PROMPTS[0], PARAMS[0])[0]]


def test_an_integrity_failure_leaves_nothing_running_behind_a_shared_engine() -> None:
    engine = make_engine()
    pump = Pump(engine)
    mine = pump.submit(PROMPTS[0], PARAMS[0], stream=True)
    other = engine.submit(PROMPTS[1], PARAMS[0])  # not the pump's

    def convict(spare: bool) -> bool:
        raise IntegrityError("the verifier graph is not row independent")

    engine.certificates.advance = convict  # type: ignore[method-assign]
    with pytest.raises(IntegrityError):
        pump.poll([mine])
    assert [o.finish_reason for o in pump.poll([mine])] == ["error"]
    assert list(engine._requests) == [other]

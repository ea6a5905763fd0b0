"""The soak on a toy model: nothing differs, and what would differ is found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import toy

from llm42c.runtime.bench import soak
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.engine import Engine

CONFIG = EngineConfig(
    max_num_seqs=16,
    max_num_batched_tokens=64,
    page_size=4,
    num_pages=512,
    verify_tokens=32,
    verify_seqs=8,
    verify_window=8,
)


def _engine(fast: Any, **changes: Any) -> Engine:
    config = replace(CONFIG, **changes)
    verifier = toy.ToyModel(fixed=(config.verify_tokens, config.verify_seqs, config.rows))
    return Engine(fast, verifier, config, sampler=toy.ToySampler())


def _requests(seed: int, deterministic: bool = True) -> list[soak.Request]:
    made = soak.make_requests(40, 20, vocab_size=toy.VOCAB, seed=seed, longest_prompt=60)
    return made if deterministic else [replace(r, deterministic=False) for r in made]


def _quiet(name: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_differs_on_a_fast_path_that_errs(seed: int) -> None:
    requests = _requests(seed)
    crowded = _engine(toy.NoisyModel(), num_pages=50)
    result = soak.run_soak(_engine(toy.NoisyModel()), crowded, requests, _quiet)
    assert result.differ == []
    assert (result.deterministic, result.ordinary) == (40, len(requests) - 40)
    # Vacuity guards.
    assert result.ordinary > 5
    assert result.aborted > 1
    assert min(result.stats[n] for n in ("rollbacks", "preemptions", "prefix_hits")) > 0
    assert result.tokens > 40 * 10
    assert result.as_row()["differ"] == 0


def test_requests_that_differ_are_found() -> None:
    requests = _requests(0)
    solo, crowded = _engine(toy.ToyModel()), _engine(toy.ToyModel(), num_pages=50)
    submit = crowded.submit
    crowded.submit = lambda *a, **k: submit(*a, **{**k, "deterministic": False})  # type: ignore[method-assign]
    crowded._fast = toy.NoisyModel()
    result = soak.run_soak(solo, crowded, requests, _quiet)
    assert len(result.differ) > 20


def test_an_aborted_request_must_hold_a_prefix() -> None:
    request = replace(_requests(0)[0], abort_after=2)
    expected = ([1, 2, 3], [-0.5, -0.25, -0.125])
    assert soak._agrees(request, ([1, 2], [-0.5, -0.25]), expected)
    assert soak._agrees(request, expected, expected)
    assert not soak._agrees(request, ([1], [-0.5]), expected)
    assert not soak._agrees(request, ([1, 2], [-0.5, -0.26]), expected)
    assert not soak._agrees(replace(request, abort_after=None), ([1, 2], [-0.5, -0.25]), expected)


def test_the_same_seed_makes_the_same_requests() -> None:
    assert _requests(3) == _requests(3) != _requests(4)

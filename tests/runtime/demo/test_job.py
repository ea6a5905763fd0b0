"""The main job on a toy model: agreement, its negative control, and that pressure is pressure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import toy

from llm42c.runtime.certificates import Certificates
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.demo import job
from llm42c.runtime.engine import Engine

CONFIG = EngineConfig(
    max_num_seqs=16,
    max_num_batched_tokens=64,
    page_size=4,
    num_pages=512,
    verify_tokens=32,
    verify_seqs=8,
    verify_window=8,
    audit_fraction=0.0,
)


@dataclass
class Built:
    """Stands for a BuiltEngine; `broken` engines, by order of making, compute other bits."""

    fast: Any = toy.NoisyModel
    broken: frozenset[int] = frozenset()
    made: list[Engine] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self._make(CONFIG, toy.ToyModel)

    def variant(self, **changes: Any) -> Engine:
        verifier = Biased if len(self.made) in self.broken else toy.ToyModel
        self.made.append(self._make(replace(CONFIG, **changes), verifier))
        return self.made[-1]

    def _make(self, config: EngineConfig, verifier: Any) -> Engine:
        shape = (config.verify_tokens, config.verify_seqs, config.rows)
        return Engine(self.fast(), verifier(fixed=shape), config, sampler=toy.ToySampler())


class Biased(toy.ToyModel):
    """Row independent, but with another last bit in every logit."""

    def disturb_logits(self, batch: Any, logits: np.ndarray) -> np.ndarray:
        return np.nextafter(logits, np.float32(100))


@pytest.fixture(scope="module")
def jobs() -> list[job.Job]:
    rng = np.random.default_rng(5)
    lengths = [1, 2, 3, 5, 8, 9, 13, 16, 21, 31, 40, 70]
    return job.make_jobs([(f"p{n}", rng.integers(8, toy.VOCAB, n).tolist()) for n in lengths], 24)


def _quiet(name: str, done: int, total: int) -> None:
    pass


def test_jobs_are_half_greedy_half_seeded(jobs: list[job.Job]) -> None:
    greedy = [job for job in jobs if job.params.temperature == 0]
    assert len(greedy) == len(jobs) // 2
    assert all(job.params.seed is not None for job in jobs if job not in greedy)
    assert len({job.params.seed for job in jobs}) == 1 + len(jobs) // 2


def test_runs_agree_on_a_fast_path_that_errs(jobs: list[job.Job]) -> None:
    seen: list[tuple[str, int, int]] = []
    result = job.run_demo(Built(), jobs, lambda *news: seen.append(news))  # type: ignore[arg-type]
    assert result.agree
    assert [run.name for run in result.runs] == ["alone", "together", "pressure"]
    assert len({run.tokens_digest for run in result.runs}) == 1
    assert len({run.logprobs_digest for run in result.runs}) == 1
    # Vacuity guards: it erred, requests were preempted, ordinary ones shared the batches, all tokens came.
    assert all(run.stats["rollbacks"] > 0 for run in result.runs)
    pressure = result.runs[2].stats
    assert pressure["preemptions"] > 0
    assert pressure["ordinary_tokens"] == 24 * (len(jobs) // 2)
    assert result.runs[0].stats["preemptions"] == 0
    assert all(len(answer.tokens) == 24 for run in result.runs for answer in run.answers)
    assert seen[-1] == ("pressure", 24 * 18, 24 * 18)


def test_under_pressure_the_fast_path_becomes_certified(
    jobs: list[job.Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    def share() -> float:
        pressure = job.run_demo(Built(fast=toy.ToyModel), jobs, _quiet).runs[2]  # type: ignore[arg-type]
        assert pressure.stats["preemptions"] > 5
        return float(pressure.stats["certified_share"])

    assert share() > 0.5
    monkeypatch.setattr(Certificates, "reserve", lambda self, num_running: 0)
    assert share() == 0.0, "vacuous: there were pages enough"


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_one_other_bit_in_any_run_is_noticed(jobs: list[job.Job], broken: int) -> None:
    built = Built(broken=frozenset({broken}))
    result = job.run_demo(built, jobs, _quiet)  # type: ignore[arg-type]
    assert not result.agree
    assert sum(bool(run.differ) for run in result.runs) == (2 if broken == 0 else 1)


def test_a_sign_of_zero_is_a_difference(jobs: list[job.Job]) -> None:
    plus, minus = job.Answer((3,), (0.0,)), job.Answer((3,), (-0.0,))
    assert job.differing(jobs[:1], [plus], [plus]) == []
    assert job.differing(jobs[:1], [plus], [minus]) == [jobs[0].name]
    assert job.differing(jobs[:1], [plus], [job.Answer((4,), (0.0,))]) == [jobs[0].name]


def test_the_result_is_data(jobs: list[job.Job]) -> None:
    built = Built(fast=toy.ToyModel)
    data = json.loads(json.dumps(job.run_demo(built, jobs[:4], _quiet).as_dict()))  # type: ignore[arg-type]
    assert data["agree"] is True
    assert data["shapes"]["certified"] > 0
    assert {run["run"]: run["differ"] for run in data["runs"]} == {
        "alone": [],
        "together": [],
        "pressure": [],
    }


def test_scarce_pages_hold_the_largest_request(jobs: list[job.Job]) -> None:
    built: Any = Built()
    assert job.scarce_pages(built, jobs[-1:]) == -(-(70 + 24) // CONFIG.page_size)
    assert job.scarce_pages(built, jobs) < sum(-(-(len(j.prompt) + 24) // 4) for j in jobs) // 3

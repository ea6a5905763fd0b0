"""The soak of a server: nothing differs, is lost or comes twice; and what would be, is counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiohttp")

import toy
from serving import Running, running, toy_engine, toy_tokenizer

from llm42c.runtime.bench.arrivals import Arrival, arrivals
from llm42c.runtime.bench.client import Reply
from llm42c.runtime.bench.server_soak import ServerSoak, SoakResult, judge
from llm42c.runtime.bench.servers import MODEL, HttpServer, _resident
from llm42c.runtime.server.service import Service


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    with running(toy_engine(toy.NoisyModel()), toy_tokenizer(), model=MODEL) as server:
        yield server


class Here(HttpServer):
    """A server in this process."""

    def __init__(self, url: str) -> None:
        self.name, self.url, self._counted = "llm42", url, True

    def resident_bytes(self) -> int:
        return _resident(os.getpid())


def pool() -> list[Arrival]:
    vocabulary = (1, toy.VOCAB)
    return arrivals("sharegpt", 12, 1.0, 100, scale=0.02, max_model_len=60, vocabulary=vocabulary)


def quiet(name: str, done: int, total: int) -> None:
    pass


def test_a_server_under_load_gives_the_answers_that_it_gave_alone(up: Running) -> None:
    result = ServerSoak(Here(up.url), pool()).run(0.05, 60.0, 0, quiet)
    row = result.as_row()
    assert not result.failed, row
    assert row["differ"] == row["lost"] == row["doubled"] == row["refused"] == 0
    # Guards: there was something to find.
    assert row["deterministic"] > 80
    assert row["ordinary"] > 10
    assert row["left"] > 5
    assert result.metrics["rollbacks"] > 20
    assert len(result.memory) > 5
    assert row["memory_start_mb"] > 50


def test_answers_that_differ_are_found(up: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the server promises nothing."""
    monkeypatch.setattr(Service, "_deterministic", lambda service, body: False)
    soak = ServerSoak(Here(up.url), pool())
    for body in soak._bodies:
        del body["logprobs"]
    result = soak.run(0.02, 60.0, 0, quiet)
    assert result.counts["differ"] > 5
    assert result.failed


def judged(reply: Reply, most: int | None = None, ordinary: bool = False) -> dict[str, int]:
    counts: Counter[str] = Counter()
    judge(counts, reply, None if ordinary else ([1, 2, 3], [-0.5, -0.25, -1.0]), 3, most)
    return {name: n for name, n in counts.items() if n and name not in ("asked", "deterministic", "tokens")}


def reply(tokens: list[int], **changes: Any) -> Reply:
    logprobs = [-0.5, -0.25, -1.0, 0.0][: len(tokens)]
    made = {"tokens": tokens, "logprobs": logprobs, "ends": 1, "closed": 1, "error": None}
    return Reply(0.0, **(made | changes))


def test_what_became_of_a_request() -> None:
    assert judged(reply([1, 2, 3])) == {}
    assert judged(reply([1, 2, 4])) == {"differ": 1}
    assert judged(reply([1, 2, 3], logprobs=[-0.5, -0.25, -1.5])) == {"differ": 1}
    assert judged(reply([1, 2])) == {"lost": 1}
    assert judged(reply([1, 2], ends=0, closed=0, error="ServerDisconnectedError: x")) == {"lost": 1}
    assert judged(reply([1, 2, 3], closed=0)) == {"lost": 1}
    assert judged(reply([1, 2, 3, 3])) == {"doubled": 1, "differ": 1}
    assert judged(reply([1, 2, 3], ends=2)) == {"doubled": 1}
    assert judged(reply([1, 2], ends=0, closed=0), most=2) == {"left": 1}
    assert judged(reply([1, 3], ends=0, closed=0), most=2) == {"left": 1, "differ": 1}
    assert judged(reply([1], ends=0, closed=0), most=2) == {"lost": 1}
    assert judged(reply([], ends=0, closed=0, error="429: full")) == {"refused": 1}
    gone = "replica-0 is gone, and an ordinary stream cannot go on elsewhere"
    assert judged(reply([7], ends=0, closed=0, error=gone), ordinary=True) == {"ordinary": 1, "broken": 1}
    assert judged(reply([1], ends=0, closed=0, error=gone)) == {"lost": 1}


def test_the_slope_of_memory_is_that_of_the_second_half() -> None:
    memory = [(float(i), 10**6 * min(i, 50) + 100 * i) for i in range(100)]
    assert SoakResult(1.0, 1.0, memory=memory).slope() == pytest.approx(100 * 3600)

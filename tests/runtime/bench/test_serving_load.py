"""`llm42 bench serve`: arrivals by seed, a client that counts what comes, turns, rows and the plot."""

from __future__ import annotations

import asyncio
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("aiohttp")

import toy
from serving import Running, running, toy_engine, toy_tokenizer

from llm42c.errors import ConfigError
from llm42c.runtime.bench import plot, servers, serving
from llm42c.runtime.bench.arrivals import TRACES, arrivals, check_traces
from llm42c.runtime.bench.client import Reply, ask, connections
from llm42c.runtime.bench.servers import MODEL, HttpServer
from llm42c.runtime.bench.serving import Contender, Load, Rate, Slo, Sweep

LOAD = Load("sharegpt", 6, scale=0.01, max_model_len=60, vocabulary=(1, toy.VOCAB))


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    with running(toy_engine(toy.NoisyModel()), toy_tokenizer(), model=MODEL) as server:
        yield server


class Recorded:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def pause(self) -> None:
        self.log.append("-")

    def resume(self) -> None:
        self.log.append(self.name)


def contender(up: Running, percent: int | None, log: list[str], name: str = "llm42") -> Contender:
    server = HttpServer.__new__(HttpServer)
    server.name, server.url, server._counted = name, up.url, percent is not None
    server.held = Recorded(f"{name}{'' if percent is None else percent}", log)  # type: ignore[assignment]
    return Contender(server, percent)


def quiet(name: str, done: int, total: int) -> None:
    pass


def test_arrivals_are_functions_of_the_seed() -> None:
    made = arrivals("sharegpt", 2000, 4.0, 10, scale=0.1, max_model_len=10**6)
    assert made == arrivals("sharegpt", 2000, 4.0, 10, scale=0.1, max_model_len=10**6)
    prompt, output = TRACES["sharegpt"].prompt, TRACES["sharegpt"].output
    lengths = [len(arrival.prompt) for arrival in made]
    assert statistics.median(lengths) == pytest.approx(prompt.median / 10, rel=0.1)
    assert statistics.quantiles(lengths, n=10)[-1] == pytest.approx(prompt.p90 / 10, rel=0.1)
    assert statistics.median(a.new_tokens for a in made) == pytest.approx(output.median / 10, rel=0.1)
    assert made[-1].at_s == pytest.approx(2000 / 4.0, rel=0.1)
    assert sum(a.deterministic for a in made) == 200
    twice = arrivals("sharegpt", 2000, 8.0, 50, contents=1, scale=0.1, max_model_len=10**6)
    assert [a.at_s * 2 for a in twice] == pytest.approx([a.at_s for a in made])
    assert [len(a.prompt) for a in twice] == lengths
    assert all(a.prompt[:9] != b.prompt[:9] for a, b in zip(made, twice, strict=True))
    assert arrivals("sharegpt", 9, 4.0, 0, seed=1)[3].at_s != made[3].at_s
    assert {a.at_s for a in arrivals("arxiv", 5, math.inf, 0)} == {0.0}
    small = arrivals("arxiv", 50, 1.0, 0, max_model_len=200)
    assert max(len(a.prompt) + a.new_tokens for a in small) == 200
    with pytest.raises(ConfigError, match="no trace 'x'"):
        check_traces(["arxiv", "x"])


def test_engines_take_turns_at_the_same_arrivals(up: Running) -> None:
    log: list[str] = []
    ours = [contender(up, percent, log) for percent in (0, 100)]
    peer = contender(up, None, log, "peer")
    sweep = Sweep([*ours, peer], peer, Slo())
    assert log == ["-"] * 3
    log.clear()
    all_at_once, share = sweep.run(LOAD, [Rate(0.8, True), Rate(math.inf)], 2, quiet)
    turns = [name for name in log if name != "-"][3:]  # behind those that warm up
    assert turns == ["llm420", "llm42100", "peer", "peer", "llm42100", "llm420"] * 2
    assert log[1::2] == ["-"] * (len(log) // 2), "two ran at once"
    rows = [result.as_row() for result in (*all_at_once, *share)]
    assert rows[0]["qps"] == "inf"
    assert rows[3]["qps"] == pytest.approx(0.8 * rows[2]["requests_s"], rel=0.01)
    tokens = sum(a.new_tokens for a in LOAD.arrivals(math.inf, 0, 0)) * 2
    assert rows[0]["ordinary_tokens"] == tokens
    assert rows[1]["certified_tokens"] + rows[1]["verified_tokens"] == tokens
    assert rows[1]["rollbacks"] > 0
    assert rows[1]["recomputed_tokens"] > 0
    assert rows[2]["rollbacks"] == rows[2]["deterministic_ttft_p99_ms"] == ""
    assert rows[0]["ordinary_ttft_p50_ms"] == rows[0]["ttft_p50_ms"] > 0
    assert rows[0]["deterministic_ttft_p50_ms"] == ""


def test_a_request_that_is_not_answered_ends_the_measurement(up: Running) -> None:
    load = Load("sharegpt", 3, scale=0.01, max_model_len=60, vocabulary=(toy.VOCAB, toy.VOCAB + 1))
    with pytest.raises(ConfigError, match="did not answer a request: 400"):
        contender(up, 100, []).run(load.arrivals(math.inf, 100, 0))


def test_goodput_counts_who_was_served_in_time() -> None:
    slo = Slo(ttft_s=1.0, tbt_s=0.1)
    in_time = Reply(0.0, [1, 2, 3], [1.0, 1.15, 1.2])
    assert slo.good(in_time)
    assert in_time.gaps == pytest.approx([0.15, 0.05])
    assert not slo.good(Reply(0.0, [1, 2, 3], [1.01, 1.02, 1.03]))
    assert not slo.good(Reply(0.0, [1, 2, 3], [0.5, 0.6, 0.75]))
    assert slo.good(Reply(0.0, [1], [0.5]))


def test_the_client_sees_errors_whole_answers_and_leaves_when_told(up: Running) -> None:
    async def replies() -> list[Reply]:
        body: dict[str, Any] = {"model": MODEL, "prompt": "ABC", "max_tokens": 9, "ignore_eos": True}
        body |= {"return_token_ids": True}
        async with connections() as session:
            return [
                await ask(session, up.url, body | {"stream": True}),
                await ask(session, up.url, body),
                await ask(session, up.url, body | {"stream": True}, most_tokens=4),
                await ask(session, up.url, body | {"model": "other"}),
                await ask(session, "http://127.0.0.1:9", body),
            ]

    stream, whole, left, refused, nobody = asyncio.run(replies())
    assert stream.whole
    assert whole.whole
    assert stream.tokens == whole.tokens
    assert len(stream.tokens) == 9
    assert left.tokens == stream.tokens[: len(left.tokens)]
    assert not left.whole
    assert refused.error is not None
    assert refused.error.startswith("404")
    assert nobody.error is not None


def test_rates() -> None:
    assert [Rate.parse(text) for text in ("2.5", "inf", "80%")] == [
        Rate(2.5),
        Rate(math.inf),
        Rate(0.8, True),
    ]
    for bad in ("0", "-1", "nan", "x", "inf%", ""):
        with pytest.raises(ConfigError, match="--qps"):
            Rate.parse(bad)


def test_a_server_that_ends_at_once_says_why() -> None:
    with pytest.raises(ConfigError, match=r"llm42 ended: .*nothing"):
        servers.llm42_server("/nothing", max_model_len=None, max_queue=1)
    program = "import sys; sys.exit('no port for you')"
    with pytest.raises(ConfigError, match="fails ended: no port for you"):
        HttpServer("fails", [sys.executable, "-c", program], {})


def test_the_plot(up: Running, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sweep = Sweep([contender(up, 100, [])], contender(up, 100, []), Slo())
    (results,) = sweep.run(LOAD, [Rate(50.0)], 1, quiet)
    path = tmp_path / "x.svg"
    plot.check_plot(path)
    plot.plot(path, [result.as_row() for result in results], "llm42 bench serve")
    assert "<svg" in path.read_text()
    with pytest.raises(ConfigError, match="a plot is"):
        plot.check_plot(tmp_path / "x.txt")
    with pytest.raises(ConfigError, match="cannot write"):
        plot.plot(tmp_path / "no" / "x.svg", [results[0].as_row()], "")
    assert serving.CLASSES == ("ordinary", "deterministic")

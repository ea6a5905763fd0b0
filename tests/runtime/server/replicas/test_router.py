"""The router with replicas in this process, which die when they are told: what clients get all the same."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import re
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Gated, Running, listening, post, raw_post, toy_engine, toy_tokenizer, until

from llm42c.errors import ConfigError
from llm42c.runtime.server.app import make_app
from llm42c.runtime.server.replicas import places, relay
from llm42c.runtime.server.replicas.call import Call, Head, LostError, Piece, State, answered
from llm42c.runtime.server.replicas.places import Places, agree
from llm42c.runtime.server.replicas.router import Router, make_router_app
from llm42c.runtime.server.service import Service
from llm42c.runtime.server.settings import Settings

URL = "/v1/completions"
SETTINGS = Settings("tiny", drain_s=5.0)
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "ABCDEF",
    "max_tokens": 30,
    "temperature": 1.0,
    "ignore_eos": True,
    "return_token_ids": True,
}


class Local:
    """A replica in the router's own event loop. `dies_after`: pieces of streams that it still sends."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, Gated(0.002)
        self.service = Service(toy_engine(self.model, max_num_seqs=4), toy_tokenizer(), SETTINGS)
        self.alive, self.dies_after = True, None
        self.dies_after: int | None
        self.asked: list[Call] = []
        self._app = make_app(self.service)
        self._started = False

    async def watch(self) -> AsyncGenerator[State]:
        while not self.alive:
            await asyncio.sleep(0.01)
        if not self._started:
            self._started = True
            self.service.start()
        while self.alive:
            yield State(1, self.service.contract.to_json())
            await asyncio.sleep(0.01)
        raise LostError("killed")

    async def ask(self, call: Call) -> AsyncGenerator[Head | Piece]:
        self.asked.append(call)
        if not self.alive:
            raise LostError("killed")
        async with contextlib.aclosing(answered(self._app, call)) as messages:
            async for message in messages:
                if isinstance(message, Piece) and self.dies_after is not None:
                    self.dies_after -= 1
                    if self.dies_after < 0:
                        self.alive, self.dies_after = False, None
                        raise LostError("killed")
                yield message

    def drafts(self) -> int:
        return self.service.flights.thread.call(lambda engine: engine.stats().accepted_drafts).result()


class Two:
    """A router over two replicas; the first is asked first."""

    def __init__(self, up: Running, replicas: list[Local], router: Router) -> None:
        self.up, self.replicas, self.router = up, replicas, router

    def reset(self) -> None:
        for replica in self.replicas:
            replica.alive, replica.dies_after = True, None
            replica.asked.clear()
            replica.model.gate.set()
            replica.model.seconds = 0.002
        until(lambda: len(self.router.places.up) == len(self.replicas))
        until(lambda: not any(place.attempts for place in self.router.places.all))
        self.router.places._turn = -1


@contextlib.contextmanager
def routed(count: int = 2, hedge_s: float | None = None, **settings: Any) -> Iterator[Two]:
    replicas = [Local(f"replica-{i}") for i in range(count)]
    router = Router(
        Places(replicas, replicas[0].service.contract), dataclasses.replace(SETTINGS, **settings), hedge_s
    )
    with listening(make_router_app(router), router) as up:
        two = Two(up, replicas, router)
        try:
            two.reset()
            yield two
        finally:
            for replica in replicas:
                replica.model.gate.set()
                replica.service.flights.thread.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Two]:
    with routed() as up:
        yield up


@pytest.fixture
def two(shared: Two) -> Two:
    shared.reset()
    return shared


def stream(two: Two, body: dict[str, Any], path: str = URL) -> bytes:
    """The bytes of a stream, but for what no two streams share: its name and its time."""
    status, data = raw_post(two.up, path, json.dumps(body | {"stream": True}).encode())
    assert status == 200, data
    return nameless(data)


def nameless(data: bytes) -> bytes:
    names = set(re.findall(rb"cmpl-([0-9a-f]{16})", data))
    assert len(names) == 1, "the stream changed its name"
    (name,) = names
    times = set(re.findall(rb'"created": ([0-9]+)', data))
    assert len(times) == 1
    return data.replace(name, b"NAME").replace(times.pop(), b"TIME")


STREAMS: list[tuple[str, dict[str, Any]]] = [
    (URL, BODY),
    (URL, BODY | {"logprobs": 2, "stop": ["XY", "Q"], "stream_options": {"include_usage": True}}),
    (URL, BODY | {"echo": True, "return_token_ids": False}),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "KLM"}], "max_tokens": 12},
    ),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_stream_whose_replica_dies_has_the_bytes_of_an_undisturbed_one(
    two: Two, path: str, body: dict[str, Any]
) -> None:
    whole = stream(two, body, path)
    assert whole.endswith(b"data: [DONE]\n\n")
    pieces, deaths = whole.count(b"data: "), 0
    for after in (0, 1, 2, pieces // 2, pieces - 2):
        two.reset()
        first, second = two.replicas
        first.dies_after = after
        assert stream(two, body, path) == whole, after
        if first.alive:
            continue  # its pieces held more than one event each
        deaths += 1
        assert (len(first.asked), len(second.asked)) == (1, 1)
        last = dict(second.asked[0].headers).get(b"last-event-id")
        assert (last is not None) == (after > 0)
    assert deaths >= 3


def test_without_going_on_the_stream_breaks(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the same death, and nobody looks at the events' ids."""
    monkeypatch.setattr(relay, "last_id", lambda events: None)
    two.replicas[0].dies_after = 5
    data = stream(two, BODY)
    assert b"replica_lost" in data
    assert b"[DONE]" not in data
    assert data.count(b"id: ") >= 5


def test_both_may_die_by_turns(two: Two) -> None:
    whole = stream(two, BODY)
    two.reset()
    for replica in two.replicas:
        replica.dies_after = 4
    revive = threading.Timer(0.3, lambda: [setattr(r, "alive", True) for r in two.replicas])
    revive.start()
    assert stream(two, BODY) == whole
    assert sum(len(replica.asked) for replica in two.replicas) == 3
    revive.join()


def test_what_was_committed_is_a_draft_for_whoever_goes_on(two: Two) -> None:
    first, second = two.replicas
    body = BODY | {"max_tokens": 60, "seed": 5}
    first.dies_after = 40
    before = second.drafts()
    stream(two, body)
    assert not first.alive
    (call,) = second.asked
    assert len(call.drafts[0]) >= 38
    assert second.drafts() >= before + 30


def test_an_ordinary_stream_that_has_begun_ends_with_an_error(two: Two) -> None:
    first, second = two.replicas
    first.dies_after = 5
    status, data = raw_post(two.up, URL, json.dumps(BODY | {"stream": True, "deterministic": False}).encode())
    assert status == 200
    assert not second.asked
    *events, last = data.split(b"\n\n")[:-1]
    assert len(events) >= 5
    error = json.loads(last.removeprefix(b"data: "))["error"]
    assert error["code"] == "replica_lost"
    assert error["type"] == "server_error"
    assert "ordinary" in error["message"]


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_has_sent_nothing_is_asked_again(two: Two, deterministic: bool) -> None:
    body = BODY | {"deterministic": deterministic, "seed": 3}
    wanted = post(two.up, URL, body)["choices"]
    for way in ("whole", "stream"):
        two.reset()
        two.replicas[0].dies_after = 0
        if way == "whole":
            assert post(two.up, URL, body)["choices"] == wanted
        else:
            assert b"[DONE]" in stream(two, body)
        assert [len(replica.asked) for replica in two.replicas] == [1, 1]


def test_a_request_that_kills_whoever_takes_it_is_given_up(two: Two) -> None:
    stop = threading.Event()

    def cursed() -> None:
        while not stop.is_set():
            for replica in two.replicas:
                replica.dies_after, replica.alive = 0, True
            stop.wait(0.005)

    curse = threading.Thread(target=cursed)
    curse.start()
    try:
        error = post(two.up, URL, BODY, 502)["error"]
    finally:
        stop.set()
        curse.join()
    assert error["code"] == "replica_lost"
    assert sum(len(replica.asked) for replica in two.replicas) == relay.MOST_LOSSES


def test_what_nobody_expected_is_an_error_of_its_request(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(call: Call) -> AsyncGenerator[Head | Piece]:
        raise TypeError("a mistake")
        yield

    monkeypatch.setattr(two.replicas[0], "ask", breaks)
    assert "TypeError" in post(two.up, URL, BODY, 502)["error"]["message"]


def test_requests_wait_for_a_replica_to_come_back(two: Two) -> None:
    for replica in two.replicas:
        replica.alive = False
    until(lambda: not two.router.places.up)
    assert raw_get(two, "/ready")[0] == 503
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, two.up, URL, BODY)
        until(lambda: len(two.router._relays) == 1)
        two.replicas[1].alive = True
        assert waiting.result()["usage"]["completion_tokens"] == 30
    assert post(two.up, URL, BODY | {"model": "x"}, 404)["error"]["code"] == "model_not_found"


def test_a_client_that_leaves_ends_its_request_at_the_replica(two: Two) -> None:
    connection = http.client.HTTPConnection(two.up.url.removeprefix("http://"), timeout=20)
    body = json.dumps(BODY | {"max_tokens": 200, "stream": True})
    two.replicas[0].model.seconds = 0.01
    connection.request("POST", URL, body, {"Content-Type": "application/json"})
    connection.getresponse().read(100)
    first = two.replicas[0].service.flights
    assert len(first) == 1
    connection.close()
    until(lambda: len(first) == 0)
    until(lambda: not two.router.places.all[0].attempts)


def test_load_goes_to_whoever_has_less(two: Two) -> None:
    for replica in two.replicas:
        replica.model.gate.clear()
    with ThreadPoolExecutor(6) as pool:
        futures = [pool.submit(post, two.up, URL, BODY | {"seed": i}) for i in range(6)]
        until(lambda: [len(r.service.flights) for r in two.replicas] == [3, 3])
        for replica in two.replicas:
            replica.model.gate.set()
        assert all(future.result() for future in futures)


# -- hedging -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hedging() -> Iterator[Two]:
    with routed(hedge_s=0.15) as up:
        yield up


def test_a_second_replica_helps_where_the_first_is_slow(hedging: Two) -> None:
    hedging.reset()
    whole, answer = stream(hedging, BODY), post(hedging.up, URL, BODY)["choices"]
    first, second = hedging.replicas
    for stalls in ("before", "amid"):
        hedging.reset()
        if stalls == "before":
            first.model.gate.clear()
        else:
            first.model.seconds = 0.02
            threading.Timer(0.2, first.model.gate.clear).start()
        before = hedging.router._hedged._value.get()
        assert stream(hedging, BODY) == whole
        assert (len(first.asked), len(second.asked)) == (1, 1)
        assert (b"last-event-id" in dict(second.asked[0].headers)) == (stalls == "amid")
        until(lambda before=before: hedging.router._hedged._value.get() == before + 1)
        until(lambda: len(first.service.flights) == 0)  # the slow one was told to stop
    hedging.reset()
    hedging.replicas[0].model.gate.clear()
    assert post(hedging.up, URL, BODY)["choices"] == answer


def test_nobody_helps_an_ordinary_request_or_a_fast_one(hedging: Two) -> None:
    hedging.reset()
    stream(hedging, BODY)
    assert [len(r.asked) for r in hedging.replicas] == [1, 0]
    hedging.reset()
    hedging.replicas[0].model.gate.clear()
    threading.Timer(0.5, hedging.replicas[0].model.gate.set).start()
    post(hedging.up, URL, BODY | {"deterministic": False})
    assert [len(r.asked) for r in hedging.replicas] == [1, 0]


def test_the_helper_may_be_all_that_is_left(hedging: Two) -> None:
    hedging.reset()
    whole = stream(hedging, BODY)
    hedging.reset()
    first, second = hedging.replicas
    first.model.gate.clear()
    second.model.seconds = 0.02
    killer = threading.Timer(0.4, lambda: setattr(first, "alive", False))
    killer.start()
    assert stream(hedging, BODY) == whole
    killer.join()


# -- the router itself ---------------------------------------------------------------------------------------


def raw_get(two: Two, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(two.up.url.removeprefix("http://"), timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_pages_of_the_router(two: Two) -> None:
    post(two.up, URL, BODY)
    status, page = raw_get(two, "/metrics")
    assert status == 200
    for line in (b'llm42_replica_up{replica="replica-1"} 1.0', b"llm42_streams_resumed_total"):
        assert line in page
    assert re.search(rb'llm42_tokens_total\{origin="certified",replica="replica-0"\} [1-9]', page)
    assert page.count(b"# TYPE llm42_tokens_total") == 1
    state = json.loads(raw_get(two, "/ready")[1])
    assert [replica["name"] for replica in state["replicas"]] == ["replica-0", "replica-1"]
    assert state["contract"] == two.replicas[0].service.contract.hash
    assert json.loads(raw_get(two, "/v1/models")[1])["data"][0]["id"] == "tiny"
    assert raw_get(two, "/health")[0] == 200
    assert raw_get(two, "/")[0] == 200
    stats, each = (
        json.loads(raw_get(two, "/stats.json")[1]),
        [r.service.metrics.snapshot() for r in two.replicas],
    )
    assert stats["tokens"]["certified"] == sum(one["tokens"]["certified"] for one in each) > 0
    assert stats["draining"] is False
    assert stats["uptime_s"] < 600
    assert raw_get(two, "/nothing")[0] == 404
    assert post(two.up, "/tokenize", {"model": "tiny", "prompt": "AB"})["count"] == 2


def test_keys_are_asked_for_at_the_router() -> None:
    with routed(1, api_keys=("alpha",)) as one:
        post(one.up, URL, BODY, 401)
        assert not one.replicas[0].asked
        post(one.up, URL, BODY, Authorization="Bearer alpha")


def test_what_is_accepted_is_finished_before_the_router_ends() -> None:
    with routed(1) as one, ThreadPoolExecutor(1) as pool:
        one.replicas[0].model.gate.clear()
        future = pool.submit(post, one.up, URL, BODY)
        until(lambda: len(one.router._relays) == 1)
        one.up.server.should_exit = True
        until(lambda: one.router.draining)
        one.replicas[0].model.gate.set()
        assert future.result()["usage"]["completion_tokens"] == 30


def test_another_contract_is_not_used(two: Two) -> None:
    contract = two.replicas[0].service.contract
    other = dataclasses.replace(contract, page_size=contract.page_size * 2)
    state = State(1, contract.to_json())
    assert agree(["a", "b"], [state, state]) == contract
    with pytest.raises(ConfigError, match=r"b has another contract than a: page_size: 4 -> 8"):
        agree(["a", "b"], [state, State(2, other.to_json())])
    with pytest.raises(ConfigError, match="no such model"):
        agree(["a", "b"], [state, State(2, refused="no such model")])
    unlike = places.Place(two.replicas[0])
    for given, used in ((other, False), (contract, True)):
        two.router.places._here(unlike, State(2, given.to_json()))
        assert (unlike.state is not None) == used

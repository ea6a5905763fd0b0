"""More requests than fit, clients that are slow or gone, keys, limits and the end of the server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import Gated, Running, finished, post, raw_post, running, toy_engine, toy_tokenizer, until
from toy import ToyModel

from llm42c.errors import IntegrityError
from llm42c.runtime.server.guard import is_known
from llm42c.runtime.server.stream import MOST_BYTES

URL = "/v1/completions"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "ABCDEF", "max_tokens": 30, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


@contextlib.contextmanager
def gated(**settings: Any) -> Iterator[tuple[Running, Gated]]:
    model = Gated()
    with running(toy_engine(model, max_num_seqs=2), toy_tokenizer(), **settings) as up:
        try:
            yield up, model
        finally:
            model.gate.set()


def get(up: Running, path: str, status: int) -> str:
    connection = http.client.HTTPConnection(up.url.removeprefix("http://"), timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == status
        return answer.read().decode()


def seeded(count: int) -> list[dict[str, Any]]:
    return [BODY | {"seed": i, "temperature": 1.0} for i in range(count)]


def test_a_full_queue_says_when_to_come_back() -> None:
    with gated(max_queue=3) as (up, model), ThreadPoolExecutor(5) as pool:
        model.gate.clear()
        futures = [pool.submit(post, up, URL, body) for body in seeded(5)]
        until(lambda: len(up.service.flights) == 5)
        connection = http.client.HTTPConnection(up.url.removeprefix("http://"))
        with contextlib.closing(connection):
            connection.request("POST", URL, json.dumps(BODY | {"seed": 99}), JSON)
            answer = connection.getresponse()
            error = json.loads(answer.read())["error"]
            assert (answer.status, error["code"]) == (429, "queue_full")
            assert 1 <= int(answer.headers["Retry-After"]) <= 60
        equal = pool.submit(post, up, URL, seeded(1)[0])  # which costs nothing
        model.gate.set()
        texts = [future.result()["choices"][0]["text"] for future in futures]
        assert len(set(texts)) == 5
        assert equal is not None
        post(up, URL, BODY | {"seed": 99})


def test_a_refused_request_of_several_choices_leaves_nothing_behind() -> None:
    with gated(max_queue=1) as (up, _):
        post(up, URL, BODY | {"n": 8, "temperature": 1.0}, 429)
        until(lambda: not len(up.service.flights))
        post(up, URL, BODY | {"n": 3, "temperature": 1.0})
        assert up.service.flights.thread.call(lambda engine: engine.has_unfinished()).result() is False


def test_a_deadline_ends_one_request_and_no_other() -> None:
    with gated() as (up, model), ThreadPoolExecutor(2) as pool:
        model.seconds = 0.03
        other = pool.submit(post, up, URL, BODY | {"seed": 5})
        error = post(up, URL, BODY | {"timeout": 0.2}, 504)["error"]
        assert error["param"] == "timeout"
        status, data = raw_post(up, URL, json.dumps(BODY | {"timeout": 0.2, "stream": True}).encode())
        assert status == 200
        assert data.count(b"id: ") > 1
        assert b"deadline_exceeded" in data
        assert b"[DONE]" not in data
        assert other.result()["usage"]["completion_tokens"] == 30


def test_keys() -> None:
    with gated(api_keys=("alpha", "beta")) as (up, _):
        for key, status in (("beta", 200), ("alpha", 200), ("alph", 401), ("", 401), ("Alpha", 401)):
            post(up, URL, BODY | {"max_tokens": 1}, status, Authorization=f"Bearer {key}")
        post(up, URL, BODY, 401)
        post(up, URL, BODY, 401, Authorization="Basic alpha")
        post(up, URL, BODY, 401, Authorization="Bearer \xff")
        for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 200), ("/v1/models", 401)):
            get(up, path, status)
    assert is_known([b"a", b"b"], b"b")
    assert not is_known([], b"")


def test_a_body_that_is_too_long_or_never_comes_is_refused() -> None:
    with gated(max_body_bytes=2000, write_timeout_s=0.3) as (up, _):
        long = json.dumps(BODY | {"user": "x" * 3000}).encode()
        assert raw_post(up, URL, long)[0] == 413
        host, port = up.url.removeprefix("http://").split(":")
        for head, wanted in (
            (
                b"Transfer-Encoding: chunked\r\n\r\n"
                + b"7d0\r\n"
                + b"x" * 2000
                + b"\r\n7d0\r\n"
                + b"x" * 2000,
                b" 413 ",
            ),
            (b"Content-Length: 99999999999999999999999\r\n\r\n", b" 4"),
            (b"Content-Length: 100\r\n\r\nabc", b" 408 "),
        ):
            with socket.create_connection((host, int(port)), timeout=20) as raw:
                raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head)
                assert wanted in raw.recv(1000).split(b"\r\n")[0]
        post(up, URL, BODY)


def test_clients_that_are_gone_stop_costing() -> None:
    with gated() as (up, model):
        model.seconds = 0.01
        for stream in (False, True):
            for body in (one | {"max_tokens": 200, "stream": stream} for one in seeded(4)):
                connection = http.client.HTTPConnection(up.url.removeprefix("http://"))
                connection.request("POST", URL, json.dumps(body), JSON)
                time.sleep(0.02)
                connection.close()
            until(lambda: not len(up.service.flights))
        until(lambda: not up.service.flights.thread.call(lambda engine: engine.has_unfinished()).result())
        aborted = up.service.flights.thread.call(lambda engine: engine.stats().aborted).result()
        assert aborted == 8


def test_slow_readers_delay_nobody_and_their_memory_is_bounded() -> None:
    """They take nothing of a long answer: the server keeps its tokens, and a buffer for each."""
    with gated(write_timeout_s=1.5, send_buffer=4096) as (up, _):
        host, port = up.url.removeprefix("http://").split(":")
        body = json.dumps(BODY | {"max_tokens": 240, "stream": True, "logprobs": 20, "prompt": "A"}).encode()
        head = f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        slow = []
        for _ in range(20):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            raw.connect((host, int(port)))
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            slow.append(raw)
        until(lambda: finished(up) == 1)  # they ask for the same
        start = time.monotonic()
        post(up, URL, BODY)
        assert time.monotonic() - start < 1
        waiting = [c.transport.get_write_buffer_size() for c in up.server.server_state.connections]
        assert sum(size > 0 for size in waiting) == 20, "nobody was slow"
        assert max(waiting) < 2**14 + 3 * MOST_BYTES
        until(lambda: len(up.server.server_state.tasks) == 0)  # their time was up
        for raw in slow:
            raw.close()
        post(up, URL, BODY)


def test_what_is_accepted_is_finished_before_the_end() -> None:
    with gated() as (up, model), ThreadPoolExecutor(6) as pool:
        model.gate.clear()
        futures = [pool.submit(post, up, URL, body) for body in seeded(5)]
        until(lambda: len(up.service.flights) == 5)
        up.server.should_exit = True
        until(lambda: up.service.flights.draining)
        with pytest.raises(OSError, match="refused"):
            post(up, URL, BODY)
        model.gate.set()
        assert [future.result()["usage"]["completion_tokens"] for future in futures] == [30] * 5
        up.thread.join(20)
        assert not up.thread.is_alive()


def test_what_cannot_be_finished_says_where_it_goes_on() -> None:
    with gated(drain_s=0.2) as (up, model), ThreadPoolExecutor(2) as pool:
        model.gate.clear()
        whole = pool.submit(post, up, URL, BODY, 503)
        stream = pool.submit(raw_post, up, URL, json.dumps(BODY | {"seed": 1, "stream": True}).encode())
        until(lambda: len(up.service.flights) == 2)
        up.server.should_exit = True
        assert whole.result()["error"]["code"] == "shutting_down"
        assert b"Last-Event-ID" in stream.result()[1]
        model.gate.set()
        up.thread.join(20)
        assert not up.thread.is_alive()


class Failing(ToyModel):
    error: Exception | None = None

    def forward(self, inputs: Any, cache: Any) -> Any:
        if self.error is not None:
            raise self.error
        return super().forward(inputs, cache)


def test_a_step_that_breaks_is_an_error_of_its_requests_and_the_server_goes_on() -> None:
    model = Failing()
    with running(toy_engine(model), toy_tokenizer()) as up:
        model.error = MemoryError("no memory is left")
        assert "no memory is left" in post(up, URL, BODY, 500)["error"]["message"]
        model.error = None
        post(up, URL, BODY)
        get(up, "/health", 200)


def test_an_engine_that_breaks_the_promise_takes_no_more() -> None:
    model = Failing()
    with running(toy_engine(model), toy_tokenizer()) as up:
        model.error = IntegrityError("rows depend on their surroundings")
        assert "surroundings" in post(up, URL, BODY, 500)["error"]["message"]
        for path in ("/health", "/ready"):
            assert "surroundings" in get(up, path, 503)
        assert post(up, URL, BODY, 503)["error"]["code"] == "engine_broken"


def test_the_event_loop_is_free_while_the_engine_works() -> None:
    with gated() as (up, model):
        model.gate.clear()
        hanging = threading.Thread(target=post, args=(up, URL, BODY))
        hanging.start()
        until(lambda: len(up.service.flights) == 1)
        for _ in range(3):
            page = get(up, "/metrics", 200)
        assert "llm42_kv_pages 64.0" in page
        model.gate.set()
        hanging.join()
        page = get(up, "/metrics", 200)
        assert 'llm42_ttft_seconds_count{class="deterministic"} 1.0' in page
        assert 'llm42_tbt_seconds_count{class="deterministic"} 29.0' in page
        assert 'llm42_ttft_seconds_count{class="ordinary"} 0.0' in page

"""Connections that bring nothing, little, or more than one may read: they cost little, and others nothing."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Gated, Running, post, raw_post, running, toy_engine, toy_tokenizer, until

from llm42c.runtime.server.connections import patient

URL = "/v1/completions"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "ABCDEF", "max_tokens": 8, "ignore_eos": True}
HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
PATIENCE_S = 0.4


@pytest.fixture
def impatient() -> Iterator[tuple[Running, Gated]]:
    model = Gated()
    settings = {"write_timeout_s": PATIENCE_S, "max_connections": 20}
    with running(toy_engine(model), toy_tokenizer(), **settings) as up:
        yield up, model


def connect(up: Running) -> socket.socket:
    host, port = up.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def rest(raw: socket.socket) -> bytes:
    """All that comes until the server closes."""
    found = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while data := raw.recv(65536):
            found += data
    return bytes(found)


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"\r\nGET /he", HEAD + b"\r\n" + HEAD])
def test_who_brings_no_head_is_cut(impatient: tuple[Running, Gated], sent: bytes) -> None:
    up, _ = impatient
    start = time.monotonic()
    with connect(up) as raw:
        raw.sendall(sent)
        found = rest(raw)
    assert PATIENCE_S <= time.monotonic() - start < 5
    assert found.count(b"200 OK") == sent.count(b"\r\n\r\n")


def test_a_head_that_drips_has_no_more_time(impatient: tuple[Running, Gated]) -> None:
    up, _ = impatient
    start = time.monotonic()
    with connect(up) as raw, contextlib.suppress(ConnectionResetError, BrokenPipeError):
        raw.sendall(HEAD)
        for i in range(200):
            raw.sendall(b"X-%d: y\r\n" % i)
            time.sleep(0.05)
    assert time.monotonic() - start < 4


def test_who_waits_for_an_answer_is_not_cut(impatient: tuple[Running, Gated]) -> None:
    up, model = impatient
    model.gate.clear()
    opener = threading.Timer(3 * PATIENCE_S, model.gate.set)
    opener.start()
    assert post(up, URL, BODY)["usage"]["completion_tokens"] == 8
    opener.join()


def test_of_too_many_the_one_that_waited_longest_goes(impatient: tuple[Running, Gated]) -> None:
    up, model = impatient
    model.gate.clear()
    asking = threading.Thread(target=post, args=(up, URL, BODY))
    asking.start()
    until(lambda: len(up.service.flights) == 1)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(19):
            silent.append(stack.enter_context(connect(up)))
            time.sleep(0.002)
        until(lambda: len(up.server.server_state.connections) == 20)
        status, _ = raw_post(up, "/tokenize", json.dumps({"prompt": "A"}).encode())
        assert status == 200
        assert time.monotonic() - start < PATIENCE_S, "their own time is not over"
        silent[0].setblocking(False)
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""
        silent[1].setblocking(False)
        with pytest.raises(BlockingIOError):
            silent[1].recv(1)
    model.gate.set()
    asking.join()


def test_there_is_room_for_the_process_own_files() -> None:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert patient(1.0).most < files
    assert patient(1.0, 7).most == 7
    assert patient(1.0, 2**40).most < files


def test_two_lengths_of_a_body_are_refused(impatient: tuple[Running, Gated]) -> None:
    """Where a proxy reads one and the server the other, the rest is a request of somebody else."""
    up, _ = impatient
    head = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(up) as raw:
        raw.sendall(head + b"0\r\n\r\n" + HEAD + b"\r\n")
        found = rest(raw)
    assert found.startswith(b"HTTP/1.1 400 ")
    assert found.count(b"HTTP/1.1 ") == 1


def test_who_sends_too_much_reads_why(impatient: tuple[Running, Gated]) -> None:
    up, _ = impatient
    assert raw_post(up, URL, b"x" * 5_000_000)[0] == 413


@pytest.mark.parametrize(
    "much",
    [
        {"stop": ["x"] * 65},
        {"stop": "x" * 1025},
        {"json_schema": {"properties": {f"k{i}": {"type": "string"} for i in range(2000)}}},
        {"choice": [f"A{i}" for i in range(5000)]},
        {"regex": "A" * 40_000},
        {"grammar": "start: " + '"A" ' * 10_000},
    ],
)
def test_what_everybody_would_wait_for_is_bounded(
    impatient: tuple[Running, Gated], much: dict[str, Any]
) -> None:
    up, _ = impatient
    error = post(up, URL, BODY | much, 400)["error"]
    assert error["param"] == next(iter(much))
    assert "characters" in error["message"]


def test_a_body_that_is_called_something_else_is_told_its_name(impatient: tuple[Running, Gated]) -> None:
    up, _ = impatient
    status, text = raw_post(up, URL, json.dumps(BODY).encode(), Content_Type="text/plain")
    assert status == 400
    assert "Content-Type: application/json" in json.loads(text)["error"]["message"]

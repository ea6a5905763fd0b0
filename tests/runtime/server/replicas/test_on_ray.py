"""`llm42 serve --replicas 2` on Ray Serve: replicas are killed, stopped and refused for real."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_folder
from serving import listening, post, toy_engine, toy_tokenizer

from llm42c import cli
from llm42c.cli import exits
from llm42c.errors import ConfigError
from llm42c.runtime.server.app import make_app
from llm42c.runtime.server.replicas.call import Call, Head, Piece, State, answered
from llm42c.runtime.server.service import Service
from llm42c.runtime.server.settings import Settings

pytest.importorskip("fastapi")
pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # of Ray's own models

URL = "/v1/completions"
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "abc",
    "max_tokens": 90,
    "temperature": 1.0,
    "ignore_eos": True,
    "logprobs": 1,
    "stream": True,
}


@dataclasses.dataclass
class Replicated:
    """The command with two replicas."""

    port: int
    process: subprocess.Popen[str]

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path)
            return connection.getresponse().read()

    def replicas(self) -> list[dict[str, Any]]:
        return list(json.loads(self.get("/ready"))["replicas"])

    def wait(self) -> None:
        """Until both are there."""
        end = time.monotonic() + 60
        while any(replica["pid"] is None for replica in self.replicas()):
            assert time.monotonic() < end
            time.sleep(0.1)

    def stream(self, body: dict[str, Any], number: int = 0) -> tuple[bytes, int | None]:
        """All bytes; once some events are there the replica at work gets the signal. And its process id."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        pid = None
        with contextlib.closing(connection):
            connection.request("POST", URL, json.dumps(body), {"Content-Type": "application/json"})
            answer, data = connection.getresponse(), b""
            while piece := answer.read1():
                data += piece
                if number and pid is None and data.count(b"data: ") > 5:
                    (pid,) = [replica["pid"] for replica in self.replicas() if replica["requests"]]
                    os.kill(pid, number)
        return data, pid


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.save_letters(tmp_path_factory.mktemp("letters")))


@pytest.fixture(scope="module")
def up(model: str) -> Iterator[Replicated]:
    options = ["--name", "tiny", "--port", "0", "--kv-mb", "1", "--replicas", "2", "--threads", "1"]
    command = [sys.executable, "-m", "llm42c", "serve", model, *options, "--hedge-ms", "700"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = ""
        while not line.startswith("tiny at http://127.0.0.1:"):
            line = process.stderr.readline()
            assert line, "it ended"
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Replicated(int(line.split("/v1")[0].rpartition(":")[2]), process)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()


def nameless(data: bytes) -> bytes:
    (name,) = set(re.findall(rb"cmpl-([0-9a-f]{16})", data))
    (at,) = set(re.findall(rb'"created": ([0-9]+)', data))
    return data.replace(name, b"NAME").replace(at, b"TIME")


@pytest.mark.slow
def test_a_killed_replica_is_replaced_and_nobody_can_tell(up: Replicated) -> None:
    for seed in range(2):
        body = BODY | {"seed": seed}
        whole, _ = up.stream(body)
        up.wait()
        data, pid = up.stream(body, signal.SIGKILL)
        assert pid is not None
        assert pid not in [replica["pid"] for replica in up.replicas()]
        assert nameless(data) == nameless(whole)
        assert data.endswith(b"data: [DONE]\n\n")
    assert sum(replica["losses"] for replica in up.replicas()) == 2
    assert b"llm42_streams_resumed_total 2.0" in up.get("/metrics")


@pytest.mark.slow
def test_a_stream_that_cannot_go_on_breaks(up: Replicated) -> None:
    """The control: the same death takes an ordinary stream along."""
    up.wait()
    data, pid = up.stream(BODY | {"deterministic": False}, signal.SIGKILL)
    assert pid is not None
    assert b"[DONE]" not in data
    *_, last = data.split(b"\n\n")[:-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "replica_lost"


@pytest.mark.slow
def test_a_second_replica_helps_one_that_stands_still(up: Replicated) -> None:
    body = BODY | {"seed": 9}
    whole, _ = up.stream(body)
    up.wait()
    data, pid = up.stream(body, signal.SIGSTOP)
    assert pid is not None
    os.kill(pid, signal.SIGCONT)
    assert nameless(data) == nameless(whole)
    assert b"llm42_requests_hedged_total 0.0" not in up.get("/metrics")


@pytest.mark.slow
def test_the_replicas_end_with_the_command(up: Replicated) -> None:
    up.wait()
    pids = [replica["pid"] for replica in up.replicas()]
    up.process.terminate()
    assert up.process.wait(30) == 0
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)


# -- without a cluster ---------------------------------------------------------------------------------------


class Handle:
    """As Serve's of a deployment, for an engine in this process."""

    def __init__(self, state: State | None = None) -> None:
        self._service = Service(toy_engine(), toy_tokenizer(), Settings("tiny"))
        self._app = make_app(self._service)
        self._state = state or State(1, self._service.contract.to_json())
        self._started = False
        self.watch, self.ask = _Method(self._watch), _Method(self._ask)

    def options(self, **options: Any) -> Handle:
        return self

    async def _watch(self) -> AsyncGenerator[State]:
        if not self._started:
            self._started = True
            self._service.start()
        while True:
            yield self._state
            await asyncio.sleep(0.05)

    async def _ask(self, call: Call) -> AsyncGenerator[Head | Piece]:
        async for message in answered(self._app, call):
            yield message


class _Method:
    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def remote(self, *arguments: Any) -> Any:
        return _Answers(self._generator(*arguments))


class _Answers:
    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __aiter__(self) -> Any:
        return self._generator

    def cancel(self) -> None:
        pass


def test_the_door_of_serve_run_answers_and_asks_for_one_contract() -> None:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from llm42c.runtime.server.replicas.on_ray import Door

    handles = [Handle(), Handle()]
    doors: list[Door] = []

    async def through(request: Request) -> Response:
        if not doors:
            door = Door.__new__(Door)
            await door.__init__(handles, Settings("tiny"), None)  # type: ignore[misc, arg-type, func-returns-value]
            doors.append(door)
        return await doors[0](request)

    class Plain:
        settings = Settings("tiny")

        def drain(self) -> None: ...

        hand_over = drain

    app = Starlette(routes=[Route("/{path:path}", through, methods=["GET", "POST"])])
    with listening(app, Plain()) as up:
        body = {"model": "tiny", "prompt": "ABC", "max_tokens": 9, "ignore_eos": True}
        assert post(up, URL, body)["usage"]["completion_tokens"] == 9
        assert post(up, URL, body | {"model": "x"}, 404)["error"]["param"] == "model"
    unlike = [Handle(), Handle(State(2, refused="no model there"))]
    door = Door.__new__(Door)
    with pytest.raises(ConfigError, match="no model there"):
        asyncio.run(door.__init__(unlike, Settings("tiny"), None))  # type: ignore[misc, arg-type, func-returns-value]


def test_options_that_do_not_go_together(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--hedge-ms", "--threads"):
        assert cli.main(["serve", model, option, "5"]) == exits.BAD_INPUT
        assert f"{option} is for --replicas" in capsys.readouterr().err

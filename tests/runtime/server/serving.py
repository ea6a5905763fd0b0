"""A server of a tiny model over loopback, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

import tokenizers
import toy
import transformers as hf

from llm42c.runtime.engine import Engine
from llm42c.runtime.loader import BuiltEngine, build_engine, text_decoder
from llm42c.runtime.server.app import make_app
from llm42c.runtime.server.listen import Server, bind, configured
from llm42c.runtime.server.service import Service
from llm42c.runtime.server.settings import Settings

TEMPLATE = (
    "{% if tools %}{{ '<s>' }}{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<s>' + message.role + ' ' + message.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant ' }}{% endif %}"
)
TOY_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}A"
OPTIONS: dict[str, Any] = {
    "kv_cache_bytes": 2**20,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "page_size": 16,
    "verify_tokens": 16,
    "verify_seqs": 8,
    "persist_certificates": False,
}


def toy_tokenizer() -> Any:
    """The letters of the toy model as a tokenizer of transformers."""
    letters = {chr(ord("A") + i): i for i in range(toy.VOCAB)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    made.decoder = tokenizers.decoders.ByteLevel()
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=chr(ord("A") + toy.EOS))
    wrapped.chat_template = TOY_TEMPLATE
    return wrapped


def toy_engine(fast: toy.ToyModel | None = None, **config: Any) -> Engine:
    """Text in, text out: see `toy_tokenizer`."""
    return toy.make_engine(fast, toy.small_config(**config), decode=text_decoder(toy_tokenizer()))


class Gated(toy.ToyModel):
    """A toy whose steps wait while `gate` is closed."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.gate, self.seconds = threading.Event(), seconds
        self.gate.set()

    def forward(self, inputs: Any, cache: Any) -> Any:
        assert self.gate.wait(60)
        time.sleep(self.seconds)
        return super().forward(inputs, cache)


def build(folder: Path, **options: Any) -> BuiltEngine:
    return build_engine(folder, **(OPTIONS | options))


@dataclass
class Running:
    """`url` ends in the port."""

    url: str
    service: Any  # or what else stands behind the application
    server: Server
    thread: threading.Thread

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(
    engine: Engine, tokenizer: Any, *, send_buffer: int | None = None, **settings: Any
) -> Iterator[Running]:
    """Its engine is closed with it. `send_buffer`: bytes that the system takes for each connection."""
    service = Service(engine, tokenizer, Settings(**({"model": "tiny", "drain_s": 5.0} | settings)))
    with listening(make_app(service), service, send_buffer) as up:
        yield up


@contextlib.contextmanager
def listening(app: Any, served: Any, send_buffer: int | None = None) -> Iterator[Running]:
    """`app` over loopback."""
    listener: socket.socket = bind("127.0.0.1", 0)
    if send_buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    started = threading.Event()
    server = Server(configured(app, served), served, started.set)
    thread = threading.Thread(target=lambda: asyncio.run(server._serve([listener])), daemon=True)
    thread.start()
    assert started.wait(30)
    up = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", served, server, thread)
    try:
        yield up
    finally:
        up.stop()


def post(up: Running, path: str, body: Any, status: int = 200, **headers: str) -> Any:
    """The JSON of an answer."""
    code, text = raw_post(up, path, json.dumps(body).encode(), **headers)
    assert code == status, text
    return json.loads(text)


def raw_post(up: Running, path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(up.url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        sent = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request("POST", path, body, sent)
        answer = connection.getresponse()
        return answer.status, answer.read()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def finished(up: Running) -> int:
    """Requests that the engine has computed to their ends."""
    return up.service.flights.thread.call(lambda engine: engine.stats().finished).result()

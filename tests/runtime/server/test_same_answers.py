"""Equal requests are computed once, broken streams go on elsewhere, answers are kept: the same bytes."""

from __future__ import annotations

import contextlib
import http.client
import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Gated, Running, finished, post, raw_post, running, toy_engine, toy_tokenizer, until

from llm42c.runtime.engine import Engine

BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "ABCDEF",
    "max_tokens": 30,
    "temperature": 1.0,
    "ignore_eos": True,
    "return_token_ids": True,
}
URL = "/v1/completions"


@pytest.fixture(scope="module")
def gated() -> Iterator[tuple[Running, Gated]]:
    model = Gated()
    with running(toy_engine(model), toy_tokenizer()) as up:
        yield up, model


@pytest.fixture(scope="module")
def other() -> Iterator[Running]:
    """Another server of the same contract."""
    with running(toy_engine(max_num_seqs=3, num_pages=40), toy_tokenizer()) as up:
        yield up


def asked_together(gated: tuple[Running, Gated], bodies: list[dict[str, Any]]) -> tuple[list[Any], int]:
    """Answers of requests that were all there before the first step, and how many the engine computed."""
    up, model = gated
    before, waiting = finished(up), up.service.metrics.shared._value.get()
    model.gate.clear()
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures: list[Future[Any]] = [pool.submit(post, up, URL, body) for body in bodies]

        def all_there() -> bool:
            shared = up.service.metrics.shared._value.get() - waiting
            return len(up.service.flights) + shared == len(bodies)

        until(all_there)
        model.gate.set()
        answers = [future.result()["choices"][0] for future in futures]
    return answers, finished(up) - before


def test_equal_requests_in_flight_are_computed_once(gated: tuple[Running, Gated], other: Running) -> None:
    answers, computed = asked_together(gated, [BODY] * 6)
    assert computed == 1
    assert all(answer == answers[0] for answer in answers)
    assert answers[0] == post(other, URL, BODY)["choices"][0]


def test_what_is_not_equal_or_not_deterministic_is_computed_each(gated: tuple[Running, Gated]) -> None:
    for change in (
        {"seed": 1},
        {"temperature": 0.9},
        {"max_tokens": 29},
        {"prompt": "ABCDEG"},
        {"logprobs": 1},
    ):
        _, computed = asked_together(gated, [BODY, BODY | change, BODY])
        assert computed == 2, change
    answers, computed = asked_together(gated, [BODY | {"deterministic": False}] * 3)
    assert computed == 3
    assert answers[0] != answers[1] or answers[1] != answers[2], "seeds of ordinary requests are random"


def test_whoever_leaves_takes_nothing_from_the_others(gated: tuple[Running, Gated], other: Running) -> None:
    up, model = gated
    wanted = post(other, URL, BODY | {"seed": 77})["choices"][0]
    model.gate.clear()
    leaver = http.client.HTTPConnection(up.url.removeprefix("http://"))
    headers = {"Content-Type": "application/json"}
    leaver.request("POST", URL, json.dumps(BODY | {"seed": 77, "stream": True}), headers)
    with ThreadPoolExecutor(1) as pool:
        until(lambda: len(up.service.flights) == 1)
        shared = up.service.metrics.shared._value.get()
        future = pool.submit(post, up, URL, BODY | {"seed": 77})
        until(lambda: up.service.metrics.shared._value.get() > shared)
        leaver.close()
        time.sleep(0.05)
        model.gate.set()
        assert future.result()["choices"][0] == wanted


# -- streams that go on --------------------------------------------------------------------------------------


def events(up: Running, body: dict[str, Any], last: str | None = None, path: str = URL) -> list[bytes]:
    """Each with the blank line that ends it."""
    headers = {} if last is None else {"Last_Event_ID": last}
    status, data = raw_post(up, path, json.dumps(body | {"stream": True}).encode(), **headers)
    assert status == 200, data
    return [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]


def id_of(event: bytes) -> str:
    return event.split(b"\n")[0].removeprefix(b"id: ").decode()


STREAMS: list[tuple[str, dict[str, Any]]] = [
    (URL, BODY),
    (URL, BODY | {"logprobs": 2, "stop": ["XY", "Q"], "stream_options": {"include_usage": True}}),
    (URL, BODY | {"echo": True, "ignore_eos": False}),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": [{"role": "user", "content": "KLM"}], "max_tokens": 12},
    ),
]


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_broken_stream_goes_on_at_another_server(
    gated: tuple[Running, Gated], other: Running, path: str, body: dict[str, Any]
) -> None:
    whole = events(gated[0], body, path=path)
    assert whole[-1] == b"data: [DONE]\n\n"
    assert len(whole) > 5
    for i, event in enumerate(whole[:-1]):
        assert events(other, body, id_of(event), path) == whole[i + 1 :], i


def test_choices_of_a_stream_go_on_each_where_it_was(gated: tuple[Running, Gated], other: Running) -> None:
    body = BODY | {"n": 2, "return_token_ids": False}

    def texts(stream: list[bytes]) -> list[str]:
        found = ["", ""]
        for event in stream[:-1]:
            (choice,) = json.loads(event.split(b"data: ")[1])["choices"]
            found[choice["index"]] += choice["text"]
        return found

    whole = events(gated[0], body)
    cut = len(whole) // 2
    rest = events(other, body, id_of(whole[cut - 1]))
    joined = [a + b for a, b in zip(texts([*whole[:cut], b""]), texts(rest), strict=True)]
    assert joined == texts(whole)
    assert joined[0] != joined[1]


def test_only_the_same_request_of_the_same_contract_goes_on(gated: tuple[Running, Gated]) -> None:
    up, _ = gated
    event = id_of(events(up, BODY)[4])

    def refused(body: dict[str, Any], last: str, status: int, up: Running = up) -> None:
        sent = json.dumps(body | {"stream": True}).encode()
        code, text = raw_post(up, URL, sent, Last_Event_ID=last)
        assert code == status, text
        assert json.loads(text)["error"]["param"] == "Last-Event-ID"

    refused(BODY | {"seed": 1}, event, 409)
    refused(BODY | {"logprobs": 1}, event, 409)
    refused(BODY | {"deterministic": False}, event, 400)
    for bad in ("x", "a.b.c.d", event.rpartition(".")[0] + ".-5", event + ",3", event + "9" * 20):
        refused(BODY, bad, 400)
    with running(toy_engine(verify_tokens=8), toy_tokenizer()) as unlike:
        refused(BODY, event, 409, unlike)


def test_what_a_broken_stream_has_computed_is_a_draft_for_the_next(gated: tuple[Running, Gated]) -> None:
    up, model = gated
    body = BODY | {"seed": 1234, "max_tokens": 100}

    def drafts() -> int:
        return up.service.flights.thread.call(lambda engine: engine.stats().accepted_drafts).result()

    before, model.seconds = drafts(), 0.01
    connection = http.client.HTTPConnection(up.url.removeprefix("http://"))
    with contextlib.closing(connection):
        sent = json.dumps(body | {"stream": True})
        connection.request("POST", URL, sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        seen = b""
        while seen.count(b"\n\n") < 40:
            seen += answer.read1()
    model.seconds = 0.0
    until(lambda: not len(up.service.flights))
    last = seen.split(b"\n\n")[39]
    rest = events(up, body, id_of(last))
    assert drafts() > before + 20
    assert len(rest) == 100 - 40 + 2


# -- the cache -----------------------------------------------------------------------------------------------


def test_a_kept_answer_is_the_computed_one(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    bodies = [
        BODY | {"logprobs": 2, "receipt": True},
        BODY | {"stop": ["X", "Y"], "seed": 4},
        BODY | {"ignore_eos": False, "n": 2},
    ]
    with running(toy_engine(), toy_tokenizer(), cache_path=path) as up:
        first = [post(up, URL, body)["choices"] for body in bodies]
    with running(toy_engine(), toy_tokenizer(), cache_path=path) as up:
        again = [post(up, URL, body)["choices"] for body in bodies]
        assert finished(up) == 0, "computed again"
        post(up, URL, bodies[0] | {"deterministic": False, "receipt": False})
        post(up, URL, bodies[0] | {"seed": 9})
        assert finished(up) == 2
        assert events(up, bodies[1])[-1] == b"data: [DONE]\n\n"
    assert again == first
    with running(toy_engine(verify_tokens=8), toy_tokenizer(), cache_path=path) as unlike:
        post(unlike, URL, bodies[1])
        assert finished(unlike) == 1, "an answer of another contract was given"


def test_a_receipt_is_not_verified_by_what_is_kept(tmp_path: Path) -> None:
    with running(toy_engine(), toy_tokenizer(), cache_path=tmp_path / "answers") as up:
        receipt = post(up, URL, BODY | {"receipt": True})["choices"][0]["receipt"]
        post(up, URL, BODY)
        for done in (3, 4):
            assert post(up, "/v1/receipts/verify", {"receipt": receipt})["verdict"] == "exact"
            assert finished(up) == done


def test_a_revoked_certificate_empties_the_cache(tmp_path: Path) -> None:
    def revoke(engine: Engine) -> None:
        engine.certificates.revoke({(1, 1)})

    with running(toy_engine(), toy_tokenizer(), cache_path=tmp_path / "answers") as up:
        post(up, URL, BODY)
        post(up, URL, BODY)
        assert finished(up) == 1
        up.service.flights.thread.call(revoke).result()
        post(up, URL, BODY | {"seed": 3})
        post(up, URL, BODY)
        assert finished(up) == 3


def test_a_damaged_answer_is_computed_again(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with running(toy_engine(), toy_tokenizer(), cache_path=path) as up:
        first = post(up, URL, BODY)["choices"]
    with contextlib.closing(sqlite3.connect(path)) as db:
        (value,) = db.execute("SELECT value FROM answers").fetchone()
        tokens = first[0]["token_ids"]
        edited = value.replace(
            json.dumps(tokens, separators=(",", ":")), str([*tokens[:-1], 5]).replace(" ", "")
        )
        assert edited != value
        db.execute("UPDATE answers SET value = ?", (edited,))
        db.commit()
    with running(toy_engine(), toy_tokenizer(), cache_path=path) as up:
        assert post(up, URL, BODY)["choices"] == first
        assert finished(up) == 1


def test_the_cache_is_bounded_and_forgets_what_was_not_used(tmp_path: Path) -> None:
    path = tmp_path / "answers"
    with running(toy_engine(), toy_tokenizer(), cache_path=path, cache_bytes=4000) as up:
        for seed in (1, 2, 1, 3, 1, 4, 1, 5, 1, 6, 1, 7):
            post(up, URL, BODY | {"seed": seed})
            time.sleep(0.02)
        before = finished(up)
        post(up, URL, BODY | {"seed": 1})
        assert finished(up) == before
        post(up, URL, BODY | {"seed": 2})
        assert finished(up) == before + 1
    with contextlib.closing(sqlite3.connect(path)) as db:
        total, said = db.execute(
            "SELECT sum(length(value)), (SELECT bytes FROM total) FROM answers"
        ).fetchone()
        assert total == said <= 4000

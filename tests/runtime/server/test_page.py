"""The page at `/` as HTTP: its files, what a browser is told, its numbers, and runs that are its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Gated, Running, finished, post, raw_post, running, toy_engine, toy_tokenizer, until

from llm42c.runtime.server import page

FOLDER = Path(page.__file__).parent / "page"
COMPLETIONS = "/v1/completions"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "ABCDEF", "max_tokens": 20, "ignore_eos": True}


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    with running(toy_engine(), toy_tokenizer()) as server:
        yield server


def get(
    up: Running, path: str, method: str = "GET", **headers: str
) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection(up.url.removeprefix("http://"), timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


def test_every_file_of_the_folder_is_served_as_what_it_is(up: Running) -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(page.PATHS.values())
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for path, name in page.PATHS.items():
        status, headers, text = get(up, path)
        assert status == 200
        assert text == (FOLDER / name).read_text()
        assert headers["content-type"].split(";")[0] == kinds[name.rpartition(".")[2]]
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


def test_a_file_is_sent_again_when_it_has_changed(up: Running) -> None:
    _, headers, text = get(up, "/page/main.js")
    assert text
    status, _, nothing = get(up, "/page/main.js", If_None_Match=headers["etag"])
    assert (status, nothing) == (304, "")
    assert get(up, "/page/main.js", If_None_Match='"other"')[0] == 200
    assert get(up, "/", "HEAD")[::2] == (200, "")


@pytest.mark.parametrize(
    "path", ["/page/", "/page/../app.py", "/page/%2e%2e/app.py", "/page/none.js", "/index.html", "/page//"]
)
def test_nothing_else_of_the_disk_is_served(up: Running, path: str) -> None:
    status, headers, _ = get(up, path)
    assert status == 404
    assert headers["content-type"] == "application/json"


def test_the_page_needs_nothing_from_elsewhere_and_nothing_inline() -> None:
    texts = {path.name: path.read_text() for path in FOLDER.iterdir()}
    for name, text in texts.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text), name
    html = texts["index.html"]
    assert not re.search(r"<style|\son\w+=|\sstyle=|<script>|javascript:", html)
    named = set(re.findall(r'(?:src|href)="page/([^"]+)"', html))
    imported = {m for text in texts.values() for m in re.findall(r'from "\./([a-z]+\.js)"', text)}
    assert named | imported | {"index.html"} == texts.keys()


def test_ids_that_scripts_name_are_there_and_labels_name_ids() -> None:
    html = (FOLDER / "index.html").read_text()
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    for name in ("load.js", "main.js", "receipt.js", "trial.js", "weave.js"):
        used = re.findall(r'\b(?:at|number)\("([a-z-]+)"\)', (FOLDER / name).read_text())
        assert set(used) <= set(ids), name
    for attribute in ("for", "aria-labelledby", "aria-describedby"):
        for name in re.findall(rf'\s{attribute}="([^"]+)"', html):
            assert name in ids


def test_what_a_hostile_client_sends_comes_back_as_json_only(up: Running) -> None:
    hostile = "<script>alert(1)</script>"
    status, headers, text = get(up, "/%3Cscript%3Ealert(1)%3C/script%3E")
    assert (status, headers["content-type"]) == (404, "application/json")
    assert hostile in json.loads(text)["error"]["message"]
    status, text = raw_post(up, COMPLETIONS, json.dumps(BODY | {"model": hostile}).encode())
    assert status == 404
    assert hostile in json.loads(text)["error"]["message"]


def test_stats_are_the_engines(up: Running) -> None:
    before = json.loads(get(up, "/stats.json")[2])
    post(up, COMPLETIONS, BODY | {"prompt": "stats"})
    post(up, COMPLETIONS, BODY | {"prompt": "stats", "deterministic": False})
    after = json.loads(get(up, "/stats.json")[2])
    grown = {origin: after["tokens"][origin] - before["tokens"][origin] for origin in after["tokens"]}
    assert grown["ordinary"] == 20
    assert grown["certified"] + grown["verified"] == 20
    assert after["requests"]["finished"] - before["requests"]["finished"] == 2
    assert after["requests"]["running"] == after["requests"]["waiting"] == 0
    assert after["kv"]["pages"] == up.service.flights.thread.call(lambda e: e.limits.num_pages).result()
    assert after["uptime_s"] > before["uptime_s"]
    assert after["draining"] is False
    page = get(up, "/metrics")[2]
    assert f'llm42_tokens_total{{origin="ordinary"}} {float(after["tokens"]["ordinary"])}' in page


def test_stats_show_what_is_in_flight_while_the_engine_works() -> None:
    model = Gated()
    with (
        running(toy_engine(model, max_num_seqs=2), toy_tokenizer()) as up,
        ThreadPoolExecutor(3) as pool,
    ):
        model.seconds = 0.02
        futures = [pool.submit(post, up, COMPLETIONS, BODY | {"seed": i}) for i in range(3)]

        def busy() -> bool:
            stats = json.loads(get(up, "/stats.json")[2])
            return stats["requests"]["running"] == 2 and stats["kv"]["pages_in_use"] > 0

        until(busy)
        for future in futures:
            future.result()


def test_a_key_is_asked_for_by_what_shows_texts_and_not_by_the_page() -> None:
    with running(toy_engine(), toy_tokenizer(), api_keys=("alpha",)) as up:
        for path in ("/", "/page/main.js", "/stats.json", "/metrics", "/health"):
            assert get(up, path)[0] == 200
        for path in ("/v1/models", "/openapi.json", "/page/none.js", "/pagex"):
            assert get(up, path)[0] == 401
        assert get(up, "/v1/models", Authorization="Bearer alpha")[0] == 200


def test_a_fresh_request_is_computed_by_itself_and_has_the_same_bits(tmp_path: Path) -> None:
    model = Gated()
    with (
        running(toy_engine(model), toy_tokenizer(), cache_path=tmp_path / "cache") as up,
        ThreadPoolExecutor(4) as pool,
    ):
        for fresh, computed in ((False, 1), (True, 3)):
            body = BODY | {"prompt": "AB" + "C" * fresh, "fresh": fresh, "receipt": True}
            before = finished(up)
            model.gate.clear()
            futures = [pool.submit(post, up, COMPLETIONS, body) for _ in range(3)]
            until(lambda computed=computed: len(up.service.flights) == computed)
            model.gate.set()
            answers = [future.result()["choices"] for future in futures]
            assert answers[0] == answers[1] == answers[2]
            assert finished(up) - before == computed
        again = post(up, COMPLETIONS, body)["choices"]  # kept, but not taken
        assert again == answers[0]
        assert finished(up) - before == computed + 1

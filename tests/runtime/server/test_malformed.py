"""Bodies made from the server's own OpenAPI document, and broken ones: 200 or 4xx, and nobody is hurt."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from serving import Running, post, raw_post, running, toy_engine, toy_tokenizer

WITNESS = {"model": "tiny", "prompt": "ABCDEF", "max_tokens": 12, "seed": 5, "temperature": 1.0}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "tiny", "prompt": "ABC", "max_tokens": 3},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "ABC"}],
        "max_tokens": 3,
    },
    "/v1/score": {"model": "tiny", "prompt": "ABC", "completion": "DE"},
    "/v1/receipts/verify": {"receipt": "{}"},
    "/tokenize": {"prompt": "ABC"},
    "/detokenize": {"tokens": [1, 2]},
}
KEYS = st.text(max_size=5) | st.sampled_from(["type", "function", "text", "schema"])
WILD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(2**63) - 1])
    | st.floats()
    | st.sampled_from(["", "tiny", "\x00", "\ud800", "💥", "A" * 300, "auto", "required", "text", "{}"])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
MUCH = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    limits = {"max_choices": 4, "timeout_s": 5.0, "max_body_bytes": 2**16}
    with running(toy_engine(), toy_tokenizer(), **limits) as server:
        yield server


@pytest.fixture(scope="module")
def document(up: Running) -> dict[str, Any]:
    connection = http.client.HTTPConnection(up.url.removeprefix("http://"))
    with contextlib.closing(connection):
        connection.request("GET", "/openapi.json")
        return dict(json.loads(connection.getresponse().read()))


def made_of(schema: dict[str, Any], document: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that a schema of the document allows, more or less."""
    if "$ref" in schema:
        return made_of(document["components"]["schemas"][schema["$ref"].rpartition("/")[2]], document, depth)
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return st.one_of([made_of(one, document, depth) for one in schema[several]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        return st.lists(made_of(schema.get("items", {}), document, depth + 1), max_size=3)
    if kind == "object" and depth < 5:
        known = {k: made_of(v, document, depth + 1) for k, v in schema.get("properties", {}).items()}
        needed = {k: known.pop(k) for k in schema.get("required", []) if k in known}
        return st.fixed_dictionaries(needed, optional=known)
    plain: dict[Any, st.SearchStrategy[Any]] = {
        "string": st.text(max_size=8) | st.sampled_from(["[A-C]+", "tiny", "A", 'start: "A"']),
        "integer": st.integers(-3, 60),
        "number": st.floats(-3, 3),
        "boolean": st.booleans(),
        "null": st.none(),
    }
    return plain.get(kind, WILD)


def check(up: Running, path: str, body: bytes) -> int:
    status, text = raw_post(up, path, body)
    own_deadline = status == 504 and b'"timeout"' in body
    assert status == 200 or 400 <= status < 500 or own_deadline, (path, body, status, text)
    if status != 200:
        error = json.loads(text)["error"]
        assert error["message"], (path, body)
        assert "\n" not in error["message"]
        assert error["param"] is None or error["param"].isprintable()
    return status


def bodies(document: dict[str, Any]) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
    """A valid body in which a few parameters have other values, allowed ones or wild ones."""

    def of(path: str) -> st.SearchStrategy[tuple[str, dict[str, Any]]]:
        content = document["paths"][path]["post"]["requestBody"]["content"]
        name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
        properties = document["components"]["schemas"][name]["properties"]
        changes = [
            st.tuples(st.just(key), made_of(schema, document) | WILD) for key, schema in properties.items()
        ]
        unknown = st.tuples(st.text(max_size=6), WILD)
        several = st.lists(st.one_of(*changes, unknown), max_size=3)
        return several.map(lambda found: (path, VALID[path] | dict(found)))

    return st.sampled_from(sorted(VALID)).flatmap(of)


def test_bodies_of_the_documents_kind(up: Running, document: dict[str, Any]) -> None:
    wanted = post(up, "/v1/completions", WITNESS)["choices"]
    statuses = []

    @MUCH
    @given(bodies(document))
    def every(asked: tuple[str, dict[str, Any]]) -> None:
        path, body = asked
        statuses.append(check(up, path, json.dumps(body).encode()))

    every()
    assert 200 in statuses
    assert 400 in statuses
    assert post(up, "/v1/completions", WITNESS)["choices"] == wanted
    assert len(up.service.flights) == 0


def test_bodies_that_are_none(up: Running) -> None:
    whole = json.dumps(VALID["/v1/chat/completions"] | {"stop": ["x", "y"], "n": 2}).encode()

    @MUCH
    @given(st.integers(0, len(whole)), st.integers(0, 12), st.binary(max_size=6))
    def every(start: int, length: int, put: bytes) -> None:
        check(up, "/v1/chat/completions", whole[:start] + put + whole[start + length :])

    every()
    for body in (
        b"",
        b"[" * 10_000,
        b'{"a":' * 10_000,
        b"1" * 5000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
    ):
        assert check(up, "/v1/completions", body) == 400


def test_every_route_of_bodies_is_tried(document: dict[str, Any]) -> None:
    assert {path for path, ways in document["paths"].items() if "post" in ways} == VALID.keys()

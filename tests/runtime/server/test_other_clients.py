"""LangChain's ChatOpenAI, and requests as litellm writes them by hand: unchanged, over loopback."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest
from serving import Running, post, raw_post, running, toy_engine, toy_tokenizer

langchain = pytest.importorskip("langchain_openai")

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    with running(toy_engine(), toy_tokenizer()) as server:
        yield server


def chat(up: Running, **options: Any) -> Any:
    fixed = {"temperature": 0.7, "seed": 3, "max_retries": 0} | options
    return langchain.ChatOpenAI(base_url=f"{up.url}/v1", api_key="none", model="tiny", **fixed)


@pytest.fixture(autouse=True)
def _nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("LANGCHAIN", "LANGSMITH", "OPENAI"))]:
        monkeypatch.delenv(name)


def raw(up: Running, **more: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "HELLO"}], "temperature": 0.7}
    return post(up, CHAT, body | {"seed": 3, "max_tokens": 12, "logprobs": True} | more)


def test_langchain_gets_what_a_plain_request_gets(up: Running) -> None:
    wanted = raw(up)
    got = chat(up, max_tokens=12, logprobs=True).invoke("HELLO")
    choice = wanted["choices"][0]
    assert got.content == choice["message"]["content"] != ""
    assert got.response_metadata["system_fingerprint"] == wanted["system_fingerprint"]
    assert got.response_metadata["finish_reason"] == choice["finish_reason"]
    logprobs = got.response_metadata["logprobs"]["content"]
    assert [one["logprob"] for one in logprobs] == [one["logprob"] for one in choice["logprobs"]["content"]]
    assert got.usage_metadata["total_tokens"] == wanted["usage"]["total_tokens"]


def test_langchain_streams_and_batches(up: Running) -> None:
    wanted = raw(up)["choices"][0]["message"]["content"]
    model = chat(up, max_tokens=12, stream_usage=True)
    chunks = list(model.stream("HELLO"))
    assert "".join(chunk.content for chunk in chunks) == wanted
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 12
    assert [one.content for one in model.batch(["HELLO", "HELLO"])] == [wanted, wanted]

    async def streamed() -> str:
        return "".join([chunk.content async for chunk in model.astream("HELLO")])

    assert asyncio.run(streamed()) == wanted


def test_langchain_sends_extensions(up: Running) -> None:
    model = chat(up, max_tokens=12, extra_body={"deterministic": True, "receipt": True})
    wanted = raw(up)["choices"][0]["message"]["content"]
    assert model.invoke([("system", ""), ("user", "HELLO")]).content == wanted


class R(pydantic.BaseModel):
    """Short: the model has few tokens."""

    A: bool


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(server: Running, method: str) -> None:
    """By a grammar, so that a model which knows nothing answers in the form, if it comes to the end."""
    pytest.importorskip("llguidance")
    for seed in range(12):
        model = chat(server, seed=seed, max_tokens=60)
        got = model.with_structured_output(R, method=method, include_raw=True).invoke("a")
        if got["raw"].response_metadata["finish_reason"] != "length":
            assert isinstance(got["parsed"], R), got
            return
    pytest.fail("no output came to its end")


def test_langchain_reads_an_error(up: Running) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as caught:
        chat(up, max_tokens=12, top_p=3).invoke("HELLO")
    assert caught.value.param == "top_p"


def test_a_hand_written_stream_is_read_line_by_line(up: Running) -> None:
    """As clients do that know events but not their ids: `data: ` lines, then [DONE]."""
    wanted = raw(up)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "HELLO"}],
        "temperature": 0.7,
        "seed": 3,
    }
    body |= {"max_tokens": 12, "stream": True, "stream_options": {"include_usage": True}, "user": "x"}
    headers = {"Authorization": "Bearer anything", "Accept": "text/event-stream", "X_Stainless_Lang": "none"}
    status, data = raw_post(up, CHAT, json.dumps(body).encode(), **headers)
    assert status == 200
    lines = [line.removeprefix("data: ") for line in data.decode().split("\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    text = "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])
    assert text == wanted["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"] == wanted["usage"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)


def test_nulls_and_defaults_that_clients_fill_in_change_nothing(up: Running) -> None:
    filled = dict.fromkeys(("stop", "tools", "tool_choice", "response_format", "logit_bias", "user"))
    filled |= {"n": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "stream": False}
    assert raw(up, **filled)["choices"] == raw(up)["choices"]


def test_a_retry_of_a_client_is_the_same_answer(up: Running) -> None:
    """A client whose answer was lost asks again."""
    body = {"model": "tiny", "prompt": "HELLO", "max_tokens": 12, "temperature": 1.0}
    assert post(up, COMPLETIONS, body)["choices"] == post(up, COMPLETIONS, body)["choices"]

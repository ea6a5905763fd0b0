"""The official client against a server of a tiny model: sync, async, streams, and errors."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import Gated, Running, running, toy_engine, toy_tokenizer, until

from llm42c.runtime.loader import BuiltEngine
from llm42c.runtime.sampling import SamplingParams

WARM: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0.9,
    "max_tokens": 24,
    "extra_body": {"ignore_eos": True},
}
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def solo(built: BuiltEngine, prompt: list[int], **params: Any) -> Any:
    return built.variant(verify="always").generate([prompt], SamplingParams(**params))[0]


def test_a_completion_is_what_the_engine_gives_alone(client: openai.OpenAI, built: BuiltEngine) -> None:
    got = client.completions.create(prompt="hello", logprobs=2, **WARM)
    ids = built.tokenizer("hello")["input_ids"]
    wanted = solo(built, ids, max_tokens=24, temperature=0.9, ignore_eos=True, logprobs=2)
    (choice,) = got.choices
    assert choice.text == wanted.text
    assert choice.logprobs.token_logprobs == wanted.logprobs
    assert choice.finish_reason == "length"
    assert got.system_fingerprint == built.engine.contract.hash
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), 24)


def test_a_stream_is_the_whole_in_parts(client: openai.OpenAI) -> None:
    whole = client.completions.create(prompt="abc", **WARM)
    chunks = list(
        client.completions.create(prompt="abc", stream=True, stream_options={"include_usage": True}, **WARM)
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_a_chat_goes_through_the_template(client: openai.OpenAI, built: BuiltEngine) -> None:
    got = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=3, **WARM)
    text = "<s>user hello</s><s>assistant "
    ids = built.tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = solo(built, ids, max_tokens=24, temperature=0.9, ignore_eos=True, logprobs=3)
    (choice,) = got.choices
    assert choice.message.content == wanted.text
    assert [c.logprob for c in choice.logprobs.content] == wanted.logprobs
    assert [[t.logprob for t in c.top_logprobs] for c in choice.logprobs.content] == [
        [logprob for _, logprob in top] for top in wanted.top_logprobs
    ]
    parts = list(client.chat.completions.create(messages=CHAT, stream=True, **WARM))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == wanted.text
    assert parts[-1].choices[0].finish_reason == "length"


def test_the_async_client_and_many_at_once(server: Running, client: openai.OpenAI) -> None:
    alone = [client.completions.create(prompt=p, **WARM).choices[0].text for p in ("a", "b", "c")]

    async def together() -> list[str]:
        own = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)

        async def stream(prompt: str) -> str:
            chunks = await own.completions.create(prompt=prompt, stream=True, **WARM)
            return "".join([chunk.choices[0].text async for chunk in chunks])

        whole = [own.completions.create(prompt=p, **WARM) for p in ("a", "b", "c")]
        texts = await asyncio.gather(*(stream(p) for p in ("a", "b", "c")), *whole)
        return [t if isinstance(t, str) else t.choices[0].text for t in texts]

    assert asyncio.run(together()) == alone * 2
    assert len(set(alone)) == 3


def test_several_prompts_and_choices(client: openai.OpenAI, built: BuiltEngine) -> None:
    ids = [built.tokenizer(p)["input_ids"] for p in ("ab", "cd")]
    by_text = client.completions.create(prompt=["ab", "cd"], n=2, **WARM)
    by_ids = client.completions.create(prompt=ids, n=2, **WARM)
    texts = [c.text for c in by_text.choices]
    assert [c.text for c in by_ids.choices] == texts
    assert len(set(texts)) == 4
    assert [c.index for c in by_text.choices] == [0, 1, 2, 3]
    assert by_text.usage.prompt_tokens == 4
    one = client.completions.create(prompt=ids[1], **WARM)
    assert one.choices[0].text == texts[2], "the first copy is the request alone"
    seeded = client.completions.create(prompt="ab", seed=5, **WARM).choices[0].text
    assert seeded == client.completions.create(prompt="ab", seed=5, **WARM).choices[0].text != texts[0]


def test_models(client: openai.OpenAI, built: BuiltEngine) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").contract == built.engine.contract.hash
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="other", prompt="x")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_another_contract_is_a_conflict_with_the_fields(client: openai.OpenAI, built: BuiltEngine) -> None:
    mine = built.engine.contract
    pinned = {"contract": mine.hash, "ignore_eos": True}
    client.completions.create(**WARM | {"prompt": "x", "extra_body": pinned})
    with pytest.raises(openai.ConflictError) as caught:
        client.completions.create(**WARM | {"prompt": "x", "extra_body": {"contract": "0" * 64}})
    assert caught.value.param == "contract"
    assert mine.hash in caught.value.message
    other = dataclasses.replace(mine, verify_tokens=99)
    pinned = {"contract": json.loads(other.to_json())}
    with pytest.raises(openai.ConflictError) as caught:
        client.completions.create(**WARM | {"prompt": "x", "extra_body": pinned})
    assert caught.value.body["fields"] == [f"verify_tokens: 99 -> {mine.verify_tokens}"]


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"top_p": 2}, "top_p"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 10**6}, "prompt"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[5, 10**9]]}, "prompt"),
        ({"prompt": [["x"]]}, "prompt"),
        ({"stop": [""]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"frobnicate": 1}}, "frobnicate"),
        ({"extra_body": {"regex": "("}}, "regex"),
        ({"extra_body": {"deterministic": False, "receipt": True}}, "receipt"),
        ({"extra_body": {"min_tokens": 99}}, "min_tokens"),
    ],
)
def test_an_error_names_the_parameter(client: openai.OpenAI, bad: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 4, **bad})
    assert caught.value.param == param, caught.value.message
    assert "\n" not in caught.value.message


def test_what_is_wrong_in_a_message_is_named(client: openai.OpenAI) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=picture)
    assert caught.value.param == "messages[0].content"


def test_a_client_that_was_turned_away_comes_back_and_one_without_patience_costs_nothing() -> None:
    model = Gated()
    with (
        running(toy_engine(model, max_num_seqs=1), toy_tokenizer(), max_queue=0) as up,
        ThreadPoolExecutor(1) as pool,
    ):
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "extra_body": {"ignore_eos": True}}
        url = f"{up.url}/v1"
        model.gate.clear()
        first = pool.submit(openai.OpenAI(base_url=url, api_key="x").completions.create, prompt="AB", **asked)
        until(lambda: len(up.service.flights) == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            openai.OpenAI(base_url=url, api_key="x", max_retries=0).completions.create(prompt="CD", **asked)
        assert caught.value.code == "queue_full"
        opener = threading.Timer(0.3, model.gate.set)
        opener.start()  # inside the second of Retry-After
        again = openai.OpenAI(base_url=url, api_key="x", max_retries=2).completions.create(
            prompt="CD", **asked
        )
        opener.join()
        assert first.result().choices[0].finish_reason == again.choices[0].finish_reason == "length"

        model.gate.clear()
        hasty = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=0.2)
        with pytest.raises(openai.APITimeoutError):
            hasty.completions.create(prompt="CD", **asked)
        model.gate.set()
        until(lambda: len(up.service.flights) == 0)
        with openai.OpenAI(base_url=url, api_key="x").completions.create(
            prompt="CD", stream=True, **asked | {"max_tokens": 200}
        ) as stream:
            next(iter(stream))  # and leaves
        until(lambda: len(up.service.flights) == 0)
        assert (
            hasty.with_options(timeout=30).completions.create(prompt="CD", **asked).choices == again.choices
        )

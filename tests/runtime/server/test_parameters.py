"""What requests may ask for, against the engine itself: parameters, structure, tools, scores, receipts."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel
from serving import Running, post

from llm42c.runtime.loader import BuiltEngine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.receipt import Receipt
from llm42c.runtime.sampling import SamplingParams

pytest.importorskip("llguidance")

BODY: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 20, "temperature": 0.9, "seed": 3}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a town",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 5}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "temperature": 1.0,
    "max_completion_tokens": 64,
}


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def alone(built: BuiltEngine, prompt: str = "hello", **params: Any) -> RequestOutput:
    ids = built.tokenizer(prompt)["input_ids"]
    asked = SamplingParams(**({"max_tokens": 20, "temperature": 0.9, "seed": 3} | params))
    return built.variant(verify="always").generate([ids], asked)[0]


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"stop": ["P", "q"]}, {"stop": ("P", "q")}),
        ({"stop": "P", "include_stop": True}, {"stop": ("P",), "include_stop": True}),
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"logit_bias": {"40": 6, "41": 5.5}}, {"logit_bias": {40: 6, 41: 5.5}}),
        ({"top_p": 0.3}, {"top_p": 0.3}),
        ({"top_k": 3, "min_p": 0.01}, {"top_k": 3, "min_p": 0.01}),
        ({"temperature": 0, "top_p": 0.3, "top_k": 3}, {"temperature": 0.0}),
        ({"min_tokens": 20, "stop_token_ids": [40, 41]}, {"min_tokens": 20, "stop_token_ids": (40, 41)}),
        ({"stop_token_ids": list(range(30, 60))}, {"stop_token_ids": tuple(range(30, 60))}),
        ({"seed": -1}, {"seed": 2**63 - 1}),
        ({"regex": "[a-c]{4,9}"}, {"regex": "[a-c]{4,9}"}),
        ({"choice": ["yes", "no"]}, {"choice": ("yes", "no")}),
        ({"speculate": "ngram"}, {}),
        ({"draft": [7, 8, 9]}, {}),
    ],
)  # fmt: skip
def test_a_parameter_does_what_the_engines_does(
    server: Running, built: BuiltEngine, asked: dict[str, Any], params: dict[str, Any]
) -> None:
    wanted = alone(built, **params)
    body = BODY | asked | {"return_token_ids": True, "logprobs": 0}
    choice = post(server, "/v1/completions", body)["choices"][0]
    assert choice["token_ids"] == wanted.token_ids
    assert choice["text"] == wanted.text
    assert choice["finish_reason"] == wanted.finish_reason
    shown = len(choice["logprobs"]["tokens"])
    assert choice["logprobs"]["token_logprobs"] == wanted.logprobs[:shown]
    assert shown == len(wanted.token_ids) - isinstance(wanted.stop_reason, int)


def test_an_echo_has_the_prompt_and_its_logprobs(server: Running, built: BuiltEngine) -> None:
    long = BODY | {"ignore_eos": True}
    plain = post(server, "/v1/completions", long)["choices"][0]
    ids = built.tokenizer("hello")["input_ids"]
    scored = built.variant(verify="always").score(ids[:1], ids[1:])
    for count in (20, 0):
        got = post(server, "/v1/completions", long | {"echo": True, "logprobs": 1, "max_tokens": count})
        choice = got["choices"][0]
        assert choice["text"] == "hello" + plain["text"] * (count > 0)
        assert choice["logprobs"]["token_logprobs"][: len(ids)] == [None, *scored.logprobs]
        assert len(choice["logprobs"]["tokens"]) == len(ids) + count
        assert got["usage"]["completion_tokens"] == count
        offsets = choice["logprobs"]["text_offset"]
        assert offsets == sorted(offsets)


def test_structured_outputs_of_the_client(client: openai.OpenAI) -> None:
    class Point(BaseModel):
        x: int
        y: bool

    found = [
        client.chat.completions.parse(**CHAT | {"seed": seed}, response_format=Point).choices[0]
        for seed in range(4)
        if _ends(client, seed)
    ]
    assert found
    assert all(isinstance(choice.message.parsed, Point) for choice in found)


def _ends(client: openai.OpenAI, seed: int) -> bool:
    schema = {
        "name": "Point",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "y": {"type": "boolean"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    }
    form = {"type": "json_schema", "json_schema": schema}
    made = client.chat.completions.create(**CHAT | {"seed": seed}, response_format=form)
    return made.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_tool_is_called(client: openai.OpenAI, choice: Any) -> None:
    body = CHAT | {"tools": [WEATHER], "tool_choice": choice}
    for seed in range(6):
        got = client.chat.completions.create(**body, seed=seed).choices[0]
        parts = list(client.chat.completions.create(**body, seed=seed, stream=True))
        if got.finish_reason != "tool_calls":
            continue
        (call,) = got.message.tool_calls
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"town"}
        assert got.message.content is None
        delta = parts[-1].choices[0].delta.tool_calls[0]
        assert delta.function.arguments == call.function.arguments
        assert not any(p.choices[0].delta.content for p in parts)
        return
    pytest.fail("no output came to its end")


def test_tools_that_may_be_called(server: Running, client: openai.OpenAI) -> None:
    body = CHAT | {"tools": [WEATHER], "seed": 1}
    free = client.chat.completions.create(**body).choices[0]
    assert free.message.tool_calls is None
    assert free.message.content
    parts = list(client.chat.completions.create(**body, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == free.message.content
    call = '{"name": "weather", "arguments": {"town": "Rome"}}'
    forced = client.chat.completions.create(**body, extra_body={"choice": [call]}).choices[0]
    assert forced.finish_reason == "tool_calls"
    assert json.loads(forced.message.tool_calls[0].function.arguments) == {"town": "Rome"}
    (called,) = forced.message.tool_calls
    shown = [
        {"role": "assistant", "content": "", "tool_calls": [called.model_dump()]},
        {"role": "tool", "content": "21", "tool_call_id": called.id},
    ]
    client.chat.completions.create(**body | {"messages": shown, "max_completion_tokens": 4})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**CHAT, tool_choice="required")
    assert caught.value.param == "tool_choice"


def test_scores_are_the_engines(server: Running, built: BuiltEngine) -> None:
    body = {"model": "tiny", "prompt": ["ab", "c"], "completion": ["xyz", [40, 41]]}
    got = post(server, "/v1/score", body | {"completion": [[90, 91, 92], [40, 41]]})
    engine = built.variant(verify="always")
    for found, (prompt, ids) in zip(got["data"], (("ab", [90, 91, 92]), ("c", [40, 41])), strict=True):
        wanted = engine.score(built.tokenizer(prompt)["input_ids"], ids)
        assert (found["logprobs"], found["total"]) == (wanted.logprobs, wanted.total)
    assert post(server, "/v1/score", body | {"completion": "xyz"}, 400)["error"]["param"] == "completion"


def test_a_receipt_is_verified_and_an_edited_one_is_not(server: Running, built: BuiltEngine) -> None:
    got = post(server, "/v1/completions", BODY | {"receipt": True, "return_token_ids": True})
    text = got["choices"][0]["receipt"]
    receipt = Receipt.from_json(text)
    assert receipt.tokens == got["choices"][0]["token_ids"]
    assert post(server, "/v1/receipts/verify", {"receipt": text})["verdict"] == "exact"
    edited = text.replace('"seed":3', '"seed":4')
    assert edited != text
    assert post(server, "/v1/receipts/verify", {"receipt": edited})["verdict"] == "damaged"
    tokens = [*receipt.tokens[:-1], (receipt.tokens[-1] + 1) % 90 + 3]
    forged = dataclasses.replace(receipt, tokens=tokens).to_json()
    found = post(server, "/v1/receipts/verify", {"receipt": forged})
    assert found["verdict"] == "differs"
    contract = dataclasses.replace(receipt.contract, verify_tokens=99)
    found = post(
        server, "/v1/receipts/verify", {"receipt": dataclasses.replace(receipt, contract=contract).to_json()}
    )
    assert found["verdict"] == "another contract"
    assert len(found["fields"]) == 1


def test_tokens_and_back(server: Running, built: BuiltEngine) -> None:
    ids = built.tokenizer("hello")["input_ids"]
    assert post(server, "/tokenize", {"prompt": "hello"})["tokens"] == ids
    assert post(server, "/detokenize", {"tokens": ids})["prompt"] == "hello"
    chat = post(server, "/tokenize", {"messages": CHAT["messages"]})
    text = "<s>user hi</s><s>assistant "
    assert chat["tokens"] == built.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert post(server, "/tokenize", {}, 400)["error"]["param"] == "prompt"
    half = post(server, "/tokenize", {"prompt": "\ud800"}, 400)
    assert half["error"]["param"] == "prompt"

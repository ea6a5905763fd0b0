"""`generate_batch`, and streams of committed tokens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from tiny_models import EOS, bits, padded, plain, prompt, solo, wrapped
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.generation.stopping_criteria import MaxLengthCriteria

from llm42c.errors import RequestError

PROMPTS = [prompt(n, n) for n in (3, 17, 8, 1, 30)]


def _pairs(outputs: dict[str, GenerationOutput]) -> list[tuple[list[int], list[int]]]:
    return [(o.generated_tokens, bits(torch.tensor(o.logprobs)).tolist()) for o in outputs.values()]


@pytest.mark.parametrize("arguments", [{}, {"do_sample": True, "seed": 9, "top_p": 0.9}])
def test_same_as_generate_alone(arguments: dict[str, Any]) -> None:
    arguments = {"max_new_tokens": 10, "do_sample": False} | arguments
    expected = solo(wrapped(), PROMPTS, **arguments)
    outputs = wrapped().generate_batch(PROMPTS, **arguments)
    assert list(outputs) == [f"req_{i}" for i in range(5)]
    assert _pairs(outputs) == expected
    backwards = wrapped().generate_batch(PROMPTS[::-1], **arguments)
    assert _pairs(backwards) == expected[::-1]
    for i, output in enumerate(outputs.values()):
        assert isinstance(output, GenerationOutput)
        assert (output.status, output.error) == (RequestStatus.FINISHED, None)
        assert (output.prompt_ids, output.request_id) == (PROMPTS[i], f"req_{i}")
        assert output.is_finished()


def test_generation_config_and_lengths() -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=EOS)
    outputs = wrapped().generate_batch(PROMPTS, generation_config=config)
    assert _pairs(outputs) == solo(wrapped(), PROMPTS, max_new_tokens=5, do_sample=False)
    # Without padding max_length counts the prompt's own tokens, as it does alone.
    outputs = wrapped().generate_batch(PROMPTS, max_length=34, min_length=33, do_sample=False)
    assert _pairs(outputs) == solo(wrapped(), PROMPTS, max_length=34, min_length=33, do_sample=False)
    assert [len(o.generated_tokens) for o in outputs.values()] == [34 - len(p) for p in PROMPTS]
    rules = StoppingCriteriaList([MaxLengthCriteria(33)])
    with pytest.raises(RequestError, match="nothing to generate"):
        wrapped().generate_batch([prompt(33, 1)], stopping_criteria=rules)


def test_return_sequences_and_timestamps() -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}
    outputs = wrapped().generate_batch(PROMPTS[:2], **arguments, record_timestamps=True, warmup=False)
    assert list(outputs) == ["req_0", "req_0__child#0", "req_1", "req_1__child#0"]
    assert _pairs(outputs) == solo(wrapped(), PROMPTS[:2], **arguments)
    for output in outputs.values():
        assert output.timestamps is not None
        assert len(output.timestamps) == len(output.generated_tokens)
        assert output.timestamps == sorted(output.timestamps)


class FailsOn(LogitsProcessor):
    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids[0, 0] == self.first and input_ids.shape[1] > 19:
            raise KeyError("mine")
        return scores


def test_a_failing_request_fails_alone() -> None:
    processor = LogitsProcessorList([FailsOn(PROMPTS[1][0])])
    outputs = wrapped().generate_batch(PROMPTS, max_new_tokens=8, do_sample=False, logits_processor=processor)
    expected = solo(wrapped(), PROMPTS, max_new_tokens=8, do_sample=False)
    for i, output in enumerate(outputs.values()):
        if i == 1:
            assert (output.status, output.error) == (RequestStatus.FAILED, "'mine'")
        else:
            assert _pairs({"": output}) == [expected[i]]
    assert not wrapped().llm42._pump.engine.has_unfinished()


def test_bad_input() -> None:
    assert wrapped().generate_batch([]) == {}
    for bad in ([[]], [[1.5]], [["a"]], [[3], []]):
        with pytest.raises(RequestError, match=r"inputs\[\d\] must be"):
            wrapped().generate_batch(bad, max_new_tokens=3)
    with pytest.raises(RequestError, match="num_beams"):
        wrapped().generate_batch([[3]], max_new_tokens=3, num_beams=2)
    with pytest.raises(RequestError, match="streamer"):
        wrapped().generate_batch([[3]], max_new_tokens=3, streamer=object())
    with pytest.raises(RequestError, match="exceed the context"):
        wrapped().generate_batch([[3]], max_new_tokens=3000)
    with (
        pytest.raises(RequestError, match="use generate_batch"),
        wrapped().continuous_batching_context_manager(),
    ):
        pass


def test_streams_share_the_engine() -> None:
    arguments = {"max_new_tokens": 12, "do_sample": True, "seed": 4}
    expected = solo(wrapped(), PROMPTS, **arguments)

    async def consume(p: Any) -> tuple[list[int], list[int]]:
        tokens = [t async for t in wrapped().llm42.stream(p, **arguments)]
        values = bits(torch.tensor([t.logprob for t in tokens])).tolist()
        return [t.token_id for t in tokens], values

    async def together() -> list[tuple[list[int], list[int]]]:
        return await asyncio.gather(*(consume(p) for p in PROMPTS))

    assert asyncio.run(together()) == expected
    assert asyncio.run(consume(torch.tensor(PROMPTS[0]))) == expected[0]


def test_leaving_a_stream_aborts_its_request() -> None:
    async def first() -> int:
        stream = wrapped().llm42.stream(PROMPTS[0], max_new_tokens=200, do_sample=False)
        token = await anext(stream)
        await stream.aclose()
        return token.token_id

    assert asyncio.run(first()) == solo(wrapped(), PROMPTS[:1], max_new_tokens=1, do_sample=False)[0][0][0]
    assert not wrapped().llm42._pump.engine.has_unfinished()


@pytest.mark.parametrize("inputs", ["lists", "tensors", "padded"])
def test_a_stream_of_several_prompts(inputs: str) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": 9, "do_sample": True, "seed": 3, "num_return_sequences": 2}
    given: dict[str, Any] = {
        "lists": {"inputs": PROMPTS},
        "tensors": {"inputs": [torch.tensor(p) for p in PROMPTS]},
        "padded": {"inputs": padded(PROMPTS)["input_ids"]}
        | {"attention_mask": padded(PROMPTS)["attention_mask"]},
    }[inputs]
    rows: list[list[Any]] = [[] for _ in range(2 * len(PROMPTS))]

    async def consume() -> None:
        async for token in wrapped().llm42.stream(**given, **arguments):
            rows[token.row].append(token)

    asyncio.run(consume())
    found = [
        ([t.token_id for t in row], bits(torch.tensor([t.logprob for t in row])).tolist()) for row in rows
    ]
    assert found == solo(wrapped(), PROMPTS, **arguments)


def test_bad_streams() -> None:
    async def consume(*inputs: Any, **arguments: Any) -> None:
        async for _ in wrapped().llm42.stream(*inputs, max_new_tokens=2, **arguments):
            pass

    with pytest.raises(RequestError, match=r"inputs\[0\] must be"):
        asyncio.run(consume([]))
    with pytest.raises(RequestError, match="attention_mask"):
        asyncio.run(consume([3, 4], attention_mask=torch.ones(1, 2)))
    with pytest.raises(RequestError, match="streamer"):
        asyncio.run(consume([3, 4], streamer=object()))
    with pytest.raises(RequestError, match="outside the vocabulary"):
        asyncio.run(consume([[3, 4], [3, 400]]))
    assert not wrapped().llm42._pump.engine.has_unfinished()


def test_tokens_are_those_of_eager() -> None:
    outputs = wrapped().generate_batch(PROMPTS, max_new_tokens=10, do_sample=False)
    for p, output in zip(PROMPTS, outputs.values(), strict=True):
        theirs = plain().generate(torch.tensor([p]), max_new_tokens=10, do_sample=False)
        assert theirs[0, len(p) :].tolist() == output.generated_tokens

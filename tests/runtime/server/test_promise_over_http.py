"""Deterministic answers amid noise are those of the request alone; ordinary ones show that noise tells."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import Running, running, toy_engine, toy_tokenizer
from toy import NoisyModel, solo

from llm42c.runtime.sampling import SamplingParams

PROMPTS = ["ABC", "DEFGHI", "K", "ABABABABABABAB", "ZZ"]
TOKENS = 40
BODY: dict[str, Any] = {"model": "tiny", "max_tokens": TOKENS, "temperature": 1.0, "logprobs": 0, "seed": 1}


@pytest.fixture(scope="module")
def noisy() -> Iterator[Running]:
    """Its engine decodes with a graph whose bits hang on the batch, and whose tokens flip now and then."""
    with running(toy_engine(NoisyModel()), toy_tokenizer(), deterministic=False) as up:
        yield up


def ask(url: str, deterministic: bool, load: int) -> list[list[float]]:
    """Log-probs of PROMPTS, asked for amid `load` other requests."""
    extra = {"ignore_eos": True, "deterministic": deterministic}

    async def all_of_them() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            rng = random.Random(load)

            async def one(prompt: str, **changes: Any) -> list[float]:
                body = BODY | {"prompt": prompt, "extra_body": extra} | changes
                made = await client.completions.create(**body)
                logprobs: list[float] = made.choices[0].logprobs.token_logprobs
                return logprobs

            noise = [
                asyncio.create_task(one("X" * rng.randrange(1, 30), max_tokens=rng.randrange(1, 40), seed=i))
                for i in range(load)
            ]
            found = [await one(PROMPTS[0]), *await asyncio.gather(*map(one, PROMPTS[1:]))]
            await asyncio.gather(*noise)
            return found

    return asyncio.run(all_of_them())


def test_noise_changes_no_bit_of_a_deterministic_answer(noisy: Running) -> None:
    params = SamplingParams(max_tokens=TOKENS, temperature=1.0, seed=1, ignore_eos=True)
    wanted = [solo([ord(letter) - ord("A") for letter in prompt], params)[1] for prompt in PROMPTS]
    for load in (0, 9, 20):
        assert ask(noisy.url, True, load) == wanted
    assert noisy.service.flights.thread.call(lambda engine: engine.stats().rollbacks).result() > 0


def test_the_noise_is_such_that_ordinary_answers_change(noisy: Running) -> None:
    alone = ask(noisy.url, False, 0)
    assert any(ask(noisy.url, False, load) != alone for load in (9, 20, 30))

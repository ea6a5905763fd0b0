"""Many samples of one prompt, each of which can be drawn again alone.

    python examples/hf_fan_out.py [MODEL]

Row i of `num_return_sequences` has a seed of its own, derived from `seed` and i alone, so a sample does not
change when more of them are drawn; and an asyncio server may stream samples while others come and go.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import llm42c
from llm42c.hub.models import load_model

WAY = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.95}


async def stream_all(model: Any, prompt: list[int], seeds: list[int]) -> list[list[int]]:
    """One stream a seed, all at once: they share the engine's batches."""

    async def one(seed: int) -> list[int]:
        return [token.token_id async for token in model.llm42.stream(prompt, **WAY, seed=seed)]

    return list(await asyncio.gather(*(one(seed) for seed in seeds)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    model, tokenizer = load_model(parser.parse_args().model)
    llm42c.deterministic(model)
    prompt = tokenizer("My favourite thing about the sea is")["input_ids"]

    few = list(model.generate_batch([prompt], **WAY, seed=7, num_return_sequences=2).values())
    many = list(model.generate_batch([prompt], **WAY, seed=7, num_return_sequences=6).values())
    for sample in many:
        print("-", tokenizer.decode(sample.generated_tokens, skip_special_tokens=True).strip())
    same = all(
        (a.generated_tokens, a.logprobs) == (b.generated_tokens, b.logprobs)
        for a, b in zip(few, many, strict=False)
    )
    streams = asyncio.run(stream_all(model, prompt, [7, 8, 9]))
    same = same and streams[0] == few[0].generated_tokens
    print("the first samples are the same however many are drawn:", same)
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

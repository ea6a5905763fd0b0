"""Stands for vllm in another interpreter: it answers, and prints where it should not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

__version__ = "0.0-fake"


class SamplingParams:
    def __init__(self, *, temperature: float, max_tokens: int, ignore_eos: bool) -> None:
        self.greedy, self.max_tokens, self.ignore_eos = temperature == 0, max_tokens, ignore_eos


class LLM:
    def __init__(self, model: str, **options: Any) -> None:
        print("loading", model, options)
        if model == "broken":
            raise RuntimeError("no such model")

    def generate(
        self, prompts: list[dict[str, list[int]]], params: SamplingParams, use_tqdm: bool
    ) -> list[Any]:
        print("a line that is no answer")
        texts = [[p["prompt_token_ids"][-1]] * params.max_tokens for p in prompts]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(t))]) for t in texts]

"""A short demo of a model in a process of its own, with LLM42_ISA as it should be: `isa_demo.py smollm2 1 2`.

Prints, for each number of threads: the contract, and the digests of tokens and log-probabilities of requests
alone and together.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from llm42c.compile.compiler import ModelCompiler
from llm42c.hub import models
from llm42c.runtime.demo.job import make_jobs, run_alone, run_together
from llm42c.runtime.loader import build_engine

PROMPTS = ("The capital of France is", "def add(a, b):\n", "Once upon a time there was a", "1, 2, 3,")
TOKENS = 6


def main() -> None:
    model, tokenizer = models.load_model(sys.argv[1])
    jobs = make_jobs([(text, tokenizer.encode(text)) for text in PROMPTS], TOKENS)
    compiler, found = ModelCompiler(model), []
    for threads in map(int, sys.argv[2:]):
        torch.set_num_threads(threads)
        built = build_engine(model, tokenizer, compiler=compiler, persist_certificates=False, num_pages=64)
        runs = [
            run(engine, jobs, _silent)
            for run, engine in ((run_alone, built.engine), (run_together, built.variant()))
        ]
        found.append(
            {
                "contract": built.engine.contract.hash,
                "tokens": [run.tokens_digest for run in runs],
                "logprobs": [run.logprobs_digest for run in runs],
            }
        )
    print(json.dumps(found))


def _silent(*_: Any) -> None:
    pass


if __name__ == "__main__":
    main()

"""Decoding under a grammar against decoding without one, in turns on one engine: tokens a second.

python benchmarks/structured.py --csv benchmarks/results/structured.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from llm42c.prompts import load_prompts
from llm42c.runtime.bench.machine import describe
from llm42c.runtime.engine import Engine
from llm42c.runtime.loader import build_engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams

# Long enough that no output ends before its last token is counted.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "active": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "active", "tags"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "json_schema": {"json_schema": {"type": "array", "items": PERSON, "minItems": 400}},
    "regex": {"regex": r"([A-Z][a-z]{1,9} ){400}"},
}


def run(
    engine: Engine, prompts: list[list[int]], params: SamplingParams
) -> tuple[float, list[RequestOutput]]:
    """Seconds from the first new token of the last prompt on, and what came out."""
    ids = [engine.submit(prompt, params) for prompt in prompts]
    waiting, done = set(ids), {}
    start = time.perf_counter()
    while engine.has_unfinished():
        for output in engine.step():
            if output.request_id in waiting:
                waiting.remove(output.request_id)
                start = time.perf_counter()
            if output.finished:
                done[output.request_id] = output
    return time.perf_counter() - start, [done[i] for i in ids]


def compare(
    engine: Engine, name: str, prompts: list[list[int]], temperature: float, tokens: int, rounds: int
) -> dict[str, Any]:
    free = SamplingParams(
        max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=temperature, seed=1
    )
    bound = dataclasses.replace(free, **GRAMMARS[name])
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    first = None
    for i in range(rounds + 1):
        for way, params in (("off", free), ("on", bound)):
            spent, outputs = run(engine, prompts, params)
            assert all(len(o.token_ids) == tokens and o.error is None for o in outputs)
            seconds[way].append(spent)
            if way == "on":
                found = [(o.token_ids, o.logprobs) for o in outputs]
                first = first or found
                assert found == first, "the bits changed"
        if i == 0:  # certificates, caches, the lexer's states
            engine.certificates.settle()
    off, on = (times[1:] for times in seconds.values())
    count = (tokens - 1) * len(prompts)
    return {
        "grammar": name,
        "temperature": temperature,
        "requests": len(prompts),
        "new_tokens": tokens,
        "rounds": rounds,
        "off_tok_s": round(count / statistics.median(off), 1),
        "on_tok_s": round(count / statistics.median(on), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(off, on, strict=True)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", default="1,8")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    built = build_engine(arguments.model, speculate=None)
    prompts = [p.token_ids(built.tokenizer)[:64] for p in load_prompts()]
    machine = {"command": shlex.join(["python", *sys.argv]), **describe()}
    rows: list[dict[str, Any]] = []
    for requests in map(int, arguments.requests.split(",")):
        for name, temperature in (("json_schema", 0.0), ("json_schema", 0.8), ("regex", 0.8)):
            row = compare(
                built.engine, name, prompts[:requests], temperature, arguments.tokens, arguments.rounds
            )
            print(row, flush=True)
            rows.append(row | machine)
            if arguments.csv is not None:
                with arguments.csv.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()

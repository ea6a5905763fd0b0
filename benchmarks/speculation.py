"""Speculation against plain decoding, in turns on one engine: the same bits, and how many tokens a second.

python benchmarks/speculation.py --csv benchmarks/results/speculation.csv
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from llm42c.prompts import load_prompts
from llm42c.runtime.bench.machine import describe
from llm42c.runtime.engine import Engine
from llm42c.runtime.loader import BuiltEngine, build_engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams

CODE = """def area(shape):
    if shape.kind == "circle":
        return 3.14159 * shape.radius * shape.radius
    if shape.kind == "square":
        return shape.side * shape.side
    if shape.kind == "rectangle":
        return shape.width * shape.height
    raise ValueError(shape.kind)
"""
RECORDS = "\n".join(
    f'{{"id": {i}, "name": "{name}", "city": "{city}", "active": true}}'
    for i, (name, city) in enumerate(
        [("Ada", "London"), ("Emmy", "Erlangen"), ("Sofia", "Stockholm"), ("Mary", "Oxford")]
    )
)
NOTES = (
    "The lighthouse was built in 1871. Its lamp burned whale oil until 1902. The last keeper left in 1964. "
    "Today the tower is a museum, open from May to October."
)
REPETITIVE = {
    "edit": f"Rename the argument shape to figure and print the whole function.\n\n{CODE}\n\nAnswer:\n\n"
    + CODE.replace("shape", "figure").split('    if figure.kind == "square"')[0],
    "json": f"Print every record again with active set to false.\n\n{RECORDS}\n\nAnswer:\n\n"
    + RECORDS.replace("true", "false").split("\n")[0]
    + "\n",
    "quotes": f"Repeat the notes word by word, twice.\n\nNotes: {NOTES}\n\nNotes: {NOTES}\n\nNotes:",
    "table": "| n | square |\n|---|---|\n" + "".join(f"| {n} | {n * n} |\n" for n in range(1, 13)),
}


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams, **how: Any) -> tuple[float, Any]:
    """Seconds, and what came out."""
    start = time.perf_counter()
    ids = [engine.submit(p, params, stream=False, **how) for p in prompts]
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    seconds = time.perf_counter() - start
    return seconds, [(done[i].token_ids, done[i].logprobs) for i in ids]


def compare(
    built: BuiltEngine, name: str, prompts: list[list[int]], requests: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """One row: the same work with and without speculation, in turns."""
    engine = built.engine
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
    groups = [
        [prompts[(g + i) % len(prompts)] for i in range(requests)]
        for g in range(0, max(len(prompts), 1), requests)
    ]
    for how in (None, "auto"):  # certificates, caches, step times
        for group in groups:
            run(engine, group, params, speculate=how)
        engine.certificates.settle()
    plain: list[float] = []
    drafted: list[float] = []
    before = engine.stats().drafted_tokens, engine.stats().accepted_drafts
    differ = 0
    for _ in range(rounds):
        sums = [0.0, 0.0]
        for group in groups:
            a, expected = run(engine, group, params, speculate=None)
            b, found = run(engine, group, params, speculate="auto")
            sums[0] += a
            sums[1] += b
            differ += expected != found
        plain.append(sums[0])
        drafted.append(sums[1])
    count = tokens * requests * len(groups)
    stats = engine.stats()
    return {
        "work": name,
        "requests": requests,
        "new_tokens": tokens,
        "rounds": rounds,
        "plain_tok_s": round(count / statistics.median(plain), 1),
        "speculate_tok_s": round(count / statistics.median(drafted), 1),
        "ratio": round(statistics.median(p / d for p, d in zip(plain, drafted, strict=True)), 3),
        "differ": differ,
        "drafted_a_token": round((stats.drafted_tokens - before[0]) / (count * rounds), 3),
        "accepted_a_token": round((stats.accepted_drafts - before[1]) / (count * rounds), 3),
    }


def replays(built: BuiltEngine, prompt: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """One row: a completion decoded alone, and replayed from its receipt, in turns."""
    engine = built.variant(prefix_cache=False)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
    decoded: list[float] = []
    replayed: list[float] = []
    differ = 0
    for i in range(rounds + 1):
        start = time.perf_counter()
        engine.submit(prompt, params, stream=False, receipt=True)
        outputs: list[RequestOutput] = []
        while engine.has_unfinished():
            outputs += engine.step()
        decoded.append(time.perf_counter() - start)
        receipt = outputs[-1].receipt
        assert receipt is not None
        start = time.perf_counter()
        differ += engine.replay(receipt).verdict != "exact"
        replayed.append(time.perf_counter() - start)
        if i == 0:  # certificates of the shapes that were met
            engine.replay(receipt)
            engine.certificates.settle()
    decoded, replayed = decoded[1:], replayed[1:]
    return {
        "work": "replay",
        "requests": 1,
        "new_tokens": tokens,
        "rounds": rounds,
        "plain_tok_s": round(tokens / statistics.median(decoded), 1),
        "speculate_tok_s": round(tokens / statistics.median(replayed), 1),
        "ratio": round(statistics.median(d / r for d, r in zip(decoded, replayed, strict=True)), 3),
        "differ": differ,
        "drafted_a_token": 1.0,
        "accepted_a_token": 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prose", type=int, default=8, help="prompts of llm42c.prompts that are run")
    parser.add_argument("--replay", type=int, default=512, help="tokens that are replayed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", default="1,8,32")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    built = build_engine(arguments.model)
    repetitive = [built.tokenizer(text).input_ids for text in REPETITIVE.values()]
    prose = [p.token_ids(built.tokenizer) for p in load_prompts()[: arguments.prose]]
    machine = {"command": shlex.join(["python", *sys.argv]), **describe()}
    rows: list[dict[str, Any]] = []

    def take(row: dict[str, Any]) -> None:
        rows.append(row | machine)
        print(row, flush=True)
        if arguments.csv is not None:
            with arguments.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)

    for requests in map(int, arguments.requests.split(",")):
        for name, prompts in (("repetitive", repetitive), ("prose", prose)):
            take(compare(built, name, prompts, requests, arguments.tokens, arguments.rounds))
    take(replays(built, prose[0], arguments.replay, arguments.rounds))


if __name__ == "__main__":
    main()

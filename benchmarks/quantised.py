"""Decoding with quantised weights beside bf16: SmolLM2, engines taking turns in one process.

``python benchmarks/quantised.py`` writes ``benchmarks/results/quantised.csv``: output tokens a second of one
thread's own time, which other processes of the machine hardly change; with ``--threads N`` of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from linear_q import kernels

from llm42c.hub import models
from llm42c.hub.quantise import quantise
from llm42c.runtime.bench.contenders import LIMITS
from llm42c.runtime.bench.harness import write_csv
from llm42c.runtime.bench.machine import describe
from llm42c.runtime.bench.workloads import WORKLOADS
from llm42c.runtime.engine import Engine
from llm42c.runtime.loader import build_engine
from llm42c.runtime.sampling import SamplingParams

ROOT = Path(__file__).parents[1]


def rate(engine: Engine, prompts: list[list[int]], tokens: int, clock: Any) -> float:
    """Output tokens a second, prefill included."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = clock()
    engine.generate(prompts, [params] * len(prompts))
    return len(prompts) * tokens / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="q4_0,q8_0")
    parser.add_argument("--requests", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quantised.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    base, tokenizer = models.load_model("smollm2")
    sources: dict[str, Any] = {"bf16": "smollm2", "q4_1 (smollm2-q4)": "smollm2-q4"}
    folder = Path(tempfile.mkdtemp())
    for format in filter(None, args.formats.split(",")):
        models.write(folder / format, quantise(base, tokenizer, format)[0])
        sources[format] = folder / format
    engines = {
        n: build_engine(s, speculate=None, **LIMITS, kv_cache_bytes=96 << 20).engine
        for n, s in sources.items()
    }
    rows = []
    for count in map(int, args.requests.split(",")):
        prompts = WORKLOADS["decode"].prompts(count)
        for engine in engines.values():
            rate(engine, prompts, args.tokens, clock)
            engine.certificates.settle()
        found: dict[str, list[float]] = {name: [] for name in engines}
        for _ in range(args.rounds):
            for name, engine in engines.items():
                found[name].append(rate(engine, prompts, args.tokens, clock))
        for name, rates in found.items():
            over = statistics.median(a / b for a, b in zip(rates, found["bf16"], strict=True))
            row = {"weights": name, "requests": count, "new_tokens": args.tokens}
            rows.append(row | {"tok_s": round(statistics.median(rates), 1), "over_bf16": round(over, 2)})
            print(rows[-1], flush=True)
    clocked = "its own" if args.threads == 1 else "wall"
    command = f"python benchmarks/quantised.py --threads {args.threads} --rounds {args.rounds}"
    about = describe() | {"kernels": kernels(), "time": clocked}
    write_csv(args.out, rows, command=command, **about)


if __name__ == "__main__":
    main()

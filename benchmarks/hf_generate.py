"""What does a deterministic `generate` cost beside Hugging Face's own, and how long does wrapping take?

    python benchmarks/hf_generate.py [MODEL] [--batch 8] [--csv benchmarks/results/hf_generate.csv]

Two copies of one model take turns on the same padded batch: ``llm42`` is wrapped, ``hf eager`` is as it was
loaded. End-of-sequence is ignored. ``over_eager`` is the median over the rounds of the ratio of neighbours,
and ``differ`` counts the rows that have other tokens when they run alone, under stock's own terms: greedy
only, for it samples from one global generator. Before that, fresh processes load, wrap and generate one
token; the caches on disk are warm.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import llm42c
from llm42c.hub.models import load_model
from llm42c.runtime.bench import machine

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    "greedy, repetition_penalty": {"do_sample": False, "repetition_penalty": 1.1},
}
_START = """
import json, sys, time
start = time.perf_counter()
import torch, llm42c
from llm42c.hub.models import load_model
imported = time.perf_counter()
model, tokenizer = load_model(sys.argv[1])
loaded = time.perf_counter()
llm42c.deterministic(model)
wrapped = time.perf_counter()
model.generate(**tokenizer("The first token", return_tensors="pt"), max_new_tokens=1, do_sample=False)
token = time.perf_counter()
print(json.dumps({"import": imported - start, "load": loaded - imported, "wrap": wrapped - loaded,
                  "first token": token - wrapped, "wrap and first token": token - loaded}))
"""


@dataclass(frozen=True)
class Row:
    case: str
    engine: str
    batch: int
    new_tokens: int
    rounds: int
    median: float
    least: float
    most: float
    unit: str
    over_eager: float | str = ""
    differ: int | str = ""


def random_batch(size: int, vocabulary: int) -> dict[str, torch.Tensor]:
    """Prompts of 32 to 64 random tokens, padded on the left: input_ids and attention_mask [B, 64]."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(32, 64, size).round().int()
    ids = torch.randint(100, vocabulary, (size, 64), generator=generator)
    mask = (torch.arange(64) >= 64 - lengths.unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def decode(
    model: Any, batch: dict[str, torch.Tensor], new_tokens: int, way: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """New tokens [B, new_tokens] and seconds."""
    start = time.perf_counter()
    out = model.generate(**batch, **way, max_new_tokens=new_tokens, eos_token_id=None, pad_token_id=0)
    return out[:, batch["input_ids"].shape[1] :], time.perf_counter() - start


def differing(model: Any, batch: dict[str, torch.Tensor], together: torch.Tensor, way: dict[str, Any]) -> int:
    """Rows whose tokens change when they run alone, without padding."""
    changed = 0
    for i, expected in enumerate(together):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()].unsqueeze(0)
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        changed += not torch.equal(decode(model, alone, len(expected), way)[0][0], expected)
    return changed


def warm_up(model: Any, batch: dict[str, torch.Tensor], new_tokens: int, way: dict[str, Any]) -> None:
    """Whatever happens once: ours probes the batch shapes that this very batch meets."""
    if not hasattr(model, "llm42"):
        decode(model, batch, 2, way)
        return
    decode(model, batch, new_tokens, way)
    model.llm42.settle()


def throughput(models: dict[str, Any], size: int, new_tokens: int, rounds: int) -> Iterator[Row]:
    """Tokens per second of every model on every case, the models taking turns."""
    batch = random_batch(size, next(iter(models.values())).config.vocab_size)
    for case, way in CASES.items():
        for model in models.values():
            warm_up(model, batch, new_tokens, way)
        rates: dict[str, list[float]] = {name: [] for name in models}
        tokens = {}
        for turn in range(rounds):
            for name in list(models)[:: -1 if turn % 2 else 1]:
                tokens[name], seconds = decode(models[name], batch, new_tokens, way)
                rates[name].append(size * new_tokens / seconds)
        for name, model in models.items():
            ratios = [a / b for a, b in zip(rates[name], rates["hf eager"], strict=True)]
            yield Row(
                case,
                name,
                size,
                new_tokens,
                rounds,
                *summary(rates[name], 1),
                "tokens/s",
                round(statistics.median(ratios), 2),
                "" if way["do_sample"] else differing(model, batch, tokens[name], way),
            )


def starts(model: str, rounds: int) -> Iterator[Row]:
    """Seconds of the parts of a fresh process up to its first token; one unmeasured process goes before."""
    command = [sys.executable, "-c", _START, model]
    times = [
        json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(rounds + 1)
    ]
    for part in times[0]:
        yield Row(f"start: {part}", "llm42", 1, 1, rounds, *summary([t[part] for t in times[1:]], 2), "s")


def summary(values: list[float], digits: int) -> tuple[float, float, float]:
    middle = statistics.median(values)
    return round(middle, digits), round(min(values), digits), round(max(values), digits)


def show(row: Row) -> None:
    print(
        f"{row.case:28} {row.engine:9} {row.median:8} {row.unit:9} ({row.least} to {row.most})"
        f" {row.over_eager!s:>6} {row.differ!s:>3}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3, help="fresh processes; 0 leaves them out")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    args = parser.parse_args()

    rows = []
    print("medians (least to most); over eager; rows that differ alone")
    for row in starts(args.model, args.starts) if args.starts else ():
        rows.append(row)
        show(row)
    dtype = getattr(torch, args.dtype)
    models = {name: load_model(args.model, dtype)[0] for name in ("llm42", "hf eager")}
    llm42c.deterministic(models["llm42"])
    for row in throughput(models, args.batch, args.new_tokens, args.rounds):
        rows.append(row)
        show(row)
    if args.csv:
        facts = {"dtype": args.dtype, "command": shlex.join(["python", *sys.argv]), **machine.describe()}
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=[*asdict(rows[0]), *facts])
            writer.writeheader()
            writer.writerows(asdict(row) | facts for row in rows)


if __name__ == "__main__":
    main()

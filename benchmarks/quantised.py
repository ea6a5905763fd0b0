"""Decoding with quantised weights beside bf16: SmolLM2, engines taking turns in one process.

``python benchmarks/quantised.py`` writes ``benchmarks/results/quantised.csv``. ``gb_per_s`` is what one
request makes of memory: the bytes of all weights that a token reads, times tokens a second.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from llm42c.codegen.cpu import build
from llm42c.hub import models
from llm42c.hub.quantise import quantise
from llm42c.runtime.bench import harness
from llm42c.runtime.bench.contenders import LIMITS, Llm42
from llm42c.runtime.bench.machine import describe
from llm42c.runtime.loader import BuiltEngine, build_engine

ROOT = Path(__file__).parents[1]


def weight_bytes(built: BuiltEngine) -> int:
    """Of the packed weights; an embedding that is also the output layer counts once."""
    held = {id(p): p for p in built.model.parameters() if not built.compiler.weights.is_released(p)}
    linears = sum(p.nbytes for p in held.values() if p.dim() > 2)  # panels of quantised weights
    return linears or built.compiler.weights.nbytes


def isa() -> str:
    """The widest dot product of bytes that the kernels use here."""
    flags = set(build.cpu_features().split())
    return next((f for f in ("avx512_vnni", "avx512bw", "avx2") if f in flags), "portable")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", default="q4_0,q8_0")
    parser.add_argument("--requests", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quantised.csv")
    args = parser.parse_args()
    base, tokenizer = models.load_model("smollm2")
    sources: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp())
    for format in filter(None, args.formats.split(",")):
        models.write(folder / format, quantise(base, tokenizer, format)[0])
        sources[format] = folder / format
    sources = {"bf16": "smollm2", "q4_1 (smollm2-q4)": "smollm2-q4"} | sources
    built = {
        name: build_engine(source, **LIMITS, kv_cache_bytes=96 << 20) for name, source in sources.items()
    }
    contenders = [Llm42(f"llm42 {name}", made.engine, 100) for name, made in built.items()]
    size = {f"llm42 {name}": weight_bytes(made) for name, made in built.items()}
    rows = []
    for case in harness.cases(["decode"], [int(n) for n in args.requests.split(",")]):
        for result in harness.measure(contenders, case, args.rounds, lambda *_: None):
            row = result.as_row() | {"weights_mb": round(size[result.engine] / 1e6, 1), "gb_per_s": ""}
            if case.requests == 1:
                row["gb_per_s"] = round(size[result.engine] * result.median / 1e9, 1)
            rows.append(row)
            print(row, flush=True)
    command = f"python benchmarks/quantised.py --rounds {args.rounds}"
    harness.write_csv(args.out, rows, command=command, **describe() | {"kernels": isa()})


if __name__ == "__main__":
    main()

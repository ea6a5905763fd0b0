"""The engine on a GPU: throughput at several shares of deterministic requests, certified shapes, rollbacks.

    python benchmarks/gpu/engine.py [--model smollm2] [--out benchmarks/gpu/engine.csv] [--budget 420]

Writes one CSV whose rows are measurements, or say why one could not be made. ``--model random-1b`` and
``random-8b`` are Llamas of those sizes with random weights. Plain Inductor stands beside it as the decode of
one batch with ``torch.compile`` and a static cache.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch

SHARES = (0.0, 0.1, 0.5, 1.0)
REQUESTS, PROMPT, NEW = 32, 128, 64
RANDOM = {
    "random-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "random-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
}


def load(name: str) -> Any:
    """A model in bf16 on the GPU."""
    if name not in RANDOM:
        from llm42c import models

        return models.load_model(name, torch.bfloat16)[0].cuda()
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = RANDOM[name]
    heads = shape["hidden_size"] // shape["head_dim"]
    config = LlamaConfig(**shape, num_attention_heads=heads, num_key_value_heads=8, vocab_size=128256)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def serve(model: Any, share: float) -> dict[str, float]:
    """Tokens per second of a batch of which ``share`` is deterministic, and what verification did."""
    from llm42c.runtime.loader import build_engine
    from llm42c.runtime.sampling import SamplingParams

    engine = build_engine(model).engine
    g = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    prompts = [torch.randint(0, size, (PROMPT,), generator=g).tolist() for _ in range(REQUESTS)]
    params = SamplingParams(max_tokens=NEW, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        engine.submit(prompt, params, deterministic=i < share * REQUESTS)
    torch.cuda.synchronize()
    start = time.perf_counter()
    while engine.has_unfinished():
        engine.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    states = list(engine.certificates.status.values())
    certified = sum(s == "certified" for s in states) / max(1, len(states))
    return {"tokens_per_s": REQUESTS * NEW / seconds, "certified_share": certified}


def inductor(model: Any) -> dict[str, float]:
    """Tokens per second of one static batch under plain ``torch.compile``."""
    ids = torch.randint(0, model.config.vocab_size, (REQUESTS, PROMPT), device="cuda")
    options = {
        "max_new_tokens": NEW,
        "min_new_tokens": NEW,
        "do_sample": False,
        "cache_implementation": "static",
    }
    with torch.no_grad():
        model.generate(ids, **options)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, **options)
        torch.cuda.synchronize()
    return {"tokens_per_s": REQUESTS * NEW / (time.perf_counter() - start)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("engine.csv"))
    parser.add_argument("--budget", type=float, default=420.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured and no file was written")
        return 1
    end = time.monotonic() + options.budget
    rows: list[dict[str, object]] = []
    model = load(options.model)
    steps = [(f"llm42, {share:.0%} deterministic", lambda s=share: serve(model, s)) for share in SHARES]
    for what, call in [*steps, ("inductor, one static batch", lambda: inductor(model))]:
        head = {"gpu": torch.cuda.get_device_name(), "model": options.model, "what": what}
        try:
            found = call() if time.monotonic() < end else {"not run: the budget was spent": ""}
        except Exception as error:
            found = {f"not run: {type(error).__name__}: {str(error)[:160]}": ""}
        for name, value in found.items():
            rows.append({**head, "name": name, "value": value})
            print(f"{what:<32}{name} {value}", flush=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["gpu", "model", "what", "name", "value"])
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

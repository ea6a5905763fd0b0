"""The engine on a GPU: throughput at several shares of deterministic requests, beside plain Inductor.

    python benchmarks/gpu/engine.py [--models smollm2,random-1b] [--out benchmarks/gpu/engine.csv]
                                    [--budget 420] [--dry-run]

Writes one CSV whose rows are measurements, or say why one could not be made. For each model (``random-1b``
and ``random-8b`` are Llamas of those sizes with random weights): tokens per second of one set of requests, of
which 0, 10, 50 and 100 % are deterministic, with the model's own kernels and with Inductor's behind the same
engine (``stock``: what it computes is verified, and rolled back where it differs); the share of batch shapes
that are certified, of tokens committed without replay, rollbacks, CUDA graphs; deterministic requests whose
tokens are not those of their solo run (0 is right). Plain Inductor beside it: one static batch through
``generate`` with a static cache, and the same engine with Inductor's kernels and nothing verified. Every
contender runs once before it is measured. ``--dry-run`` runs the same code on the CPU with a tiny model, and
writes a file only if ``--out`` names one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Results, gpu_or_dry, machine, options_of

SHARES = (0, 10, 50, 100)
LLAMAS: dict[str, dict[str, Any]] = {
    "random-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "random-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128},
    "random-tiny": {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 64},
}


class Workload:
    """Prompts of random ids, and the limits that engines are made with."""

    def __init__(self, dry: bool) -> None:
        self.requests, self.prompt, self.new = (3, 5, 4) if dry else (32, 128, 128)
        self.limits: dict[str, Any] = {
            "max_num_seqs": self.requests,
            "max_num_batched_tokens": 8 if dry else 512,
            "max_model_len": 32 if dry else 1024,
            "kv_cache_bytes": 1 << 20 if dry else 8 << 30,
            "prefix_cache": False,
            "persist_certificates": False,
        }
        if dry:
            self.limits |= {"verify_tokens": 8, "verify_seqs": 4, "verify_window": 4}

    def prompts(self, vocab_size: int) -> list[list[int]]:
        g = torch.Generator().manual_seed(0)
        return torch.randint(0, vocab_size, (self.requests, self.prompt), generator=g).tolist()


def load(name: str, results: Results) -> Any:
    """A model on the device, in bf16 (fp32 on a dry run)."""
    dtype = torch.float32 if results.dry else torch.bfloat16
    if name not in LLAMAS:
        from llm42c.hub import models

        return models.load_model(name, dtype)[0].to(results.device)
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LLAMAS[name]
    heads = shape["hidden_size"] // shape["head_dim"]
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=min(8, heads),
        vocab_size=64 if results.dry else 128256,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    with results.device:
        return LlamaForCausalLM(config).to(dtype).eval()


def static_batch(results: Results, model: Any, load_: Workload) -> float:
    """Tokens per second of one batch through ``generate`` with a static cache, which Inductor compiles."""
    ids = torch.tensor(load_.prompts(model.config.vocab_size), device=results.device)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": load_.new,
        "min_new_tokens": load_.new,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": "static",
    }

    def once() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(ids, **options)
        out.tolist()  # waits
        return float(load_.requests * load_.new / (time.perf_counter() - start))

    once()
    return once()


def engines(results: Results, case: str, model: Any, load_: Workload) -> None:
    """The engine with the model's own kernels, then with Inductor's; both on one capture."""
    from llm42c.runtime.loader import build_engine

    start = time.perf_counter()
    pinned = build_engine(model, speculate=None, **load_.limits)
    results.add(case, "capture and compile", time.perf_counter() - start, "s")
    prompts = load_.prompts(model.config.vocab_size)
    solo = alone(pinned.engine, prompts[:4], load_.new)
    for percent in SHARES:
        serve(results, case, "llm42", pinned.variant(), percent, prompts, load_.new, solo)
    stock = build_engine(model, compiler=pinned.compiler, fast="stock", speculate=None, **load_.limits)
    for percent in (0, 10, 100):
        serve(results, case, "llm42, stock", stock.variant(), percent, prompts, load_.new, solo)
    pinned.close()


def alone(engine: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Each prompt by itself: what a deterministic request must answer in any company."""
    from llm42c.runtime.sampling import SamplingParams

    params = SamplingParams(max_tokens=new, ignore_eos=True)
    return [engine.generate([prompt], params)[0].token_ids for prompt in prompts]


def serve(
    results: Results,
    case: str,
    name: str,
    engine: Any,
    percent: int,
    prompts: list[list[int]],
    new: int,
    solo: list[list[int]],
) -> None:
    """One engine at one share; every number is a row."""
    from llm42c.runtime.bench.contenders import Llm42, spread

    what = f"{name}, {percent} %"
    if results.spent:
        results.not_run(case, what, "tokens/s", "the budget was spent")
        return
    contender = Llm42(what, engine, percent)
    try:
        contender.warm_up(prompts, new)
        before = engine.stats().as_dict()
        sample = contender.run(prompts, new)
    except Exception as error:
        results.not_run(case, what, "tokens/s", error)
        return
    results.add(case, what, sample.rate, "tokens/s")
    after = engine.stats().as_dict()
    gained = {n: after[n] - before[n] for n in before if isinstance(before[n], (int, float))}
    states = list(engine.certificates.status.values())
    certified = sum(s == "certified" for s in states) / max(1, len(states))
    results.add(case, f"{what}: shapes certified", certified, "1", f"of {len(states)}")
    committed = gained["certified_tokens"] + gained["verified_tokens"]
    share = gained["certified_tokens"] / max(1, committed)
    results.add(case, f"{what}: tokens without replay", share, "1", f"of {committed}")
    for count in ("rollbacks", "recomputed_tokens", "graph_replays", "graph_misses"):
        results.add(case, f"{what}: {count.replace('_', ' ')}", gained[count], "1")
    results.add(case, f"{what}: graphs", after["graph_captures"], "1")
    overhead = 1e6 * gained["seconds_overhead"] / max(1, gained["steps"])
    results.add(case, f"{what}: Python", overhead, "us/step")
    wrong = sum(
        spread(i, percent) and tokens != solo[i] for i, tokens in enumerate(sample.tokens[: len(solo)])
    )
    checked = sum(spread(i, percent) for i in range(len(solo)))
    results.add(case, f"{what}: differ from solo", wrong, "1", f"of {checked} requests")


def main() -> int:
    default = Path(__file__).with_name("engine.csv")
    parser = options_of(__doc__, default)
    parser.add_argument("--models", default="smollm2,random-1b")
    options = parser.parse_args()
    if not gpu_or_dry(options, default):
        return 1
    results = Results(options.budget, options.dry_run)
    machine(results)
    load_, status = Workload(options.dry_run), 0
    for name in ["random-tiny"] if options.dry_run else options.models.split(","):
        try:
            model = load(name, results)
            # First, because an engine takes the weights out of the model.
            results.attempt(
                name, "plain Inductor, one static batch", "tokens/s",
                lambda m=model: static_batch(results, m, load_),
            )  # fmt: skip
            torch._dynamo.reset()
            engines(results, name, model, load_)
        except Exception as error:
            results.not_run(name, "stopped", "", error)
            status = 1
        results.write(options.out)
        model = None
        results.free()
    return status


if __name__ == "__main__":
    sys.exit(main())

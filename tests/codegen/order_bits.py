"""Every operator of the CPU on inputs that are exact on every machine, as digests of its results.

As a program, ``python order_bits.py ISA`` prints them as JSON for the kernels of one instruction set.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, WIDTH, OUT = 7, 577, 100


class Numbers:
    """Values in [-scale, scale) without a library's random numbers, whose bits hang on the machine."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._next = 0

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        count = torch.Size(shape).numel()
        i = torch.arange(self._next, self._next + count)
        self._next += count
        mixed = (i * 2654435761 + 12345) % 2**32
        mixed = (mixed ^ (mixed >> 15)) * 2246822519 % 2**32
        mixed = (mixed ^ (mixed >> 13)) % 2**23
        return ((mixed.double() / 2**22 - 1) * scale).to(self._dtype).view(shape)


def _products(r: Numbers) -> dict[str, list[Tensor]]:
    ops = torch.ops.llm42
    x, w, bias, residual = r(ROWS, WIDTH), r(OUT, WIDTH), r(OUT), r(ROWS, OUT)
    packed, experts = ops.linear_pack(w), r(3, OUT, WIDTH)
    group = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    return {
        "linear": [ops.linear(x, packed, bias, OUT), ops.linear(x[:1], packed, None, OUT)],
        "linear_dense": [ops.linear_dense(x, w, bias)],
        "linear_add": [ops.linear_add(x, packed, None, residual, OUT)],
        "linear_silu_mul": [ops.linear_silu_mul(x, packed, OUT // 2)],
        "grouped_linear": [ops.grouped_linear(x, experts, r(3, OUT), group, False)],
        "grouped_outer": [ops.grouped_outer(x, residual, group, 3)],
    }


def _rows(r: Numbers) -> dict[str, list[Tensor]]:
    ops = torch.ops.llm42
    x, residual, weight, bias = r(ROWS, WIDTH), r(ROWS, WIDTH), r(WIDTH), r(WIDTH)
    return {
        "rms_norm": [ops.rms_norm(x, weight, 1e-5, 0.0, True), ops.rms_norm(x, weight, 1e-2, 1.0, False)],
        "add_rms_norm": [*ops.add_rms_norm(x, residual, weight, 1e-5, 0.0, True)],
        "layer_norm": [ops.layer_norm(x, weight, bias, 1e-5)],
        "silu_mul": [ops.silu_mul(r(ROWS, 2 * WIDTH, scale=9.0))],
        "rotary": [ops.rotary(r(ROWS, 9, 64), r(ROWS, 64), r(ROWS, 64))],
        "row_sum": [ops.row_sum(x, [-1], True), ops.row_sum(x, [], False)],
        "row_softmax": [ops.row_softmax(r(ROWS, WIDTH, scale=9.0))],
        "row_log_softmax": [ops.row_log_softmax(r(ROWS, WIDTH, scale=9.0))],
        "running_sum": [ops.running_sum(x, 1)],
        "running_product": [ops.running_product(1 + x / 8, 1)],
        "index_add": [ops.index_add(x, 0, torch.tensor([1, 1, 1, 0]), residual[:4])],
    }


def _attention(r: Numbers) -> dict[str, list[Tensor]]:
    """One sequence of 300 positions over pages in descending order; all of it, then one decode."""
    ops, heads, kv_heads, dim, page, length = torch.ops.llm42, 6, 2, 40, 16, 300
    pages = -(-length // page)
    q, k, v = (r(length, h, dim, scale=2.0) for h in (heads, kv_heads, kv_heads))
    table = torch.arange(pages - 1, -1, -1, dtype=torch.int32)[None]
    place = torch.arange(length)
    slots = table[0, place // page].long() * page + place % page
    results: dict[str, list[Tensor]] = {"paged_attention": [], "pod_attention": []}
    for window, softcap, sinks in ((0, 0.0, None), (40, 2.0, r(heads).float())):
        for name, more in (("paged_attention", ()), ("pod_attention", (False, 1))):
            caches = q.new_zeros(pages, kv_heads, dim, page), q.new_zeros(pages, kv_heads, page, dim)
            for rows in (slice(0, length - 1), slice(length - 1, length)):
                lengths = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
                seen = torch.tensor([rows.stop], dtype=torch.int32)
                batch = (slots[rows], lengths, seen, table, 0.15, window, softcap, sinks, *more)
                results[name].append(getattr(ops, name)(q[rows], k[rows], v[rows], *caches, *batch))
    dense = [x.transpose(0, 1)[None] for x in (q, k, v)]
    results["dense_attention"] = [ops.dense_attention(*dense, None, 0.15, True, 0, 0.0)]
    return results


def _choice(r: Numbers) -> dict[str, list[Tensor]]:
    ops, vocab = torch.ops.llm42, 3001
    logits = r(ROWS, vocab, scale=9.0)
    params = (
        torch.tensor([0.0, 1.0, 0.7, 1.3, 1.0, 0.9, 1.2]),
        torch.tensor([0, 0, 5, 0, 0, 40, 100], dtype=torch.int32),
        torch.tensor([1.0, 1.0, 1.0, 0.9, 1.0, 0.8, 0.9]),
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.01]),
    )
    draws = [
        ops.sample(logits, *params, torch.arange(ROWS) + 2**40 * run, torch.arange(ROWS) * 7 + run)
        for run in range(20)
    ]
    return {
        "sample": [x for draw in draws for x in draw],
        "token_logprobs": [ops.token_logprobs(logits, torch.arange(ROWS) * 400)],
        "top_logprobs": [*ops.top_logprobs(logits, 9)],
    }


def digests() -> dict[str, str]:
    """``operator order/version`` → digest over all dtypes."""
    found: dict[str, hashlib._Hash] = {}
    groups: list[Callable[[Numbers], dict[str, list[Tensor]]]] = [_products, _rows, _attention, _choice]
    for dtype in DTYPES:
        for group in groups:
            for name, results in group(Numbers(dtype)).items():
                order = registry.operators()[name].orders["cpu"]
                hasher = found.setdefault(f"{name} {order}", hashlib.sha256())
                for result in results:
                    hasher.update(result.reshape(-1).view(torch.uint8).numpy().tobytes())
    return {name: hasher.hexdigest()[:32] for name, hasher in sorted(found.items())}


if __name__ == "__main__":
    registry.define()
    build.load_library(sys.argv[1])
    json.dump(digests(), sys.stdout, indent=1)
    print()

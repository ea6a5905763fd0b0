"""Attention over other layouts of keys, and dense calls, in the interpreter; prints one JSON object."""

from __future__ import annotations

import json
from typing import Any

import torch
from interpreted import bound, digest, launch, spec_for
from paged_world import Heads, Runner, World
from torch import Tensor

from llm42c.codegen.ops import dense_attention as dense_operator
from llm42c.codegen.ops import varlen_attention as varlen
from llm42c.codegen.triton import attention, dense_attention
from llm42c.codegen.triton.cost import Choice

EPS = torch.finfo(torch.float32).eps


def varlen_case(heads: Heads, page: int) -> dict[str, Any]:
    """The same keys in caches, in a pool of pages of tokens and in packed rows: errors, and bits."""
    lengths, rows = [50, 30, 3], [3, 30, 3]
    world = World.make(lengths, heads)
    runner = Runner(world, page=page)
    before = runner.arguments([(0, 47)])
    attention.write_kv(spec_for(heads, page), before[1], before[2], runner.k_cache, runner.v_cache, before[5])
    paged = runner.arguments(list(enumerate(rows)), padding=2)
    cached = launch(paged, spec_for(heads, page), Choice("persistent", 1, 1, 2, ""))
    attention.write_kv(spec_for(heads, page), paged[1], paged[2], runner.k_cache, runner.v_cache, paged[5])
    q, cu, lens, table, *options = paged[0], *paged[6:]
    k = runner.k_cache.permute(0, 3, 1, 2).contiguous()
    v = runner.v_cache.transpose(1, 2).contiguous()
    packed = [torch.cat(x) for x in (world.k, world.v)]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    calls = {
        "pool": (q, k, v, cu, lens, None, table.clamp(min=0), *options),
        "rows": (q, *packed, cu, lens, starts, None, *options),
    }
    out: dict[str, Any] = {"bound": bound(paged, heads), "digests": [digest(cached)], "errors": []}
    for layout, call in calls.items():
        clean = [x.nan_to_num() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call]
        want = varlen.varlen_attention.reference(*clean)
        spec = spec_for(heads, page, layout=layout)
        scale, _, softcap, sinks = options
        for scheduler, programs in (("persistent", 2), ("tickets", 0)):
            spec = spec_for(heads, page, layout=layout, scheduler=scheduler)
            plan = attention.make_plan(spec, len(q), cu, lens, 64)
            order = torch.arange(programs or plan.items_at_most() * heads.kv, dtype=torch.int32) % 3
            where = starts if layout == "rows" else call[6]
            choice = Choice(scheduler, 1, 2, programs, "")
            got = attention.attend(
                spec,
                plan,
                choice,
                q,
                call[1],
                call[2],
                cu,
                lens,
                where,
                scale,
                softcap,
                sinks,
                sm_order=order,
            )
            out["digests"].append(digest(got))
            out["errors"].append(float((got.double() - want)[: sum(rows)].abs().max()))
    other = launch(paged, spec_for(heads, page, split=16), Choice("persistent", 1, 1, 2, ""))
    return {**out, "control": digest(other)}


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g)


def dense_bound(q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    products = float(q.abs().amax() * k.nan_to_num().abs().amax()) * q.shape[3] * scale
    return (2 * (q.shape[3] + 8) * products + 100) * EPS * float(v.nan_to_num().abs().amax())


def dense() -> dict[str, Any]:
    """Padding on the left, hidden NaN, other batches."""
    g = torch.Generator().manual_seed(3)
    q, k, v = randn(g, 2, 4, 20, 64), randn(g, 2, 2, 20, 64), randn(g, 2, 2, 20, 64)
    shown = torch.ones(20, 20, dtype=torch.bool).tril().expand(2, 1, 20, 20)
    whole = dense_attention.dense_attention(q, k, v, shown, 0.125, False, 0, 0.0)
    # Seven more keys and queries on the left, which nobody sees; their keys and values are NaN.
    nothing = torch.full((2, 2, 7, 64), torch.nan)
    wide = [torch.cat([nothing[:, :1].expand(2, 4, 7, 64).nan_to_num(), q], 2)]
    wide += [torch.cat([nothing, x], 2) for x in (k, v)]
    mask = torch.zeros(2, 1, 27, 27, dtype=torch.bool)
    mask[:, :, 7:, 7:] = shown
    padded = dense_attention.dense_attention(*wide, mask, 0.125, False, 0, 0.0)[:, :, 7:]
    as_float = torch.zeros(2, 1, 27, 27).masked_fill(~mask, -torch.inf)
    added = dense_attention.dense_attention(*wide, as_float, 0.125, False, 0, 0.0)[:, :, 7:]
    want = dense_operator.dense_attention.reference(q, k, v, shown, 0.125, False, 0, 0.0)
    alone = dense_attention.dense_attention(
        q[1:, :, 5:9], k[1:], v[1:], shown[1:, :, 5:9], 0.125, False, 0, 0.0
    )
    shifted = mask.clone()
    shifted[:, :, 7:, 6] = True
    finite = [x.nan_to_num() for x in wide]
    moved = dense_attention.dense_attention(*finite, shifted, 0.125, False, 0, 0.0)[:, :, 7:]
    return {
        "error": float((whole.double() - want).abs().max()),
        "bound": dense_bound(q, k, v, 0.125),
        "padded": digest(padded) == digest(whole) == digest(added),
        "alone": digest(alone[0]) == digest(whole[1, :, 5:9]),
        "control": digest(moved) != digest(whole),
    }


if __name__ == "__main__":
    cases = [
        varlen_case(Heads(q=4, kv=2, dim=64, dtype=torch.float32), 16),
        varlen_case(Heads(q=6, kv=2, dim=80, dtype=torch.float16, window=20, sinks=True, softcap=3.0), 32),
    ]
    print(json.dumps({"varlen": cases, "dense": dense()}))

"""Attention and the other operators under Triton's interpreter.

``TRITON_INTERPRET`` is read at import, so tests run this in a process of its own; it prints one JSON object:

python interpreted.py attention|operators
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from typing import Any

import numpy as np
import torch
from paged_world import Heads, Runner, World
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from llm42c.codegen.ops import paged_attention as paged
from llm42c.codegen.ops import registry
from llm42c.codegen.ops.sample import gumbel, keep_mask
from llm42c.codegen.triton import attention, dense_attention, linear, norm, packing, rotary, sample, silu_mul
from llm42c.codegen.triton.cost import Choice
from llm42c.codegen.triton.spec import AttentionSpec, default_spec

SMS = 3


def one_order_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> TensorHandle:
    """A product of independent rows; BLAS gives a row other bits at another place in the tile."""
    left, right = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
    product = np.einsum("mk,kn->mn", left, right, optimize=False)
    return TensorHandle(product + d.data, d.dtype.scalar)


InterpreterBuilder.create_dot = one_order_dot


def spec_for(heads: Heads, page: int, **changes: Any) -> AttentionSpec:
    """Tiles small enough that a few dozen keys make several blocks, splits and tiles."""
    base = default_spec(
        attention.device_of(torch.device("cpu")),
        heads=heads.q, kv_heads=heads.kv, head_dim=heads.dim, page=page,
        dtype=str(heads.dtype).removeprefix("torch."), window=heads.window,
        softcap=heads.softcap > 0, sinks=heads.sinks, layout=changes.get("layout", "cache"),
    )  # fmt: skip
    small = {"sm": "table", "sms": SMS, "rows": 16, "keys": 16, "split": 32}
    return dataclasses.replace(base, **{**small, **changes})


def launch(
    args: list[Any], spec: AttentionSpec, choice: Choice, shuffle: int = 0, room: int | None = None
) -> Tensor:
    """One call on copies of the caches; ``shuffle`` permutes the work list and who is on which SM."""
    q, k, v, k_cache, v_cache, slots, cu, lens, table, scale, _, softcap, sinks = args
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    attention.write_kv(spec, k, v, k_cache, v_cache, slots)
    plan = attention.make_plan(spec, len(q), cu, lens, table.shape[1] * spec.page, room)
    programs = choice.programs or plan.items_at_most() * spec.kv_heads
    order = torch.arange(programs, dtype=torch.int32) % SMS
    if shuffle:
        g = torch.Generator().manual_seed(shuffle)
        prefills, decodes = plan.counts.tolist()
        for begin, n in ((0, prefills), (plan.decode_base, decodes)):
            plan.items[begin : begin + n] = plan.items[begin : begin + n][torch.randperm(n, generator=g)]
        order = torch.randint(0, SMS, (programs,), generator=g).int()
    out = attention.attend(
        spec, plan, choice, q, k_cache, v_cache, cu, lens, table, scale, softcap, sinks, sm_order=order
    )
    assert not attention.counters_of(q.device).any(), "the counters were not reset"
    return out


def bound(args: list[Any], heads: Heads) -> float:
    """n·eps bounds: an error d of a score changes weights by a factor e^d; then sums of n products."""
    q, k, v = (x.float().nan_to_num() for x in args[:3])  # padding rows are poison
    scale, _, softcap, _ = args[-4:]
    eps = torch.finfo(torch.float32).eps
    products = float(q.abs().amax() * k.abs().amax()) * heads.dim * scale
    score = (heads.dim + 8) * eps * products + (4 * eps * softcap)
    storage = torch.finfo(heads.dtype).eps
    rounded = 0.0 if heads.dtype == torch.float32 else 2 * storage  # of weights, and of the result
    largest = 4.0 * float(v.abs().amax())  # keys of earlier calls come from the same distribution
    return largest * (2 * score + 200 * eps + rounded)


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def run_attention() -> dict[str, Any]:
    heads = Heads(q=4, kv=2, dim=64, dtype=torch.float32)
    world = World.make([50, 30, 3], heads)
    runner = Runner(world, page=16)
    runner.arguments([(0, 47)])
    _, k, v, _, _, slots, *_ = Runner(world, page=16).arguments([(0, 47)])
    attention.write_kv(spec_for(heads, 16), k, v, runner.k_cache, runner.v_cache, slots)
    hybrid = runner.arguments([(0, 3), (1, 30), (2, 3)], padding=2)
    expected = paged.paged_attention.reference(*[x.clone() if isinstance(x, Tensor) else x for x in hybrid])
    variants = [
        ("tickets", True, 1, 1, 0, 0), ("tickets", True, 1, 3, 0, 7), ("persistent", True, 1, 1, 2, 5),
        ("persistent", True, 3, 1, 4, 0), ("partition", True, 1, 2, 3, 11),
        ("persistent", False, 1, 1, 2, 0), ("tickets", False, 2, 1, 0, 3),
    ]  # fmt: skip
    out: dict[str, Any] = {"bound": bound(hybrid, heads), "variants": [], "prefills_and_decodes": []}
    for scheduler, uniform, p, d, programs, shuffle in variants:
        spec = spec_for(heads, 16, scheduler=scheduler, uniform=uniform)
        got = launch(hybrid, spec, Choice(scheduler, p, d, programs, ""), shuffle)
        error = float((got.double() - expected).abs().max())
        out["variants"].append({"uniform": uniform, "digest": digest(got), "error": error})
    plan = attention.make_plan(spec_for(heads, 16), len(hybrid[0]), *hybrid[6:8], hybrid[8].shape[1] * 16)
    out["prefills_and_decodes"] = plan.counts.tolist()
    whole = launch(hybrid, spec_for(heads, 16), Choice("persistent", 1, 1, 2, ""))
    # The same rows in the other role: sequence 0 in one prefill of all its tokens.
    alone = Runner(world.only(0), page=16).arguments([(0, 50)])
    again = launch(alone, spec_for(heads, 16), Choice("persistent", 1, 1, 1, ""))
    out["same_row_in_other_role"] = digest(again[47:50]) == digest(whole[:3])
    few = launch(hybrid, spec_for(heads, 16), Choice("persistent", 1, 1, 2, ""), room=1)
    out["without_room_for_splits"] = digest(few) == digest(whole)
    other = launch(hybrid, spec_for(heads, 16, split=64), Choice("persistent", 1, 1, 2, ""))
    out["another_split_changes_bits"] = digest(other) != digest(whole)
    out["padding_is_zero"] = not bool(whole[36:].any())
    return {**out, "features": [features(i) for i in range(3)]}


def features(case: int) -> dict[str, float]:
    """Soft-cap, sinks, windows, odd groups and head sizes, large pages, fp16; the interpreter has no bf16."""
    heads, page = [
        (Heads(q=6, kv=2, dim=80, dtype=torch.float16, window=20, sinks=True), 64),
        (Heads(q=2, kv=2, dim=96, dtype=torch.float16, softcap=3.0), 256),
        (Heads(q=5, kv=1, dim=64, dtype=torch.float32, window=9, softcap=2.0, sinks=True), 32),
    ][case]
    args = Runner(World.make([37, 2], heads), page=page).arguments([(0, 37), (1, 2)])
    expected = paged.paged_attention.reference(*[x.clone() if isinstance(x, Tensor) else x for x in args])
    got = launch(args, spec_for(heads, page), Choice("persistent", 1, 1, 2, ""))
    return {"error": float((got.double() - expected).abs().max()), "bound": bound(args, heads)}


def run_operators() -> dict[str, Any]:
    """Errors over their bounds, by operator; anything above 1 is wrong."""
    registry.define()
    ops, g = registry.operators(), torch.Generator().manual_seed(0)
    eps = torch.finfo(torch.float32).eps

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    ratios: dict[str, float] = {}
    x, w, b = randn(3, 70), randn(50, 70), randn(50)
    expected = ops["linear_dense"].reference(x, w, b)
    limit = 72 * eps * (x.abs().double() @ w.abs().double().T + b.abs().double())
    packed = packing.linear_pack(w)
    for name, got in (("dense", linear.linear_dense(x, w, b)), ("packed", linear.linear(x, packed, b, 50))):
        ratios[f"linear_{name}"] = float(((got.double() - expected).abs() / limit).max())
    ratios["unpack"] = 0.0 if torch.equal(packing.linear_unpack(packed, 50, 70), w) else 2.0
    ratios["linear_alone"] = (
        0.0 if torch.equal(linear.linear_dense(x[1:2], w, b)[0], linear.linear_dense(x, w, b)[1]) else 2.0
    )
    x, r, w = randn(2, 100), randn(2, 100), randn(100)
    for cast_first in (True, False):
        got, total = norm.add_rms_norm(x, r, w, 1e-5, 0.5, cast_first)
        want, want_total = ops["add_rms_norm"].reference(x, r, w, 1e-5, 0.5, cast_first)
        ratios[f"norm_{cast_first}"] = float(((got - want).abs() / (110 * eps * want.abs() + eps)).max())
        ratios["norm_total"] = 0.0 if torch.equal(total, want_total) else 2.0
    want = ops["layer_norm"].reference(x, w, w, 1e-5)
    ratios["layer_norm"] = float(
        ((norm.layer_norm(x, w, w, 1e-5) - want).abs() / (220 * eps * (want.abs() + 4 * w.abs()))).max()
    )
    want = ops["silu_mul"].reference(x)
    ratios["silu_mul"] = float(
        ((silu_mul.silu_mul(x) - want).abs() / (8 * eps * want.abs() + eps * eps)).max()
    )
    x = randn(2, 3, 64).half()
    cos, sin = randn(2, 48).half(), randn(2, 48).half()
    ratios["rotary"] = (
        0.0 if torch.equal(rotary.rotary(x, cos, sin), ops["rotary"].reference(x, cos, sin)) else 2.0
    )
    q, k, v = randn(1, 4, 9, 64), randn(1, 2, 20, 64), randn(1, 2, 20, 64)
    for name, mask in (
        ("none", None),
        ("bool", torch.rand(1, 1, 9, 20, generator=g) > 0.3),
        ("float", randn(1, 4, 9, 20)),
    ):
        options = (0.125, name == "none", 5 if name == "bool" else 0, 3.0 if name == "float" else 0.0)
        want = ops["dense_attention"].reference(q, k, v, mask, *options)
        error = (dense_attention.dense_attention(q, k, v, mask, *options).double() - want).abs().max()
        products = float(q.abs().amax() * k.abs().amax()) * 64 * 0.125
        ratios[f"dense_{name}"] = float(error / ((2 * 72 * products + 100) * eps * float(v.abs().amax())))
    return {"ratios": ratios, "sample": run_sample(g)}


def run_sample(g: torch.Generator) -> dict[str, Any]:
    """Tokens against the specification, unless two scores are within rounding of each other."""
    logits = torch.randn(7, 200, generator=g) * 3
    logits[6, 3] = float("nan")
    columns = [
        torch.tensor([0.0, 1.0, 0.7, 1.0, 1.3, 1.0, 1.0]),
        torch.tensor([0, 0, 10, 0, 20, 0, 0], dtype=torch.int32),
        torch.tensor([1, 1, 1, 0.8, 0.9, 1.0, 1.0]),
        torch.tensor([0, 0, 0, 0, 0, 0.05, 0.0]),
        torch.arange(7) * 12345678901,
        torch.arange(7) + 2**33,
    ]
    token, logprob = sample.sample(logits, *columns)
    want: list[int] = []
    for r in range(6):
        row, t = logits[r].double(), float(columns[0][r])
        score = row
        if t > 0:
            keep = keep_mask(row, t, int(columns[1][r]), float(columns[2][r]), float(columns[3][r]))
            noise = gumbel(int(columns[4][r]), int(columns[5][r]), 200)
            score = ((row - row.max()) / t + noise).masked_fill(~keep, -torch.inf)
        want.append(int(score.argmax()))
    errors = [abs(float(logprob[r]) - float(logits[r].double().log_softmax(0)[want[r]])) for r in range(6)]
    return {
        "token": token.tolist(),
        "want": [*want, -1],
        "error": max(errors),
        "nan": bool(logprob[6].isnan()),
    }


if __name__ == "__main__":
    print(json.dumps({"attention": run_attention, "operators": run_operators}[sys.argv[1]]()))

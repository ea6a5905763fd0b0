"""What a call costs, as an expression in the number of tokens.

``n`` is the number of tokens of a half (or of all), ``s`` how many tokens stand in front of it. Rates come
from a ``Target``; an expression holds numbers, so it can be printed and computed again by hand.

    product of [n * m, K] and [K, N]    max(waves * time of a tile, bytes of the weight and rows / bandwidth)
                                        waves = ceil(ceil(n * m / tile_m) * ceil(N / tile_n) / units);
                                        on a CPU the sum of both
    attention                           4 * Hq * D * n * (s + n / 2) / flops     (s + n with an explicit mask)
    a collective that is one call       latency + bytes of the message / link, while nothing else runs
    everything else                     bytes of the result / bandwidth
    each call                           + call_seconds

``units`` are what runs tiles at the same time: the SMs of a GPU, 1 on a CPU, where a product is not cut into
waves (tiles of 1). That a half may need as many waves as the whole is what makes some splits bad. A GPU reads
the next tile while it multiplies; a CPU's library first copies the weight into the layout that it multiplies
from, which two halves of a few dozen tokens pay twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from llm42c.codegen.device import Device
from llm42c.codegen.operator import Tokens
from llm42c.passes import graph as g
from llm42c.passes.traits import tokens_of
from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.attention import is_attention
from llm42c.passes.weave.rules import is_heavy
from llm42c.passes.weave.split import HALF_SIZES

N = sympy.Symbol("n", positive=True, integer=True)
_LEAST = min(HALF_SIZES)  # sizes from here on count tokens
BEFORE = sympy.Symbol("s", nonnegative=True, integer=True)


@dataclass(frozen=True)
class Rates:
    """The numbers of a target that costs need, in SI units.

    ``flops`` are of all units together; ``latency`` and ``link`` of one collective of the group. ``taken`` is
    the share of the processor that a collective under way takes from computing: copying and adding are work
    too, 0 only where the network does them.
    """

    flops: float
    bandwidth: float
    latency: float
    link: float
    call: float
    units: int
    tile_m: int
    tile_n: int
    taken: float = 0.0

    @classmethod
    def of(cls, target: Device) -> Rates:
        """Raises UnknownDeviceError where a rate is neither known nor measured."""
        tiled = "sms" in target.values  # products are cut into tiles, which run at the same time
        return cls(
            flops=target.get("bf16_flops" if tiled else "fp32_flops"),
            bandwidth=target.get("memory_bandwidth"),
            latency=target.get("link_latency"),
            link=target.get("link_bandwidth"),
            call=target.get("call_seconds", 2e-6 if tiled else 1e-5),
            units=target.count("sms") if tiled else 1,
            tile_m=target.count("tile_m", 128 if tiled else 1),
            tile_n=target.count("tile_n", 128 if tiled else 1),
            taken=target.get("link_processor_share", 0.0),
        )


def tokens_in(t: Tensor, tokens: int) -> float:
    """Elements of a tensor for one token; 0 if it does not depend on tokens.

    What has the tokens in two dimensions, such as a mask, is small beside the attention that reads it, and
    not counted.
    """
    dims = [size for size in t.shape if size >= _LEAST]
    return t.numel() / tokens if len(dims) == 1 and dims[0] % tokens == 0 else 0.0


def call_cost(node: fx.Node, tokens: int, rates: Rates) -> sympy.Expr:
    """Seconds of one call in whose values the prime ``tokens`` stands for n."""
    if is_attention(node):
        return _attention(node, rates) + rates.call
    if comm.returns_when_done(node):  # in the undivided graph: the processor waits for it
        return transfer_cost(node, tokens, rates) + rates.call
    value = g.value(node)
    values = [v for v in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(v, Tensor)]
    if not values:
        return sympy.Integer(0)
    if is_heavy(node):
        return _product(node, values[0], tokens, rates) + rates.call
    storages = {g.storage_of(n) for n in node.all_input_nodes}
    fresh = [v for v in values if g.storage(v) not in storages]
    moved = sum(tokens_in(v, tokens) * v.element_size() for v in fresh)
    return moved * N / rates.bandwidth + (rates.call if fresh else 0)


def _product(node: fx.Node, out: Tensor, tokens: int, rates: Rates) -> sympy.Expr:
    ours, added = g.ours(node), tokens_of(g.called(node)) is Tokens.ADDED_PRODUCT
    arguments: Any = fx.node.map_arg(node.args, g.value)
    a, b = arguments[added : added + 2]
    k, columns = int(a.shape[-1]), int(out.shape[-1])
    if ours is not None:  # a fused product has more columns than its result
        columns = int(ours.cost(arguments, out).flops) // (2 * a.numel())
    weights = [w for w in tree_leaves(b) if not tokens_in(w, tokens)]  # a quantised product has several
    if columns % tokens == 0 or k % tokens == 0:
        return 2.0 * out.numel() / tokens * k * N / rates.flops
    rows = tokens_in(out, tokens) / int(out.shape[-1])
    tiles = sympy.ceiling(N * _number(rows) / rates.tile_m) * math.ceil(columns / rates.tile_n)
    waves = sympy.ceiling(tiles / rates.units) if rates.units > 1 else tiles
    tile = 2.0 * rates.tile_m * rates.tile_n * k / (rates.flops / rates.units)
    weight = float(sum(w.nbytes for w in weights))
    activations = rows * (k + columns) * out.element_size()
    reading = (weight + activations * N) / rates.bandwidth
    return sympy.Max(waves * tile, reading) if rates.units > 1 else waves * tile + reading


def _number(x: float) -> sympy.Expr:
    return sympy.Integer(int(x)) if x == int(x) else sympy.Rational(x)


def _attention(node: fx.Node, rates: Rates) -> sympy.Expr:
    """Every row against the keys in front of it; with an explicit mask all keys are multiplied."""
    names = g.bind(node)
    q = g.fake(names.get("query", names.get("q")))
    heads, dim = (q.shape[-2], q.shape[-1]) if q.dim() == 3 else (q.shape[1], q.shape[-1])
    mask = names.get("attn_mask", names.get("attn_bias", names.get("mask")))
    pairs = N * (BEFORE + (N if g.tensor(mask) is not None else N / 2))
    return 4.0 * int(heads) * int(dim) * pairs / rates.flops


def transfer_cost(start: fx.Node, tokens: int, rates: Rates) -> sympy.Expr:
    """Seconds of one collective: latency + bytes / bandwidth."""
    per_token = comm.bytes_per_row(start, tokens)
    return rates.latency + per_token * N / rates.link


def rounded(expression: sympy.Expr) -> str:
    """The expression with microseconds in three digits, for reading."""
    within = expression.replace(sympy.Max, lambda *args: sympy.Max(*(a * 10**6 for a in args)) / 10**6)
    micro = sympy.expand(within * 10**6, deep=False)
    return str(micro.xreplace({f: sympy.Float(f, 3) for f in micro.atoms(sympy.Float)}))

"""Attention that a model writes out: masks are evaluated, biases become keys, the rest is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from llm42c.codegen.ops import registry
from llm42c.passes import graph as g
from llm42c.passes.attention_written import NotProvenError, PackedBatch, attention_written
from llm42c.passes.base import Context, PassReport
from llm42c.passes.cleanup import erase_dead_code
from llm42c.passes.normalize import normalize
from llm42c.passes.token_functions import TokenFunctions, left_over, recover_positions

registry.load()

HEADS, DIM, LIMIT, PAGE = 4, 16, 80, 16
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def minimum(t: Tensor) -> float:
    return torch.finfo(torch.bfloat16).min


def tril(q: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(DIM)


def with_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.where(tril(q), scores(q, k), minimum(q))
    return torch.softmax(s, -1, dtype=torch.float32).to(v.dtype) @ v


def with_addition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[-2], q.shape[-2]).masked_fill(~tril(q), minimum(q))
    return torch.softmax(scores(q, k) + mask, -1).to(v.dtype) @ v


def with_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.arange(q.shape[-2])
    near = (rows[:, None] - rows) < 5
    return torch.softmax(scores(q, k).masked_fill(~(tril(q) & near), minimum(q)), -1).to(v.dtype) @ v


def with_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, tril(q))


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch dimension, and the scores of one ``baddbmm``."""
    q, k, v = (x[0] for x in (q, k, v))
    s = torch.baddbmm(
        torch.zeros(1, 1, 1, dtype=q.dtype), q, k.transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(DIM)
    )
    s = s.view(1, HEADS, q.shape[1], -1).masked_fill(~tril(q), minimum(q))
    return torch.bmm(torch.softmax(s, -1).to(v.dtype).view(HEADS, q.shape[1], -1), v)[None]


def slopes() -> Tensor:
    return 0.7 ** torch.arange(1.0, HEADS + 1)


def with_alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = slopes()[:, None, None] * (torch.arange(q.shape[-2]) - (q.shape[-2] - 1))
    return torch.softmax((scores(q, k) + bias).masked_fill(~tril(q), minimum(q)), -1).to(v.dtype) @ v


def with_alibi_in_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = slopes()[:, None, None] * torch.arange(q.shape[-2])
    return torch.softmax(scores(q, k) + bias.masked_fill(~tril(q), minimum(q)), -1).to(v.dtype) @ v


def with_a_factor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = tril(q).to(q.dtype)
    return torch.softmax(scores(q, k) * seen - 1e4 * (1 - seen), -1).to(v.dtype) @ v


PLAIN = (with_where, with_addition, with_window, with_sdpa, with_a_factor, folded)
SEEN: dict[str, Attend] = {f.__name__: f for f in (*PLAIN, with_alibi, with_alibi_in_the_mask)}


class Layer(nn.Module):
    """q, k, v [1, H, T, D] through ``attend``, on the tensors of a packed batch."""

    def __init__(self, attend: Attend, caches: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.attend, self.caches = attend, caches

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, slots: Tensor, *rest: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        y = self.attend(q, k, v)
        return y, [t.view_as(t) for t in (positions, slots, *rest, *self.caches)]


def rewritten(attend: Attend, dtype: torch.dtype, width: int) -> Callable[..., Tensor]:
    """``attend`` on packed batches: f(q, k, v [1, H, T, D], lengths of the sequences) → [1, H, T, D]."""
    caches = (
        torch.zeros(9, HEADS, width, PAGE, dtype=dtype),
        torch.zeros(9, HEADS, PAGE, width, dtype=dtype),
    )
    caught: list[tuple[fx.GraphModule, list[Any]]] = []

    def grab(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        caught.append((gm, inputs))
        return gm.forward

    def batch(tokens: int, sequences: int) -> list[Tensor]:
        return [
            torch.arange(tokens)[None],
            torch.full((tokens,), -1),
            torch.tensor([0, tokens], dtype=torch.int32),
            torch.tensor([tokens], dtype=torch.int32),
            torch.zeros(sequences, 7, dtype=torch.int32),
        ]

    tensors = [torch.randn(1, HEADS, 23, DIM, dtype=dtype) for _ in range(3)]
    packed = batch(23, 1)
    for t, dim in (*((t, 2) for t in tensors), (packed[0], 1), (packed[1], 0)):
        torch._dynamo.mark_dynamic(t, dim)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(Layer(attend, caches), backend=grab, fullgraph=True)(*tensors, *packed)
    gm, inputs = caught[0]
    order = {id(t): i for i, t in enumerate((*tensors, *packed, *caches))}
    place = [order.get(id(t), -1) for t in inputs]
    sizes = [size for size in inputs if isinstance(size, torch.SymInt)]
    assert all(bool(size == sizes[0]) for size in sizes)  # one symbol for the one number of tokens
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    by_place = dict(zip(place, nodes, strict=True))
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((output.args[0][0],),)
    normalize(gm.graph, Context(), PassReport("normalize"))
    erase_dead_code(gm.graph)
    size = g.fake(by_place[3]).shape[-1]
    values = TokenFunctions(gm.graph, size, by_place[3])
    packed_batch = PackedBatch(
        by_place[3], [by_place[8]], [by_place[9]], tuple(by_place[i] for i in range(4, 8))
    )
    attention_written(gm.graph, values, packed_batch, LIMIT, PassReport("attention_written"))
    erase_dead_code(gm.graph)
    recover_positions(values)
    assert left_over(values) is None
    gm.graph.lint()
    gm.recompile()

    def call(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        total = sum(lengths)
        ends = torch.tensor([0, *lengths]).cumsum(0)
        table = torch.zeros(len(lengths), 7, dtype=torch.int32)
        slots, free = [], 0
        for s, n in enumerate(lengths):
            pages = -(-n // PAGE)
            table[s, :pages] = torch.arange(free, free + pages)
            slots += [free * PAGE + i for i in range(n)]
            free += pages
        given = [
            q, k, v,
            torch.cat([torch.arange(n) for n in lengths])[None],
            torch.tensor(slots),
            ends.int(),
            torch.tensor(lengths, dtype=torch.int32),
            table,
            *caches,
        ]  # fmt: skip
        with torch.no_grad():
            (y,) = gm(*[given[p] if p >= 0 else total for p in place])
        return y  # type: ignore[no-any-return]

    return call


def qkv(tokens: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, HEADS, tokens, DIM, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_each_sequence(name: str, dtype: torch.dtype) -> None:
    """Three sequences in one batch, each within rounding of the function on it alone in fp64."""
    attend, lengths = SEEN[name], [20, 1, 33]
    call = rewritten(attend, dtype, DIM + (8 if "alibi" in name else 0))
    q, k, v = qkv(sum(lengths), dtype)
    y = call(q, k, v, lengths)
    eps = torch.finfo(dtype).eps
    for begin, n in zip([0, 20, 21], lengths, strict=True):
        mine = [x[:, :, begin : begin + n] for x in (q, k, v)]
        exact = attend(*(x.double() for x in mine))
        # Scores of at most |q||k| / sqrt(D) + |slope| n, rounded in chains of D + 8; the result to dtype.
        largest = mine[0].norm(dim=-1).amax() * mine[1].norm(dim=-1).amax() / math.sqrt(DIM) + n
        bound = (2 * (DIM + 8 + n) * largest * 2.0**-23 + eps) * mine[2].double().abs().amax()
        assert (y[:, :, begin : begin + n].double() - exact).abs().max() <= bound
        # A row does not depend on what is packed with it.
        alone = call(*mine, [n])
        assert torch.equal(y[:, :, begin : begin + n], alone)


def test_the_bias_matters() -> None:
    """Negative control of the above: without slopes the result is another one."""
    q, k, v = qkv(20, torch.float32)
    assert (with_alibi(q, k, v) - with_where(q, k, v)).abs().max() > 0.05


def anticausal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k).masked_fill(tril(q).T.logical_not(), minimum(q)), -1).to(v.dtype) @ v


def bidirectional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores(q, k), -1).to(v.dtype) @ v


def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.arange(q.shape[-2]) // 64
    seen = tril(q) & (rows[:, None] == rows)
    return torch.softmax(scores(q, k).masked_fill(~seen, minimum(q)), -1).to(v.dtype) @ v


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = tril(q) | (torch.arange(q.shape[-2]) < 3)
    return torch.softmax(scores(q, k).masked_fill(~seen, minimum(q)), -1).to(v.dtype) @ v


def of_the_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (
        torch.softmax(scores(q, k).masked_fill(~(tril(q) & (q[..., :1] > -9)), minimum(q)), -1).to(v.dtype)
        @ v
    )


def quadratic_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.arange(q.shape[-2])
    bias = -0.01 * (rows[:, None] - rows) ** 2
    return torch.softmax((scores(q, k) + bias).masked_fill(~tril(q), minimum(q)), -1).to(v.dtype) @ v


def weighted_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = 1.0 / (1 + torch.arange(q.shape[-2]))
    return torch.softmax((scores(q, k) * weights).masked_fill(~tril(q), minimum(q)), -1).to(v.dtype) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.softmax(scores(q, k).masked_fill(~tril(q), minimum(q)), -1)
    return (s * torch.sigmoid(s)).to(v.dtype) @ v


REFUSED: dict[Attend, str] = {
    anticausal: "neither causal nor a sliding window",
    bidirectional: "neither causal nor a sliding window",
    chunked: "neither causal nor a sliding window",
    prefix: "neither causal nor a sliding window",
    of_the_tokens: "masked_fill, which llm42 does not know",
    quadratic_bias: "not linear in the position",
    weighted_scores: "something else than a mask of ones and zeros",
    gated: "something else with its probabilities",
}


@pytest.mark.parametrize("attend", REFUSED, ids=lambda f: f.__name__)
def test_what_is_not_proven_is_refused(attend: Attend) -> None:
    with pytest.raises(NotProvenError, match=REFUSED[attend]) as caught:
        rewritten(attend, torch.float32, DIM)
    assert "\n" not in str(caught.value)


def positions_of_its_own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    counted = torch.ones(1, q.shape[-2], dtype=torch.int64).cumsum(-1) + 2
    return with_where(q, k, v) * counted[:, None, :, None]


def table_from_the_beginning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return with_where(q, k, v) * torch.arange(96.0).sin()[: q.shape[-2], None]


def test_counts_of_tokens_become_positions() -> None:
    call = rewritten(positions_of_its_own, torch.float32, DIM)
    q, k, v = qkv(9, torch.float32)
    parts = [x[:, :, 5:] for x in (q, k, v)]
    assert torch.equal(call(q, k, v, [5, 4])[:, :, 5:], call(*parts, [4]))
    assert not torch.equal(call(q, k, v, [9])[:, :, 5:], call(*parts, [4]))


def test_a_table_read_from_the_beginning_is_found() -> None:
    with pytest.raises(AssertionError):
        rewritten(table_from_the_beginning, torch.float32, DIM)

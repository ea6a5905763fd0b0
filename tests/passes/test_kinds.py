"""What a call does to the order of arithmetic: by name, arguments, dtype; what nobody placed is unplaced."""

from __future__ import annotations

import operator

import pytest
import torch
from graphs import capture
from torch import fx

from llm42c.passes import kinds
from llm42c.passes.check import unplaced
from llm42c.passes.kinds import Kind, kind

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
AT = torch.tensor([0, 2, 2, 1])
N = torch.arange(24).view(4, 6)

CALLS = {
    Kind.REDUCTION: {
        "index_add": lambda x: x.index_add(0, AT, x),
        "index_add_": lambda x: x.sin().index_add_(0, AT, x),
        "index_put_": lambda x: x.sin().index_put_((AT,), x, accumulate=True),
        "index_put": lambda x: torch.index_put(x, (AT,), x, True),
        "put_": lambda x: x.sin().put_(AT, x[:, 0], accumulate=True),
        "scatter_add_": lambda x: x.sin().scatter_add_(0, AT[:, None], x),
        "scatter_add": lambda x: torch.scatter_add(x, 0, AT[:, None], x),
        "scatter_ that adds": lambda x: x.sin().scatter_(0, AT[:, None], x, reduce="add"),
        "scatter_reduce": lambda x: x.scatter_reduce(0, AT[:, None], x, "sum"),
        "scatter_reduce_": lambda x: x.sin().scatter_reduce_(0, AT[:, None], x, reduce="mean"),
        "index_reduce_": lambda x: x.sin().index_reduce_(0, AT, x, "prod"),
        "cumsum": lambda x: x.cumsum(-1),
        "cumsum_": lambda x: x.sin().cumsum_(-1),
        "cumprod": lambda x: torch.cumprod(x, -1),
        "logcumsumexp": lambda x: torch.logcumsumexp(x, -1),
        "histc": lambda x: torch.histc(x),
        "conv1d": lambda x: torch.nn.functional.conv1d(x[None], x.T[:, :, None]),
        "einsum": lambda x: torch.einsum("ab,ac->bc", x, x),
        "inner": lambda x: torch.inner(x, x),
        "batch_norm": lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
        "prod": lambda x: x.prod(-1),
        "out": lambda x: torch.sum(x, -1, out=torch.empty(4)),
        "aten": lambda x: torch.ops.aten.sum.dim_IntList(x, [-1]),
        "aten packet": lambda x: torch.ops.aten.mean(x, [-1]),
        "embedding that norms": lambda x: torch.nn.functional.embedding(AT, x, max_norm=1.0),
    },
    Kind.TIES: {
        "sorted indices": lambda x: x.sort(-1).indices,
        "sort": lambda x: x.sort(-1),
        "argsort": lambda x: torch.argsort(x),
        "kthvalue": lambda x: x.kthvalue(2),
        "median": lambda x: x.median(-1).indices,
        "mode": lambda x: x.mode(-1),
    },
    Kind.EXACT_REDUCTION: {
        "values of a sort": lambda x: x.sort(-1).values,
        "topk on a CPU": lambda x: x.topk(2).indices,
        "stable sort": lambda x: torch.sort(x, stable=True, dim=-1),
        "stable argsort": lambda x: x.argsort(stable=True),
        "median of all": lambda x: x.median(),
        "argmax": lambda x: x.argmax(-1),  # documented: the first
        "max": lambda x: x.max(-1),
        "sum of integers": lambda x: N.sum(-1),
        "cumsum of integers": lambda x: N.cumsum(-1),
        "index_add of integers": lambda x: N.index_add(0, AT, N),
        "scatter of maxima": lambda x: x.scatter_reduce(0, AT[:, None], x, "amax"),
    },
    Kind.MOVE: {
        "scatter": lambda x: x.scatter(0, AT[:, None], x),
        "index_put_": lambda x: x.sin().index_put_((AT,), x),
        "index_copy_": lambda x: x.sin().index_copy_(0, AT, x),
        "embedding": lambda x: torch.nn.functional.embedding(AT, x),
    },
    Kind.EXACT: {
        "add_": lambda x: x.sin().add_(1),
        "iadd": lambda x: operator.iadd(x.sin(), 1),
        "aten add": lambda x: torch.ops.aten.add.Tensor(x, x),
        "clamp_min_": lambda x: x.sin().clamp_min_(0),
        "power of integers": lambda x: torch.pow(N, 3),
    },
    Kind.TRANSCENDENTAL: {
        "exp_": lambda x: x.mul(2).exp_(),
        "aten tanh": lambda x: torch.ops.aten.tanh.default(x),
        "power": lambda x: torch.pow(x, 3.5),
    },
}
CASES = [(k, name) for k, calls in CALLS.items() for name in calls]


@pytest.mark.parametrize(("expected", "name"), CASES, ids=[f"{k.name}-{name}" for k, name in CASES])
def test_calls(expected, name):
    gm = capture(CALLS[expected][name], X)
    calls = [n for n in gm.graph.nodes if n.op.startswith("call")]
    found = [kind(n) for n in calls]
    assert expected in found
    bad = {Kind.TIES, Kind.REDUCTION, Kind.UNKNOWN} - {expected}
    assert not bad & set(found)
    assert bool(unplaced(gm.graph)) == (expected in kinds.UNPLACED)


def test_counts_and_weighted_counts():
    """A count of integers is exact, a sum of their weights is not."""
    graph = fx.Graph()
    where, weights = graph.placeholder("where"), graph.placeholder("weights")
    where.meta["example_value"], weights.meta["example_value"] = AT, X[:, 0]
    counts = graph.call_function(torch.bincount, (where,))
    sums = graph.call_function(torch.bincount, (where, weights))
    counts.meta["example_value"], sums.meta["example_value"] = torch.bincount(AT), torch.bincount(AT, X[:, 0])
    assert kind(counts) is Kind.EXACT_REDUCTION
    assert kind(sums) is Kind.REDUCTION


def test_a_topk_elsewhere_needs_an_order():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(4, 6, device="meta")
    node = graph.call_function(torch.topk, (x, 2))
    node.meta["example_value"] = (x.meta["example_value"], x.meta["example_value"])
    graph.call_function(operator.getitem, (node, 1))
    assert kind(node) is Kind.TIES
    assert len(unplaced(graph)) == 1

"""What a call does to the order of arithmetic: by name, arguments, dtype; what nobody placed is unplaced."""

from __future__ import annotations

import operator
import re

import pytest
import torch
from graphs import capture
from torch import fx

from llm42c.passes import kinds
from llm42c.passes.check import unplaced
from llm42c.passes.kinds import Kind, kind, kind_of_name

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


ATEN = sorted({s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("aten::")})
PLACED = (Kind.VIEW, Kind.MOVE, Kind.EXACT, Kind.TRANSCENDENTAL)
# Parts of the names of operators that bring several elements together.
GATHERS = re.compile(
    r"sum|mean|norm|softmax|softmin|prod|conv|mm$|mm_|matmul|dot|pool|loss|var\b|std|trap|einsum|linear|attention|"
    r"bincount|hist|fft|rnn|gru|lstm|_add$|scatter_reduce|index_reduce|^cum|topk|sort|kthvalue|median|mode|quantile|"
    r"dist|trace|cov|corr|bag|det$|inverse|cholesky|svd|eig|solve|interp|upsample|grid_sampl|renorm|segment|bilinear"
)
# Names that only look like it.
POINTWISE = {"logaddexp", "logaddexp2", "searchsorted"}


def _tags(name: str) -> set[torch.Tag]:
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    overloads = packet.overloads() if hasattr(packet, "overloads") else ()
    return {tag for overload in overloads for tag in getattr(packet, overload).tags}


def test_no_operator_that_reduces_is_placed_as_one_that_does_not():
    """By torch's tags and by name; everything in neither list, such as next year's, is unplaced."""
    assert len(ATEN) > 1000
    reducing = [name for name in ATEN if torch.Tag.reduction in _tags(name)]
    assert len(reducing) > 15
    wrong = [name for name in reducing if kind_of_name(name) in PLACED]
    named = [name.removeprefix("aten::") for name in ATEN]
    wrong += [n for n in named if GATHERS.search(n) and kind_of_name(n) in PLACED and n not in POINTWISE]
    assert not wrong
    allowed = {Kind.REDUCTION, Kind.EXACT_REDUCTION, Kind.TIES, Kind.UNKNOWN}
    assert {kind_of_name(name) for name in reducing} <= allowed
    exact = {n.removeprefix("aten::") for n in ATEN if kind_of_name(n) is Kind.EXACT_REDUCTION}
    assert exact <= kinds._EXACT_REDUCTION | {f"{n}_" for n in kinds._EXACT_REDUCTION}


def test_what_nobody_placed_is_unplaced():
    unknown = [name for name in ATEN if kind_of_name(name) is Kind.UNKNOWN]
    assert {"aten::gru", "aten::upsample_bilinear2d", "aten::native_layer_norm"} <= set(unknown)
    library = torch.library.Library("llm42_test_kinds", "DEF")
    for name in ("sum", "abs", "view"):
        library.define(f"{name}(Tensor x) -> Tensor", tags=(torch.Tag.reduction,))
        graph = fx.Graph()
        x = graph.placeholder("x")
        x.meta["example_value"] = X
        packet = getattr(torch.ops.llm42_test_kinds, name)
        for target in (packet, packet.default):
            node = graph.call_function(target, (x,))
            node.meta["example_value"] = X
            assert kind(node) is Kind.UNKNOWN
        assert len(unplaced(graph)) == 2


POSITIVE = torch.rand(4, 6, generator=torch.Generator().manual_seed(7)) * 0.8 + 0.1
INDEX = torch.tensor([[0, 2, 1, 3, 2, 0]] * 4)
# Calls to try, with the tensor whose elements are followed in the first place.
ATTEMPTS = [
    (), (POSITIVE,), (0,), (2,), (1.5,), (0, 1), (-1, 0), (0, 0, 2), ((1, 0),), ((6, 4),), ((4, 6, 1),),
    (2, 0),
    (POSITIVE, POSITIVE), (0.1, 0.9), (POSITIVE > 0.5, 0.0), (0, INDEX), (0, INDEX[0, :4] % 4),
    (INDEX % 4, 0), (torch.float32,), ((2, 2),), (0, (4, 1)), ((4, 6), (6, 1)), (0, 2, 1),
    (0, INDEX[0, :3], POSITIVE[:3]), (0, INDEX, POSITIVE), ((INDEX[0] % 4,), 1.0), (POSITIVE > 0.5, POSITIVE),
    (POSITIVE[0], 0, 1), (0, INDEX[0, :2], 1.0),
]  # fmt: skip
AS_LIST = [
    "cat",
    "concat",
    "concatenate",
    "stack",
    "hstack",
    "vstack",
    "dstack",
    "column_stack",
    "block_diag",
]
BY_DESIGN = {"diff": 2, "glu": 2}  # a difference or a product of two elements


def _function(name):
    for space in (torch, torch.nn.functional, torch.special, torch.Tensor):
        if hasattr(space, name) and callable(getattr(space, name)):
            return getattr(space, name)
    return None


def _results(fn, name, x, args):
    out = fn([x, POSITIVE], *args) if name in AS_LIST else fn(x, *args)
    parts = list(out) if isinstance(out, (tuple, list)) else [out]
    if not parts or not all(isinstance(p, torch.Tensor) for p in parts):
        raise TypeError(name)
    return torch.cat([p.detach().double().flatten() for p in parts])


def _sources(name):
    """The most elements of its first argument that an element of a result hangs on, if it can be tried."""
    fn = _function(name)
    if fn is None:
        return None
    for args in ATTEMPTS:
        try:
            plain = _results(fn, name, POSITIVE.clone(), args).nan_to_num(7.0)
        except (TypeError, RuntimeError, ValueError, IndexError, AttributeError):
            continue
        if not plain.numel() or torch.equal(plain, plain.round()):
            continue
        counts = torch.zeros(plain.numel())
        for i in range(POSITIVE.numel()):
            x = POSITIVE.clone()
            x.view(-1)[i] += 0.037
            counts += _results(fn, name, x, args).nan_to_num(7.0) != plain
        return int(counts.max())
    return None


def test_functions_that_are_placed_as_pointwise_read_one_element():
    made = {"empty", "empty_like", "new_empty"}  # of whatever was there
    names = sorted((kinds._VIEW | kinds._MOVE | kinds._EXACT | kinds._TRANSCENDENTAL) - made)
    found = {name: count for name in names if (count := _sources(name)) is not None}
    assert {n: c for n, c in found.items() if c > BY_DESIGN.get(n, 1)} == {}
    assert len(found) > 120  # the rest has no function of its name, or needs other arguments
    # Controls: the same count sees sums.
    assert _sources("cumsum") > 1
    assert _sources("softmax") > 1
    assert _sources("matmul") is None or _sources("matmul") > 1

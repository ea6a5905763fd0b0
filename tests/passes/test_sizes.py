"""Primes for sizes: what can be read back is; what cannot keeps its symbols; a size written down is found."""

from __future__ import annotations

import pytest
import torch
from graphs import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from llm42c.passes import graph as g
from llm42c.passes import pipeline, sizes
from llm42c.passes.base import PACKED, Context

T, R = sizes.PRIMES[:2]
SMALL = st.integers(-sizes._OFFSET + 1, sizes._OFFSET - 1)
FACTOR = st.integers(1, 500)


@given(st.integers(1, 100), st.integers(-4096, 4096))
def test_multiples_of_a_size_and_a_little_are_read(a, b):
    assert sizes._symbolic_size(a * T + b, {T: 7, R: 5}) == a * 7 + b
    assert sizes._symbolic_size(a * R + b, {T: 7, R: 5}) == a * 5 + b


@given(st.integers(1, 1_000_000), SMALL)
def test_a_size_is_read_as_what_it_is_or_not_at_all(a, b):
    """A large multiple of one prime may come close to one of another."""
    try:
        read = sizes._symbolic_size(a * T + b, {T: 7, R: 5})
    except ValueError:
        assert a > 100
    else:
        assert read == a * 7 + b


@given(st.integers(1, 20), st.integers(-100, 100))
def test_products_of_sizes_are_read(a, b):
    """As many columns as rows, and flattened: a T · T, T · (a R + b)."""
    assert sizes._symbolic_size(a * T * T, {T: 7, R: 5}) == a * 49
    assert sizes._symbolic_size(T * (a * R + b), {T: 7, R: 5}) == 7 * (a * 5 + b)


def test_a_size_that_mixes_symbols_is_refused():
    with pytest.raises(ValueError, match="no multiple"):
        sizes._symbolic_size(T + R, {T: 7, R: 5})


def graph_with(argument, **kwargs):
    graph = fx.Graph()
    node = graph.call_function(torch.add, (graph.placeholder("x"), argument), kwargs)
    graph.output(node)
    return graph, node


@settings(max_examples=300)
@given(
    st.sampled_from(sizes.PRIMES),
    FACTOR,
    SMALL,
    st.sampled_from(["number", "float", "list", "slice", "kwarg"]),
)
def test_a_size_that_was_written_down_is_found(prime, a, b, where):
    size = a * prime + b
    argument = {
        "number": size,
        "float": float(size),
        "list": [1, -size],
        "slice": slice(None, size),
        "kwarg": 1,
    }
    graph, node = graph_with(argument[where], **({"alpha": size} if where == "kwarg" else {}))
    assert sizes.baked(graph) == [node]


def test_a_product_of_sizes_that_was_written_down_is_found():
    for size in (T * T, T * R, 3 * T * R, T * (2 * R + 1) + 3):
        graph, node = graph_with(size)
        assert sizes.baked(graph) == [node]


@settings(max_examples=300)
@given(st.integers(-sizes._CONSTANTS + 1, sizes._CONSTANTS - 1))
def test_constants_of_models_are_no_sizes(n):
    for constant in (n, float(n), slice(0, n), True, 0.5, float("inf"), -1e30, 2**31 - 1, 2**32, 2**63 - 1):
        graph, _ = graph_with(constant)
        assert not sizes.baked(graph)


X = torch.randn(12, 6, generator=torch.Generator().manual_seed(3))
AFFINE = {
    "T": lambda x: x.exp(),
    "2 T": lambda x: torch.cat([x, x]),
    "T + 1": lambda x: torch.cat([x, x[:1]]),
    "T - 1": lambda x: x[1:],
    "2 T + 3": lambda x: torch.cat([x, x, x[:3]]),
    "3 (T - 2)": lambda x: torch.cat([x[2:], x[2:], x[:-2]]),
    "T T": lambda x: (x @ x.T).flatten(),
    "6 T": lambda x: x.flatten(),
}
REFUSED = {
    "T // 2": lambda x: x[: x.shape[0] // 2],
    "T // 2 as a number": lambda x: x[:1] * (x.shape[0] // 2),
    "T % 5": lambda x: x[: x.shape[0] % 5 + 1],
    "rounded up": lambda x: torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % 8)),
    "the smaller": lambda x: x[: torch.sym_min(x.shape[0], 7)],
    "strided": lambda x: x[::3],
}


def shapes(gm, read=lambda v: v):
    return [(n.name, str(tuple(read(g.value(n)).shape))) for n in gm.graph.nodes if g.tensor(n) is not None]


@pytest.mark.parametrize("name", AFFINE)
def test_affine_sizes_round_trip(name):
    gm = capture(AFFINE[name], X, dynamic=True)
    before = shapes(gm)
    assert sizes.concretise(gm) is None
    symbols = gm.meta[sizes.SYMBOLS]
    mode = torch._subclasses.FakeTensorMode(shape_env=next(iter(symbols.values())).node.shape_env)
    assert shapes(gm, lambda v: sizes.symbolic(v, symbols, mode)) == before


@pytest.mark.parametrize("name", REFUSED)
def test_other_sizes_keep_their_symbols(name):
    gm = capture(REFUSED[name], X, dynamic=True)
    before = shapes(gm)
    why = sizes.concretise(gm)
    assert why is not None
    assert "no multiple of one size plus a constant" in why
    assert sizes.SYMBOLS not in gm.meta
    assert shapes(gm) == before


@pytest.mark.parametrize("name", REFUSED)
def test_a_packed_graph_with_other_sizes_is_right_for_every_size(name):
    """Control: with sizes taken as they are at the primes, ``T // 2`` becomes a number and rows are lost."""
    fn = REFUSED[name]
    gm = capture(fn, X, dynamic=True)
    report = pipeline.run(gm, Context(target=PACKED))
    assert "sizes stay symbolic" in report.table()
    assert "no multiple" in " ".join(report.notes)
    for rows in (9, 12, 13, 40):
        x = torch.randn(rows, 6)
        sizes_of = {len(X): rows, X.shape[1]: X.shape[1]}
        inputs = [x if isinstance(i, torch.Tensor) else sizes_of[int(i)] for i in gm.meta["inputs"]]
        assert torch.equal(gm(*inputs)[0], fn(x))


def test_usual_graphs_have_no_notes():
    gm = capture(AFFINE["T + 1"], X, dynamic=True)
    assert not pipeline.run(gm, Context(target=PACKED)).notes
    still = capture(AFFINE["T + 1"], X)
    assert not pipeline.run(still, Context(target=PACKED)).notes
    assert sizes.concretise(capture(AFFINE["T"], X)) == sizes.NO_SYMBOLS


def test_more_symbols_than_primes():
    inputs = [torch.randn(n) for n in (3, 5, 7, 11, 13)]
    gm = capture(lambda *parts: torch.cat(parts), *inputs, dynamic=True)
    assert sizes.concretise(gm) == "5 symbolic sizes, of which 4 can be followed"


def test_symbols_that_are_added_to_each_other_stay():
    gm = capture(lambda x, y: torch.cat([x, y]), torch.randn(3), torch.randn(5), dynamic=True)
    assert "no multiple of one size" in str(sizes.concretise(gm))


def test_what_depends_on_data_stays():
    def fn(x):
        return x.repeat_interleave(x.shape[0], 0)

    gm = capture(fn, X, dynamic=True)
    nodes = [n for n in gm.graph.nodes if n.op == "call_method"]
    nodes[0].target = "no_such_method"
    assert "has no value at large sizes" in str(sizes.concretise(gm))

"""Rows added at indices: in the order of the rows, in place or not."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits

from llm42c.passes.base import Context
from llm42c.passes.check import unplaced
from llm42c.passes.index_add import index_add

G = torch.Generator().manual_seed(5)
X, SOURCE = torch.randn(6, 10, generator=G), torch.randn(40, 10, generator=G)
INDEX = torch.randint(6, (40,), generator=G)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, i, s: torch.index_add(x, 0, i, s),
        lambda x, i, s: x.index_add(0, i, s),
        lambda x, i, s: (x * 1.5).mul(1 / 1.5).index_add_(0, i, s),
        lambda x, i, s: torch.zeros_like(x).copy_(x).index_add_(dim=0, index=i, source=s),
    ],
)
def test_sums_at_indices(fn, dtype):
    x, source = X.to(dtype), SOURCE.to(dtype)
    gm = capture(fn, x, INDEX, source)
    report = apply(gm, index_add)
    assert (len(report.matches), report.misses) == (1, [])
    assert not unplaced(gm.graph)
    start = fn(x, INDEX[:0], source[:0])
    assert same_bits(run(gm), torch.ops.llm42.index_add(start, 0, INDEX, source))


def test_a_write_is_seen_by_what_follows():
    def fn(x, i, s):
        y = x.sin()
        view = y[2:]
        y.index_add_(0, i, s)
        return view * 2, y

    gm = capture(fn, X, INDEX, SOURCE)
    assert len(apply(gm, index_add).matches) == 1
    want = torch.ops.llm42.index_add(X.sin(), 0, INDEX, SOURCE)
    view, whole = run(gm)
    assert same_bits(whole, want)
    assert same_bits(view, want[2:] * 2)


def test_what_is_left_alone():
    gm = capture(lambda x, i, s: torch.index_add(x, 0, i, s, alpha=2), X, INDEX, SOURCE)
    assert apply(gm, index_add).reasons() == {"index_add with a factor": 1}
    gm = capture(lambda x, i, s: torch.index_add(x, 0, i, s), X.double(), INDEX, SOURCE.double())
    assert len(apply(gm, index_add).misses) == 1
    gm = capture(lambda x, i, s: torch.index_add(x, 0, i, s), X.long(), INDEX, SOURCE.long())
    report = apply(gm, index_add)
    assert not report.matches
    assert not report.misses
    assert calls(gm)["index_add"] == 1


def test_in_a_graph_that_is_differentiated():
    gm = capture(lambda x, i, s: torch.index_add(x, 0, i, s), X, INDEX, SOURCE)
    assert len(apply(gm, index_add, ctx=Context(grad=True)).matches) == 1

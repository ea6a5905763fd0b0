"""Products with weights, products of computed tensors, and the merging of linears."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits
from transformers.pytorch_utils import Conv1D

from llm42c.codegen.ops.registry import operators
from llm42c.passes.base import Context
from llm42c.passes.linear import linear
from llm42c.passes.matmul import matmul

OPS = torch.ops.llm42
G = torch.Generator().manual_seed(3)
X, W, B = torch.randn(2, 5, 24, generator=G), torch.randn(7, 24, generator=G), torch.randn(7, generator=G)


@pytest.mark.parametrize(
    ("fn", "bias"),
    [
        (lambda x, w, b: torch.nn.functional.linear(x, w, b), True),
        (lambda x, w, b: torch.nn.functional.linear(x, w), False),
        (lambda x, w, b: x @ w.T, False),
        (lambda x, w, b: torch.matmul(x, w.t()), False),
        (lambda x, w, b: torch.matmul(x, w.transpose(0, 1)), False),
        (lambda x, w, b: torch.addmm(b, x.view(10, 24), w.T).view(2, 5, 7), True),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_with_a_weight(fn, bias, dtype):
    x, w, b = (t.to(dtype) for t in (X, W, B))
    gm = capture(fn, x, w, b)
    report = apply(gm, linear)
    assert len(report.matches) == 1
    assert calls(gm)["llm42::linear_dense"] == 1
    assert same_bits(run(gm), OPS.linear_dense(x, w, b if bias else None))


def test_a_weight_stored_transposed():
    layer = Conv1D(7, 24)
    gm = capture(layer, X)
    assert len(apply(gm, linear).matches) == 1
    assert same_bits(run(gm), OPS.linear_dense(X, layer.weight.T.contiguous(), layer.bias))


def test_autocast_becomes_explicit():
    def fn(x, w):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.nn.functional.linear(x, w, b)

    b = B
    gm = capture(fn, X, W)
    assert len(apply(gm, linear).matches) == 1
    assert same_bits(run(gm), OPS.linear_dense(X.bfloat16(), W.bfloat16(), B.bfloat16()))


def test_a_permutation_that_transposes_nothing():
    gm = capture(lambda x, w: x @ w.permute(0, 1), X, W.T.contiguous())
    assert len(apply(gm, linear).matches) == 1
    assert same_bits(run(gm), OPS.linear_dense(X, W, None))


@pytest.mark.parametrize(
    ("a", "b"),
    [((3, 4, 5), (3, 5, 6)), ((2, 3, 4, 5), (2, 3, 5, 6)), ((2, 1, 4, 5), (3, 5, 6)), ((4, 5), (3, 5, 2))],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_products_of_computed_tensors(a, b, dynamic):
    left, right = torch.randn(a, generator=G), torch.randn(b, generator=G)
    gm = capture(lambda x, y: x.neg() @ y.neg(), left, right, dynamic=dynamic)
    apply(gm, linear, matmul)
    assert "matmul" not in calls(gm)
    got, exact = run(gm), left.double() @ right.double()
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= 8 * 2.0**-24 * (left.abs().double() @ right.abs().double())).all()


def test_rows_of_a_batched_product_do_not_depend_on_the_batch():
    left, right = torch.randn(4, 9, 33, generator=G), torch.randn(4, 33, 17, generator=G)
    gm = capture(lambda x, y: x.neg() @ y.neg(), left, right, dynamic=True)
    apply(gm, matmul)
    whole = gm(*_inputs(gm, left, right))[0]
    for rows in (1, 4, 7):
        part = gm(*_inputs(gm, left[1:3, :rows].contiguous(), right[1:3].contiguous()))[0]
        assert same_bits(part, whole[1:3, :rows])


def _inputs(gm, left, right):
    """Sizes and tensors in the order of the graph's placeholders."""
    tensors = iter((left, right))
    sizes = {4: left.shape[0], 9: left.shape[1], 33: left.shape[2], 17: right.shape[2]}
    return [next(tensors) if isinstance(x, torch.Tensor) else sizes[x.node.hint] for x in gm.meta["inputs"]]


def test_without_an_autograd_formula_the_pass_declines(monkeypatch):
    monkeypatch.setattr(operators()["grouped_linear"], "backward", None)
    gm = capture(lambda x, y: x.neg() @ y.neg(), torch.randn(3, 4, 5), torch.randn(3, 5, 6))
    report = apply(gm, matmul, ctx=Context(grad=True))
    assert not report.matches
    assert "autograd" in " ".join(report.reasons())

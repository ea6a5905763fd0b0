"""Calls inside a vmap, as scans of recurrent models have them, are left alone and judged like others."""

from __future__ import annotations

import pytest
import torch
from graphs import capture, run, same_bits

from llm42c.passes import pipeline
from llm42c.passes.base import Context

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def _scan(x: torch.Tensor) -> torch.Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, states = associative_scan(combine, (torch.sigmoid(x), x), dim=1, combine_mode="generic")
    return states


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_scan_of_pointwise_calls_has_an_order(dynamic):
    gm = capture(_scan, X, dynamic=dynamic)
    assert any("_add_batch_dim" in str(n.target) for n in gm.graph.nodes)
    before = run(gm) if not dynamic else None
    assert not pipeline.run(gm, Context()).unplaced
    if not dynamic:
        assert same_bits(run(gm), before)
        state, steps = X[:, 0], [X[:, 0]]
        for t in range(1, 5):
            state = torch.sigmoid(X[:, t]) * state + X[:, t]
            steps.append(state)
        exact = torch.stack(steps, 1)
        assert (before - exact).abs().max() <= 16 * 2.0**-24 * exact.abs().max()


def test_a_sum_inside_is_named():
    gm = capture(lambda x: torch.vmap(lambda row: row.sum(-1))(x), X)
    assert [e.reason for e in pipeline.run(gm, Context()).unplaced] == ["sum: reduction of unknown order"]

"""Which packed graphs are row independent by construction, and what takes that away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import fx

from llm42c.compile.row_independence import dependence
from llm42c.passes import graph as g
from llm42c.passes import pipeline


def rewritten(family: str) -> tuple[fx.GraphModule, list[str]]:
    _, captured = tiny.captured_copy(family)
    pipeline.run(captured.gm, tiny.packed_context(captured))
    return captured.gm, captured.inputs


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "olmo2"])
def test_a_graph_of_ordered_operators(family: str) -> None:
    gm, inputs = rewritten(family)
    assert dependence(gm, inputs, "cpu") is None
    assert "no order of it is known" in str(dependence(gm, inputs, "a target without orders"))


@pytest.mark.parametrize(("family", "call"), [("gemma2", "gelu"), ("gpt2", "pow")])
def test_a_call_of_no_order_is_named(family: str, call: str) -> None:
    found = dependence(*rewritten(family), "cpu")
    assert found is not None
    assert found.startswith(call)


def _unordered(x: fx.Node) -> list[Any]:
    return [(torch.sum, (x, -1, True))]


def _most(x: fx.Node) -> list[Any]:
    return [(torch.amax, (x, 1, True))]  # exact, and over all tokens


def _sorted(x: fx.Node) -> list[Any]:
    return [(torch.flip, (x, (1,)))]


def _neighbour(x: fx.Node) -> list[Any]:
    return [("roll", (x, 1, 1))]


PLANTED: dict[str, Callable[[fx.Node], list[Any]]] = {
    "a sum of no known order": _unordered,
    "a maximum over the tokens": _most,
    "tokens in another order": _sorted,
    "the row before": _neighbour,
}


@pytest.mark.parametrize("what", PLANTED)
def test_one_planted_call_is_enough(what: str) -> None:
    gm, inputs = rewritten("llama")
    norm = next(n for n in gm.graph.nodes if n.target is torch.ops.llm42.linear.default)
    ((target, args),) = PLANTED[what](norm.args[0])
    call = g.insert(norm, target, args)
    total = g.insert(norm, torch.add, (norm.args[0], call))
    norm.args = (total, *norm.args[1:])
    assert dependence(gm, inputs, "cpu") is not None


@pytest.mark.parametrize("name", ["kv_lens", "cu_seqlens_q", "logits_indices", "sym:T"])
def test_what_reads_the_batch_is_named(name: str) -> None:
    gm, inputs = rewritten("llama")
    holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    table = holders[inputs.index(name)]
    first = next(n for n in gm.graph.nodes if n.op == "call_function")
    norm = next(n for n in gm.graph.nodes if n.target is torch.ops.llm42.linear.default)
    wide = table
    if name != "sym:T":
        wide = g.insert(first, torch.amax, (table, 0, True))
    total = g.insert(norm, torch.add, (norm.args[0], wide))
    norm.args = (g.insert(norm, "to", (total, g.fake(norm.args[0]).dtype)), *norm.args[1:])
    assert dependence(gm, inputs, "cpu") is not None


def test_symbolic_sizes_are_not_followed() -> None:
    gm, inputs = rewritten("llama")
    gm.meta.clear()
    assert dependence(gm, inputs, "cpu") == "its sizes cannot be followed"

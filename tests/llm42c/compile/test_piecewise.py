"""Clusters between operators, compiled once each, and the straight-line program around them."""

from __future__ import annotations

import gc
import operator
import weakref

import pytest
import tiny
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.compile.clusters import find_clusters, outline, structural_hash
from llm42c.compile.piecewise import compile_piecewise
from llm42c.compile.straightline import Step, emit
from llm42c.compile.weights import WeightStore
from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.kinds import Kind, kind


def _after_pipeline(family):
    built, captured = tiny.captured_copy(family)
    pipeline.run(captured.gm, tiny.packed_context(captured))
    return built, captured


def test_a_fused_model_needs_no_kernel():
    _, captured = _after_pipeline("llama")
    assert find_clusters(captured.gm.graph) == []


def test_equal_layers_share_a_cluster():
    """GPT-2's tanh stands in both layers; the two are one kernel."""
    _, captured = _after_pipeline("gpt2")
    clusters = find_clusters(captured.gm.graph)
    hashes = [structural_hash(outline(c)) for c in clusters]
    assert len(hashes) == 2
    assert len(set(hashes)) == 1


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "olmo2"])
def test_clusters_are_sound(family):
    """No operator inside; inputs from outside, outputs used outside, and no cluster waits for itself."""
    _, captured = _after_pipeline(family)
    graph = captured.gm.graph
    for cluster in find_clusters(graph):
        inside = set(cluster.nodes)
        assert all(kind(n) is not Kind.OPERATOR for n in inside)
        assert not inside & set(cluster.inputs)
        assert cluster.outputs
        assert all(any(u not in inside for u in n.users) for n in cluster.outputs)
        above, stack = set(), list(cluster.inputs)
        while stack:
            node = stack.pop()
            if node not in above:
                above.add(node)
                stack += node.all_input_nodes
        assert not above & inside


def test_no_cluster_takes_a_tuple():
    """Of a topk that stands outside, its values come in as a tensor, whose sizes Inductor sees."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    top = graph.call_function(torch.topk, (x, 2))
    values, indices = (graph.call_function(operator.getitem, (top, i)) for i in (0, 1))
    made = graph.call_function(torch.exp, (graph.call_function(torch.tanh, (values,)),))
    graph.output((made, indices))
    with FakeTensorMode() as mode:
        x.meta[g.VALUE] = torch.empty(5, 4)
        for node in list(graph.nodes)[1:-1]:
            g.compute_value(node, mode)
    (cluster,) = find_clusters(graph)
    assert cluster.inputs == [values]
    assert cluster.outputs == [made]


def _through_a_choice(x):
    a = x.tanh().exp()
    values, _ = torch.topk(a, 2)
    return (a[:, :2] + values).tanh() * 2


def _through_half_of_a_split(x):
    a = x.tanh().exp()
    front, back = a.split(2, -1)
    return (a + torch.cat((front.tanh(), front), -1)) * 2, back


@pytest.mark.parametrize("fn", [_through_a_choice, _through_half_of_a_split])
def test_no_cluster_waits_for_itself(fn):
    """A call that is in no cluster stands between two that could be in one."""
    caught = []
    torch._dynamo.reset()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.compile(fn, backend=lambda gm, inputs: caught.append(gm) or gm, fullgraph=True)(x)
    clusters = find_clusters(caught[0].graph)
    assert clusters
    for cluster in clusters:
        above, stack = set(), list(cluster.inputs)
        while stack:
            node = stack.pop()
            if node not in above:
                above.add(node)
                stack += node.all_input_nodes
        assert not above & set(cluster.nodes)
    found, wanted = compile_piecewise(caught[0]).run(x), fn(x)
    for a, b in zip(found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=8 * torch.finfo(torch.float32).eps * b.abs().max().item())


def test_rows_of_a_program_with_clusters():
    """GPT-2's kernels are Inductor's: a sequence's rows are the same bits at any length after them."""
    built, captured = _after_pipeline("gpt2")
    WeightStore(built).materialise(captured.gm)
    program = compile_piecewise(captured.gm)
    assert list(program.clusters.values()) == [2]
    ids = tiny.ids(29)
    with torch.no_grad():
        whole = program(*tiny.packed_arguments(captured, ids, torch.float32))[0]
        for length in (2, 3, 8, 17):
            part = program(*tiny.packed_arguments(captured, ids[:length], torch.float32))[0]
            assert torch.equal(part.view(torch.uint8), whole[:, :length].contiguous().view(torch.uint8))


def test_a_program_is_readable():
    built, captured = _after_pipeline("llama")
    WeightStore(built).materialise(captured.gm)
    program = compile_piecewise(captured.gm)
    assert program.source.startswith("def forward(")
    assert program.operators["llm42::paged_attention"] == 2
    assert program.seconds < 5


def _graph():
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.sin, (x,))
    z = graph.call_function(torch.cos, (y,))
    return graph, x, y, z


def test_tensors_are_freed_after_their_last_use():
    _, x, y, z = _graph()
    alive = []
    seen: list[weakref.ref] = []

    def watch(t):
        out = t.sin()
        seen.append(weakref.ref(out))
        return out

    def check(t):
        return t.cos()

    def count(t):
        gc.collect()
        alive.append(seen[0]() is not None)
        return t

    w = y.graph.call_function(torch.neg, (z,))
    steps = [
        Step((y,), watch, (x,), {}),
        Step((z,), check, (y,), {}),
        Step((w,), count, (z,), {}),
    ]
    run, source = emit([x], {}, steps, (w,))
    run(torch.ones(3))
    assert alive == [False]
    assert "del y" in source or "del sin" in source


def test_arguments_of_every_kind_survive():
    graph = fx.Graph()
    x = graph.placeholder("class")  # a keyword: must be renamed
    out = graph.call_function(torch.sin, (x,))
    seen = {}

    def take(*args, **kwargs):
        seen["args"], seen["kwargs"] = args, kwargs
        return args[0]

    dtype, slices = torch.bfloat16, (slice(None, 3, 2), Ellipsis, None)
    arguments = (x, 1, -0.0, float("inf"), "a'b", [1, (2,)], slices, dtype, torch.device("cpu"), True)
    run, _ = emit([x], {}, [Step((out,), take, arguments, {"key": {"a": x}})], [out])
    value = torch.ones(2)
    assert run(value)[0] is value
    assert seen["args"][1:] == arguments[1:]
    assert str(seen["args"][2]) == "-0.0"
    assert seen["kwargs"]["key"]["a"] is value


def test_methods_and_constants():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    y = graph.call_method("view", (x, (2, -1)))
    z = graph.call_function(torch.add, (y, w))
    steps = [Step((y,), "view", (x, (2, -1)), {}), Step((z,), torch.add, (y, w), {"alpha": 2})]
    run, source = emit([x], {w: torch.ones(1)}, steps, (z, y))
    total, view = run(torch.arange(4.0))
    assert torch.equal(total, torch.arange(4.0).view(2, 2) + 2)
    assert torch.equal(view, torch.arange(4.0).view(2, 2))
    assert ".view((2, -1))" in source

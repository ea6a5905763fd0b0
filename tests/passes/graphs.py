"""Capture a function as a Dynamo graph and run passes on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from llm42c.codegen.ops import registry
from llm42c.passes import graph as g
from llm42c.passes.base import Context, PassReport
from llm42c.passes.cleanup import erase_dead_code
from llm42c.passes.normalize import normalize

registry.load()


def capture(fn: Callable[..., Any], *inputs: Any, dynamic: bool = False, runs: bool = True) -> fx.GraphModule:
    """The graph of ``fn``; call the result like ``fn`` (parameters of modules are inputs of the graph).

    ``runs=False``: of one tensor like the first input, and nothing here can compute it.
    """
    caught: list[fx.GraphModule] = []

    def grab(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        gm.meta["inputs"] = list(example_inputs)
        caught.append(gm)
        return gm.forward if runs else lambda *_: (torch.zeros_like(inputs[0]),)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend=grab, fullgraph=True, dynamic=dynamic)(*inputs)
    return caught[0]


def run(gm: fx.GraphModule) -> Any:
    """The graph's results on the inputs that it was captured with."""
    with torch.no_grad():
        outputs = gm(*(int(x) if isinstance(x, torch.SymInt) else x for x in gm.meta["inputs"]))
    return outputs[0] if len(outputs) == 1 else outputs


def apply(gm: fx.GraphModule, *passes: Callable[..., None], ctx: Context | None = None) -> PassReport:
    """Normalise, then run ``passes``; returns the report of the last."""
    ctx, report = ctx or Context(), PassReport("normalize")
    for step in (normalize, *passes):
        report = PassReport(step.__name__)
        step(gm.graph, ctx, report)
        erase_dead_code(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return report


def calls(gm: fx.GraphModule) -> Counter[str]:
    """How often each function is called, by canonical name."""
    return Counter(g.called(n) for n in gm.graph.nodes if n.op in ("call_function", "call_method"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits (NaN equals itself, 0 differs from -0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))

"""The backend up to Inductor: graphs after the passes, run by torch one call after the other.

It shows the same operators in the same order as the compiled model at a fraction of the time. torch's own
loops compute the tail of a row-major tensor by scalar code that rounds exp, tanh, ... differently; Inductor
is told not to (llm42c/compile/inductor.py). Here these functions are computed in fp64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from llm42c.backend import rewrite_plain
from llm42c.compile.dump import Dump
from llm42c.options import Options
from llm42c.passes.base import PLAIN
from llm42c.passes.kinds import Kind, kind


class _CallByCall(fx.Interpreter):
    """Runs a graph; pointwise functions that are not exact take a detour through fp64."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        calls = (n for n in gm.graph.nodes if n.op in ("call_function", "call_method"))
        self._rounded = {n for n in calls if kind(n) is Kind.TRANSCENDENTAL}

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._rounded:
            return super().run_node(n)
        args, kwargs = tree_map(_widened, self.fetch_args_kwargs_from_env(n))
        wide = getattr(self, n.op)(n.target, args, kwargs)
        dtype = n.meta["example_value"].dtype
        return wide.to(dtype) if isinstance(wide, Tensor) else wide


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def call_by_call(gm: fx.GraphModule, example_inputs: list[Any], *, options: Any) -> Callable[..., Any]:
    """A backend for ``torch.compile``."""
    parsed = Options.parse(options)
    if parsed.reductions == "free":
        return gm
    rewrite_plain(gm, example_inputs, parsed, Dump.for_options(parsed, PLAIN))
    interpreter = _CallByCall(gm)

    def run(*args: Any) -> Any:
        with torch.no_grad():
            return interpreter.run(*args)

    return run

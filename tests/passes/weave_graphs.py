"""Graphs with collectives, captured as a compiler gets them, with a group that is only a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd

from llm42c.passes import graph as g
from llm42c.passes.weave.cost import Rates
from llm42c.passes.weave.split import Split
from llm42c.weave.simulated_link import Link, VirtualClock, simulated

GROUP = "weave-test"
HIDDEN, HEADS = 32, 4
RATES = Rates(flops=1e11, bandwidth=1e10, latency=1e-6, link=1e9, call=0.0, units=1, tile_m=1, tile_n=1)


def all_reduce(x: Tensor) -> Tensor:
    """Dynamo and AOT see what Hugging Face's tensor parallelism makes."""
    started = torch.ops._c10d_functional.all_reduce(x, "sum", GROUP)
    return torch.ops._c10d_functional.wait_tensor(started)


@contextmanager
def group(latency: float = 0.0, bandwidth: float = 1e12) -> Iterator[Link]:
    """Collectives of GROUP go over a simulated link in virtual time."""
    link = Link(latency, bandwidth, VirtualClock())
    with simulated(GROUP, link):
        yield link


class Graph:
    """A captured aten graph, with its inputs for any number of tokens."""

    def __init__(self, fn: Callable[..., Any], x: Tensor, dim: int) -> None:
        caught: list[tuple[fx.GraphModule, list[Any]]] = []

        def grab(gm: fx.GraphModule, fakes: list[Any]) -> Any:
            def call(*inputs: Any) -> Any:
                caught.append((gm, list(inputs)))
                return gm(*inputs)

            return call

        torch._dynamo.reset()
        torch._dynamo.mark_dynamic(x, dim)
        with torch.no_grad():
            torch.compile(fn, backend=aot_autograd(fw_compiler=grab), fullgraph=True)(x)
        self.gm, self._inputs = caught[0]
        self._x, self._dim = x, dim
        self._values = [g.value(n) for n in self.gm.graph.nodes if n.op == "placeholder"]

    def arguments(self, x: Tensor) -> list[Any]:
        """The graph's inputs with ``x`` in place of the tensor that it was captured with."""
        return [self._argument(v, given, x) for v, given in zip(self._values, self._inputs, strict=True)]

    def _argument(self, value: Any, given: Any, x: Tensor) -> Any:
        if isinstance(value, torch.SymInt):
            return x.shape[self._dim]
        dynamic = any(isinstance(s, torch.SymInt) for s in value.shape)
        return x if dynamic else given


def run_whole(split: Split, arguments: list[Any]) -> Any:
    with torch.no_grad():
        return fx.Interpreter(split.original).run(*arguments)


def run_halves(gm: fx.GraphModule, arguments: list[Any], tokens_0: int) -> Any:
    with torch.no_grad():
        return fx.Interpreter(gm).run(*arguments, tokens_0)


class Layer(nn.Module):
    """One decoder layer of a rank: pre-norm, causal attention, gated MLP, two all-reduces."""

    def __init__(self, hidden: int = HIDDEN, heads: int = HEADS) -> None:
        super().__init__()
        self.heads, self.hidden = heads, hidden
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, (self.hidden,))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, S, D]
        x = x + all_reduce(self.out(a.transpose(1, 2).flatten(2)))
        gate, up = self.up(F.rms_norm(x, (self.hidden,))).chunk(2, -1)
        return x + all_reduce(self.down(F.silu(gate) * up))


def model(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(layers))).eval()


def tokens(count: int, batch: int = 1, seed: int = 1) -> Tensor:
    """[batch, count, HIDDEN]."""
    return torch.randn(batch, count, HIDDEN, generator=torch.Generator().manual_seed(seed))

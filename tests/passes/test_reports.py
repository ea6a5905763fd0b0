"""Every pass of the list says what it matched and what it declined: a change without a match is a fault, and
so is a near miss without a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.attention.varlen
import torch.nn.functional as F
from graphs import capture
from torch import Tensor, fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from llm42c.passes import pipeline
from llm42c.passes import topk as topk_pass
from llm42c.passes.base import PACKED, PLAIN, Context, Pass, PassReport, PositionInput, Report
from llm42c.passes.cleanup import erase_dead_code

OPS = torch.ops.llm42
IN_PLAIN, IN_PACKED = Context(), Context(target=PACKED)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@dataclass(frozen=True)
class Near:
    """A function that a pass almost takes, and why it does not. A module's parameters are attributes."""

    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    reason: str
    ctx: Context = IN_PLAIN
    dtype: torch.dtype = torch.float32
    dynamic: bool = False
    runs: bool = True
    rows: tuple[int, ...] = ()  # one more input

    def graph(self) -> fx.GraphModule:
        g = torch.Generator().manual_seed(1)
        inputs = [torch.randn(shape, generator=g).to(self.dtype) for shape in self.shapes]
        inputs += [torch.tensor(self.rows)] if self.rows else []
        gm = capture(self.fn, *inputs, dynamic=self.dynamic, runs=self.runs)
        for node in [n for n in gm.graph.nodes if n.op == "placeholder" and "_parameters_" in n.name]:
            node.op = "get_attr"
            node.target = node.name
            setattr(gm, node.name, torch.nn.Parameter(torch.empty(node.meta["example_value"].shape)))
        return gm


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def summed(x: Tensor, op: str = "sum") -> Tensor:
    return funcol.all_reduce(x, op, dist.group.WORLD)


def in_place(x: Tensor) -> Tensor:
    x.mul_(2)
    return x + 1


def two_softmaxes(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def centred_by_one_less(x: Tensor) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d / torch.sqrt(d.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1) + 1e-5)


def seeing_all(q: Tensor) -> Tensor:
    cu = torch.tensor([0, 7], dtype=torch.int32)
    return torch.ops.torch_attn._varlen_attn(q, q, q, cu, cu, 7, 7, False)[0]


def over_the_first(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5)


def rows_summed(a: Tensor, b: Tensor) -> Tensor:
    offsets = torch.tensor([8, 16], dtype=torch.int32)
    return torch._grouped_mm(a.t(), b, offs=offsets)


def added_twice(x: Tensor, s: Tensor) -> Tensor:
    return torch.index_add(x, 0, torch.tensor([0, 2, 0, 1]), s, alpha=2)


def turned_wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    of = x.flip(1)
    return x * cos + torch.cat((-of[..., 4:], of[..., :4]), -1) * sin


class Linears(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4)


class Unlike(Linears):
    def forward(self, x: Tensor) -> Any:
        return self.a(x), self.b(x)


class Broadcast(Linears):
    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return r + self.a(x)


class HalfRows(Linears):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return y.view(2 * x.shape[1], 2)[:, :1].cos()


def far_heads(x: Tensor, cos: Tensor, sin: Tensor) -> Any:
    y = OPS.rms_norm(x, None, 1e-5, 0.0, True)  # [T, H, D]
    return OPS.rotary(y[:, :1], cos, sin), OPS.rotary(y[:, 2:], cos, sin)


def angles(p: Tensor) -> Tensor:
    return p.unsqueeze(-1).cos()


NEAR: dict[str, Near] = {
    "collectives": Near(lambda x: summed(x, "max") + 1, ((3, 8),), "a reduction by 'max'"),
    "normalize": Near(in_place, ((3, 8),), "a write that stays"),
    "dead_code": Near(in_place, ((3, 8),), "may have another effect"),
    "common_subexpressions": Near(lambda x: (x.exp(), x.exp()), ((3, 8),), "the graph returns both"),
    "complex_numbers": Near(lambda x: torch.view_as_complex(x).abs(), ((3, 8, 2),), "abs of complex numbers"),
    "addends": Near(
        lambda c, a, b: torch.baddbmm(c, a, b),
        ((2, 3, 5), (2, 3, 4), (2, 4, 5)), "float64", dtype=torch.float64,
    ),
    "einsum": Near(lambda a: torch.einsum("bl->b", a), ((3, 8),), "two operands"),
    "conv1d": Near(lambda x, w: F.conv1d(x, w), ((1, 6, 9), (4, 6, 3)), "float64", dtype=torch.float64),
    "attention_sdpa": Near(
        lambda q: F.scaled_dot_product_attention(q, q, q), ((1, 2, 5, 8),), "float64", dtype=torch.float64
    ),
    "attention_eager": Near(two_softmaxes, ((3, 8),), "not between a product with keys"),
    "varlen_attention": Near(seeing_all, ((7, 2, 8),), "not causal", runs=False),
    "position_table": Near(
        angles, ((1, 7),), "the tables would take",
        replace(IN_PACKED, positions=PositionInput("l_p_", 1 << 28)),
    ),
    "layer_norm": Near(centred_by_one_less, ((3, 8),), "not divided by their count"),
    "rms_norm": Near(over_the_first, ((3, 8),), "last dimension"),
    "add_rms_norm": Near(lambda a, b: rms(a * b), ((3, 8), (3, 8)), "no addition"),
    "allreduce_rmsnorm": Near(lambda x: summed(x) + 1, ((3, 8),), "no RMSNorm follows"),
    "residual_shards": Near(
        lambda x, r: rms(r + summed(x)), ((3, 8), (3, 8)), "not the residual of another",
        Context(residual_shards=True),
    ),
    "linear_q": Near(
        lambda x, w: OPS.linear_q(x, [w.byte()], "q8_0", [16], x[0, 0, :16], None, False) + x[..., :16],
        ((1, 7, 32), (1, 1, 544)), "its bias is computed", IN_PACKED,
    ),
    "linear_silu_mul": Near(lambda a, b: F.silu(a) * b, ((3, 8), (3, 8)), "separate tensors"),
    "merge_linears": Near(Unlike(), ((1, 7, 8),), "no other product of its input has a bias", IN_PACKED),
    "linear": Near(lambda a, b: a @ b, ((2, 3, 8), (2, 8, 4)), "two computed tensors"),
    "grouped_mm": Near(
        rows_summed, ((16, 32), (16, 32)), "not a product of rows", dtype=torch.bfloat16
    ),
    "index_add": Near(added_twice, ((3, 8), (4, 8)), "with a factor"),
    "topk": Near(lambda x: torch.topk(x.sum(), 1), ((3, 8),), "not the elements"),
    "solve_triangular": Near(
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False),
        ((4, 4), (4, 2)), "float64", dtype=torch.float64,
    ),
    "matmul": Near(lambda a, b: a @ b, ((2, 3, 8), (2, 8, 4)), "float64", dtype=torch.float64),
    "reductions": Near(lambda x: x.sum(-1), ((3, 8),), "float64", dtype=torch.float64),
    "linear_add": Near(Broadcast(), ((1, 7, 8), (1, 1, 4)), "broadcasts", IN_PACKED),
    "wanted_rows": Near(
        lambda x, wanted: OPS.rms_norm(x, None, 1e-5, 0.0, True)[:, wanted],
        ((1, 7, 8),), "no product", IN_PACKED, rows=(3, 0),
    ),
    "rotary": Near(
        turned_wrong, ((1, 2, 7, 8), (1, 1, 7, 8), (1, 1, 7, 8)), "not the two halves", IN_PACKED
    ),
    "merge_rotary": Near(far_heads, ((7, 4, 8), (7, 8), (7, 8)), "do not stand behind", IN_PACKED),
    "layout": Near(HalfRows(), ((1, 7, 8),), "neither a number nor an input", IN_PACKED, dynamic=True),
    "check": Near(lambda x: x.logcumsumexp(-1), ((3, 8),), "unknown order"),
}  # fmt: skip


TAKEN = {
    "layout": Near(
        lambda x: OPS.rms_norm(x, None, 1e-5, 0.0, True).unsqueeze(0)[0].cos(), ((7, 8),), "", IN_PACKED
    )
}


def piped(near: Near, ctx: Context | None = None) -> Report:
    return pipeline.run(near.graph(), ctx or near.ctx)


def test_there_is_a_near_miss_of_every_pass() -> None:
    assert NEAR.keys() == {p.name for p in pipeline.PASSES}


@pytest.mark.parametrize("name", NEAR)
def test_a_near_miss_is_named_with_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_pass, "_row_decides", lambda device: False)  # as on a GPU
    reasons = piped(NEAR[name])[name].reasons()
    assert NEAR[name].reason in " | ".join(reasons)
    assert all(reasons)


def watched(step: Pass, silent: list[str]) -> Pass:
    """``step``, noting its name when it changes a graph and reports no match."""

    def apply(graph: fx.Graph, ctx: Context, report: PassReport) -> None:
        erase_dead_code(graph)
        before = str(graph)
        step.apply(graph, ctx, report)
        erase_dead_code(graph)
        if str(graph) != before and not report.matches:
            silent.append(step.name)

    return Pass(step.name, apply, step.targets)


def test_a_change_is_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all these graphs, as plain and as packed ones."""
    silent: list[str] = []
    monkeypatch.setattr(topk_pass, "_row_decides", lambda device: False)
    monkeypatch.setattr(pipeline, "PASSES", tuple(watched(p, silent) for p in pipeline.PASSES))
    matched = set()
    for near in (*NEAR.values(), *TAKEN.values()):
        for target in (PLAIN, PACKED):
            matched |= {p.name for p in piped(near, replace(near.ctx, target=target)).passes if p.matches}
    assert silent == []
    assert {"normalize", "rms_norm", "linear", "matmul", "reductions", "layout"} <= matched  # Guard.


def test_a_silent_change_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    silent: list[str] = []
    mute = {"reductions": lambda step: lambda graph, ctx, report: step.apply(graph, ctx, PassReport(""))}
    passes = tuple(
        watched(Pass(p.name, mute[p.name](p), p.targets) if p.name in mute else p, silent)
        for p in pipeline.PASSES
    )
    monkeypatch.setattr(pipeline, "PASSES", passes)
    pipeline.run(capture(lambda x: x.sum(-1), torch.ones(3, 8)), Context())
    assert silent == ["reductions"]

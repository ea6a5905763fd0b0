"""All-reduces become the rank-ordered operator, and sites with a pre-norm the fused one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, fx
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.testing._internal.distributed.fake_pg import FakeStore

from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.base import Context, Report

B, S, K, H = 2, 3, 8, 16
MESH: list[DeviceMesh] = []


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    MESH.append(init_device_mesh("cpu", (2,)))
    yield
    MESH.clear()
    dist.destroy_process_group()


def rms(h: Tensor, w: Tensor) -> Tensor:
    wide = h.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(h.dtype)


def summed(x: Tensor, w_o: Tensor) -> Tensor:
    y = F.linear(x, w_o)
    dist.all_reduce(y)
    return y


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """x, w_o, residual, w"""
    torch.manual_seed(0)
    shapes = ((B, S, K), (H, K), (B, S, H), (H,))
    return tuple(torch.randn(s).to(dtype) for s in shapes)


def plain(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + summed(x, w_o)
    return rms(h, w), h


def swapped(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    h = summed(x, w_o) + r
    return rms(h, w), h


def through_views(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    y = F.linear(x.reshape(-1, K), w_o)
    dist.all_reduce(y)
    h = r + y.view(B * S, 1, H).clone().reshape(B, S, H)
    return rms(h, w), h


def a_view_is_reduced(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    y = F.linear(x, w_o)
    flat = y.view(-1, H)
    dist.all_reduce(flat)
    h = r + y.view(-1, H).view(B, S, H)
    return rms(h, w), h


def functional(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + funcol.all_reduce(F.linear(x, w_o), "sum", dist.group.WORLD)
    return rms(h, w), h


def several_readers(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + summed(x, w_o)
    return rms(h, w), h * 2, h.abs()


def a_cast(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    h = r + summed(x.float(), w_o.float()).to(r.dtype)
    return rms(h, w), h


def only_normed(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return rms(r + summed(x, w_o), w)


def a_dtensor(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    part = DTensor.from_local(F.linear(x, w_o), MESH[0], [Partial()], run_check=False)
    h = r + part.redistribute(placements=[Replicate()]).to_local()
    return rms(h, w), h


MATCHES = (
    plain, swapped, through_views, a_view_is_reduced, functional, several_readers, a_cast, only_normed,
    a_dtensor,
)  # fmt: skip


def rewritten(fn: Any, *, grad: bool = False) -> tuple[fx.GraphModule, Report]:
    gm = graphs.capture(fn, *inputs())
    report = pipeline.run(gm, Context(grad=grad))
    return gm, report


@pytest.mark.parametrize("fn", MATCHES)
def test_a_site_is_fused(fn: Any):
    gm, report = rewritten(fn)
    assert len(report["allreduce_rmsnorm"].matches) == 1
    assert not report["allreduce_rmsnorm"].misses
    calls = graphs.calls(gm)
    assert calls["llm42::all_reduce_add_rms_norm"] == 1
    assert calls["llm42::all_reduce"] == calls["llm42::add_rms_norm"] == calls["copy_"] == 0
    assert not any("_c10d_functional" in str(n.target) for n in gm.graph.nodes)
    assert not report.unplaced


def post_norm(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return r + rms(summed(x, w_o), w)


def scaled(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return rms(r + summed(x, w_o) * 0.5, w)


def with_a_bias(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return rms(r + (summed(x, w_o) + w), w)


def then_layer_norm(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return F.layer_norm(r + summed(x, w_o), (H,), w)


def without_a_norm(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return r + summed(x, w_o)


def read_elsewhere(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    y = summed(x, w_o)
    return rms(r + y, w), y


def cast_twice(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return rms(r + summed(x.float(), w_o.float()).half().to(r.dtype), w)


def transposed(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
    return rms(r.transpose(0, 1) + summed(x, w_o).transpose(0, 1), w)


MISSES = [
    (post_norm, "normed before the residual"),
    (scaled, "scaled before the residual"),
    (with_a_bias, "a bias is added"),
    (then_layer_norm, "a LayerNorm follows"),
    (without_a_norm, "no RMSNorm follows"),
    (read_elsewhere, "read in several places"),
    (cast_twice, "cast more than once"),
    (transposed, "the sum goes into"),
]


@pytest.mark.parametrize(("fn", "reason"), MISSES)
def test_a_look_alike_keeps_its_plain_sum_and_says_why(fn: Any, reason: str):
    gm, report = rewritten(fn)
    (miss,) = report["allreduce_rmsnorm"].misses
    assert reason in miss.reason
    calls = graphs.calls(gm)
    assert calls["llm42::all_reduce"] == 1
    assert calls["llm42::all_reduce_add_rms_norm"] == 0
    assert not report.unplaced


def test_two_sums_of_one_block():
    """A parallel block: one of the two sums can be the operator's residual."""

    def fn(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
        return rms(summed(x, w_o) + summed(x * 2, w_o), w)

    gm, report = rewritten(fn)
    assert len(report["allreduce_rmsnorm"].matches) == 1
    (miss,) = report["allreduce_rmsnorm"].misses
    assert "was taken" in miss.reason
    assert graphs.calls(gm)["llm42::all_reduce"] == 1


def test_other_reductions_are_left_and_named():
    def fn(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
        return rms(r + funcol.all_reduce(F.linear(x, w_o), "max", dist.group.WORLD), w)

    _, report = rewritten(fn)
    (miss,) = report["collectives"].misses
    assert "'max'" in miss.reason
    assert any("all_reduce" in event.reason for event in report.unplaced)


def test_a_graph_that_is_differentiated_keeps_its_collectives():
    _, report = rewritten(plain, grad=True)
    assert "no autograd formula" in report["collectives"].misses[0].reason


def test_writing_into_an_input_stays_visible():
    def fn(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
        dist.all_reduce(r)
        return r * 2

    gm, report = rewritten(fn)
    assert "an input of the graph" in report["collectives"].misses[0].reason
    assert graphs.calls(gm)["copy_"] == 1
    assert graphs.calls(gm)["llm42::all_reduce"] == 1


def test_a_view_of_a_part_keeps_the_copy():
    def fn(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor) -> Any:
        y = F.linear(x, w_o)
        first = y[:, :1]
        dist.all_reduce(y)
        return first * 2, y

    gm, report = rewritten(fn)
    assert "a part of it is read" in report["collectives"].misses[0].reason
    assert graphs.calls(gm)["copy_"] == 1


def block(x: Tensor, w_o: Tensor, r: Tensor, w: Tensor, *, expose: int = -1) -> list[Tensor]:
    """Three sites in a chain; ``expose``: which residual is returned too."""
    out = []
    for site in range(3):
        r = r + summed(x, w_o)
        y = rms(r, w)
        x = y[..., :K] * 2
        out += [r] if site == expose else []
    return [y, *out]


def test_a_chain_keeps_its_residual_divided():
    gm = graphs.capture(block, *inputs())
    report = pipeline.run(gm, Context(residual_shards=True))
    calls = graphs.calls(gm)
    assert len(report["residual_shards"].matches) == 3
    assert calls["llm42::all_reduce_add_rms_norm_sharded"] == 3
    assert calls["llm42::shard_rows"] == 1
    assert calls["llm42::gather_rows"] == calls["llm42::all_reduce_add_rms_norm"] == 0
    shard = next(n for n in gm.graph.nodes if g.name(n) == "llm42::shard_rows")
    assert tuple(g.fake(shard).shape) == (B * S // 2, H)


def test_a_residual_that_is_read_elsewhere_is_gathered_at_the_end_of_its_chain():
    gm = graphs.capture(lambda *a: block(*a, expose=2), *inputs())
    pipeline.run(gm, Context(residual_shards=True))
    assert graphs.calls(gm)["llm42::gather_rows"] == 1
    gm = graphs.capture(lambda *a: block(*a, expose=0), *inputs())
    report = pipeline.run(gm, Context(residual_shards=True))
    calls = graphs.calls(gm)  # the first site stands alone, the other two are a chain
    assert calls["llm42::all_reduce_add_rms_norm"] == 1
    assert calls["llm42::all_reduce_add_rms_norm_sharded"] == 2
    assert "not the residual of another" in report["residual_shards"].misses[0].reason


def test_without_the_option_the_residual_stays_whole():
    gm = graphs.capture(block, *inputs())
    pipeline.run(gm, Context())
    assert graphs.calls(gm)["llm42::all_reduce_add_rms_norm"] == 3

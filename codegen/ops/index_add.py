"""Rows added to the rows that an index names, in one order.

``torch.index_add`` says nothing of the order in which the rows of one place are added: a GPU adds them
atomically as they come, a compiler's loop on several threads too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llm42c.codegen.examples import ROWS, WIDTH, Numbers
from llm42c.codegen.operator import operator
from llm42c.codegen.order import ASCENDING


def _examples(r: Numbers) -> Iterator[tuple[Any, ...]]:
    x, source = r(ROWS, WIDTH), r(ROWS, WIDTH)
    yield x, 0, torch.tensor([1, 1, 1, 0]), source[:4]


@operator(orders={"cpu": ASCENDING, "cuda": ASCENDING}, examples=_examples)
def index_add(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """x with source[r] added at index[r], each sum rounded to x.dtype.

    x: any shape; index: [R] integers in [0, x.shape[dim]); source: as x with R along ``dim``, same dtype.
    Raises ValueError for shapes that do not fit, IndexError for an index outside.

    In fp64, not rounded to ``x.dtype``.
    """
    return x.double().index_add(dim, index.long(), source.double())


@index_add.fake
def _fake(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@index_add.simulator(ASCENDING)
def _simulated(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    target, rows = out.movedim(dim, 0), source.movedim(dim, 0)
    for place, row in zip(index.tolist(), rows, strict=True):
        target[place] = (target[place].float() + row.float()).to(x.dtype)
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dim, index, _ = inputs
    ctx.save_for_backward(index)


@index_add.gradient(_setup_context)
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return grad, None, None, grad.index_select(ctx.dim, ctx.saved_tensors[0])


@index_add.implementation("cpu", "cuda")
def _composite(x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """Round r adds the r-th row of every place; no two rows of a round meet."""
    if index.dim() != 1 or source.dim() != x.dim() or source.shape[dim] != len(index):
        raise ValueError(
            f"index_add: expected index [R] and source with R rows along dim {dim} of {tuple(x.shape)}, got "
            f"{tuple(index.shape)} and {tuple(source.shape)}"
        )
    out = x.clone(memory_format=torch.contiguous_format)
    if not source.numel():
        return out
    places, order = torch.sort(index.long(), stable=True)
    if int(places[0]) < 0 or int(places[-1]) >= x.shape[dim]:
        raise IndexError(f"index_add: the index must be in [0, {x.shape[dim]})")
    rank = torch.arange(len(places), device=places.device) - torch.searchsorted(places, places)
    rows, target = source.movedim(dim, 0), out.movedim(dim, 0)
    for r in range(int(rank.max()) + 1):
        mine = rank == r
        place = places[mine]
        target[place] = target[place] + rows[order[mine]]
    return out

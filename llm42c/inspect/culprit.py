"""Which call of a compiled form first depends on the batch: the name behind a bucket that is not certified.

The same rows are run in a batch of their own and inside a larger one, and the results of every call are
compared bit for bit on those rows. Later differences follow from the first, so only that one is named.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm42c.capture.packed import PackedInputs
from llm42c.compile.compiler import CompiledModel

PAGE_SIZE = 16


@dataclass(frozen=True)
class Culprit:
    """The first call whose rows change: its name, its place among the calls, and how many rows differ."""

    name: str
    call: int
    calls: int
    rows: int
    compared: int

    def __str__(self) -> str:
        return f"{self.name} (call {self.call} of {self.calls}): {self.rows} of {self.compared} rows differ"


def find_culprit(model: CompiledModel, tokens: int, larger: int) -> Culprit | None:
    """The first call of ``model`` whose bits differ between ``tokens`` rows alone and among ``larger``.

    Every row is a sequence of one token. None when all calls agree. Raises ValueError unless
    ``tokens < larger``.
    """
    if not 0 < tokens < larger:
        raise ValueError(f"the larger batch ({larger}) must have more tokens than the smaller ({tokens})")
    alone, among = _trace(model, tokens), _trace(model, larger)
    for i, ((name, a), (_, b)) in enumerate(zip(alone, among, strict=True), start=1):
        rows = _differing_rows(a, b, tokens, larger)
        if rows:
            return Culprit(name, i, len(alone), rows, tokens)
    return None


def _trace(model: CompiledModel, tokens: int) -> list[tuple[str, list[Tensor]]]:
    """Every call of one forward pass with copies of its results."""
    calls: list[tuple[str, list[Tensor]]] = []
    batch, cache = _batch(model, tokens), model.new_kv_cache(tokens, PAGE_SIZE)
    original = model.program.run

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            calls.append((name, [t.clone() for t in _tensors(result)]))
            return result

        return call

    names = original.__globals__
    wrapped = {n: recorded(n, f) if callable(f) and not n.startswith("__") else f for n, f in names.items()}
    model.program.run = types.FunctionType(original.__code__, wrapped)
    try:
        model.forward(batch, cache)
    finally:
        model.program.run = original
    return calls


def _batch(model: CompiledModel, tokens: int) -> PackedInputs:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (4096,), generator=generator)[:tokens]
    return PackedInputs(
        input_ids=ids,
        positions=torch.zeros(tokens, dtype=torch.int64),
        slot_mapping=torch.arange(tokens) * PAGE_SIZE,
        cu_seqlens_q=torch.arange(tokens + 1, dtype=torch.int32),
        kv_lens=torch.ones(tokens, dtype=torch.int32),
        block_table=torch.arange(tokens, dtype=torch.int32).unsqueeze(1),
        logits_indices=torch.arange(tokens),
    )


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)


def _differing_rows(a: list[Tensor], b: list[Tensor], tokens: int, larger: int) -> int:
    """Rows of results that have one row a token and differ between the two runs."""
    differing = 0
    for x, y in zip(a, b, strict=True):
        dims = [d for d in range(x.dim()) if (x.shape[d], y.shape[d]) == (tokens, larger)]
        if len(dims) != 1 or x.dim() != y.dim():
            continue
        left = x.movedim(dims[0], 0).reshape(tokens, -1)
        right = y.movedim(dims[0], 0)[:tokens].reshape(tokens, -1)
        same = (left == right) | (left != left) & (right != right)
        differing = max(differing, int((~same.all(dim=1)).sum()))
    return differing

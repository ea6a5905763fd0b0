"""Subnormal numbers count, whatever floating-point mode the calling thread is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from llm42c.codegen.ops import registry

registry.load()
ops = torch.ops.llm42
G = torch.Generator().manual_seed(1)
TINY = 2.0**-130  # below the least normal number, 2^-126


def _tiny(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G).ldexp(torch.tensor(-128.0)) + TINY


SMALL, X, W = _tiny(9, 48), torch.randn(9, 48, generator=G), torch.randn(33, 48, generator=G)
TINIER = SMALL / 64
Q, V = torch.randn(1, 2, 5, 16, generator=G), _tiny(1, 2, 5, 16)
CASES: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: ops.linear(SMALL, ops.linear_pack(W), None, 33),
    "linear_dense": lambda: ops.linear_dense(SMALL, W, None),
    "linear_add": lambda: ops.linear_add(SMALL, ops.linear_pack(W), None, torch.zeros(9, 33), 33),
    "rms_norm": lambda: ops.rms_norm(X, SMALL[0].contiguous(), 1e-6, 0.0, False),
    "add_rms_norm": lambda: ops.add_rms_norm(SMALL, SMALL, None, 1e-6, 0.0, True)[1],
    "layer_norm": lambda: ops.layer_norm(X, SMALL[0].contiguous(), None, 1e-5),
    "silu_mul": lambda: ops.silu_mul(torch.cat([X, SMALL], 1)),
    "rotary": lambda: ops.rotary(SMALL.view(9, 1, 48), X.contiguous(), X.contiguous()),
    "row_sum": lambda: ops.row_sum(TINIER, [-1], False),
    "row_softmax": lambda: ops.row_softmax(X * 20),
    "dense_attention": lambda: ops.dense_attention(Q, Q, V, None, 1.0, True, 0, 0.0),
}


@pytest.fixture
def flushing() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU always keeps subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _flushes() -> bool:
    return bool((torch.tensor(2.0**-100) * torch.tensor(2.0**-30)).view(torch.int32) == 0)


PLAIN = {name: _bits(case()) for name, case in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_mode_of_the_thread_changes_no_bit(name: str, flushing: None) -> None:
    assert _flushes()
    exponent = PLAIN[name] >> 23 & 0xFF
    assert ((exponent == 0) & (PLAIN[name] & 0x7FFFFF != 0)).any()  # and here is what could be flushed
    assert torch.equal(_bits(CASES[name]()), PLAIN[name])
    assert _flushes()  # the caller keeps its mode

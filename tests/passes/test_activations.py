"""Every activation of transformers: an element's bits do not depend on where in the tensor it stands."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import same_bits
from torch import Tensor, nn
from transformers.activations import ACT2FN

from llm42c.compile.inductor import compile_free

GENERATOR = torch.Generator().manual_seed(0)
# Values of all sizes, and those at which exp, erf and tanh change their formula.
X = torch.randn(90, generator=GENERATOR) * 4
X[::7] *= 20
X[[3, 10, 20, 31, 45, 46]] = torch.tensor([0.0, -0.0, 88.5, -104.0, 1e-30, -1e-40])
SIZES, OFFSETS = range(1, 71), (0, 1, 3, 8, 13, 20)


def places(act: Callable[[Tensor], Tensor], **how: Any) -> int:
    """In how many parts of ``X``, in fp32 and bf16, an element is not as in the whole."""
    torch._dynamo.reset()
    half = X.bfloat16()
    act_half = copy.deepcopy(act).bfloat16() if isinstance(act, nn.Module) else act
    fn = torch.compile(lambda x, y: (act(x), act_half(y)), dynamic=True, **how)
    with torch.no_grad():
        whole = fn(X, half)
        parts = [(n, o) for n in SIZES for o in OFFSETS]
        return sum(
            not same_bits(part, all_[o : o + n])
            for n, o in parts
            for part, all_ in zip(fn(X[o : o + n], half[o : o + n]), whole, strict=True)
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_an_element_is_the_same_anywhere(name: str) -> None:
    assert places(ACT2FN[name], backend="llm42") == 0


@pytest.mark.slow
def test_control_vector_code_and_its_tail_differ() -> None:
    """Inductor as it comes: the check above sees the last elements of a loop round in another way."""
    fns = (torch.tanh, torch.erf, torch.sigmoid, torch.exp)
    assert any(places(fn, backend=compile_free) for fn in fns)

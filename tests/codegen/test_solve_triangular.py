"""llm42::solve_triangular: substitution, one unknown after the other."""

from __future__ import annotations

import pytest
import torch

from llm42c.codegen.ops import registry
from llm42c.codegen.ops.solve_triangular import solve_triangular as OP

registry.load()
SOLVE = torch.ops.llm42.solve_triangular


def _system(*batch: int, n: int = 17, k: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(*batch, n, n, generator=g) / n + torch.eye(n)
    return a, torch.randn(*batch, n, k, generator=g)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_close_to_the_reference_and_step_by_step(upper, unit):
    a, b = _system(2, 3)
    got, exact = SOLVE(a, b, upper, unit), OP.reference(a, b, upper, unit)
    # Substitution in n steps of a system near the identity: each step rounds twice what it carries.
    assert (got - exact).abs().max() <= 4 * 17 * 2.0**-24 * exact.abs().max()
    order = range(16, -1, -1) if upper else range(17)
    x, known = b[1, 2].clone(), []
    for i in order:
        for j in known:
            x[i] = x[i] - a[1, 2, i, j] * x[j]
        if not unit:
            x[i] = x[i] / a[1, 2, i, i]
        known.append(i)
    assert torch.equal(got[1, 2], x)


def test_neither_the_batch_nor_other_columns_show():
    a, b = _system(4)
    whole = SOLVE(a, b, False, True)
    assert torch.equal(SOLVE(a[2:3], b[2:3], False, True), whole[2:3])
    assert torch.equal(SOLVE(a, b[..., 1:3], False, True), whole[..., 1:3])
    assert torch.equal(SOLVE(a[0], b, False, True)[0], whole[0])  # broadcast
    assert not torch.equal(torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True), whole)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_opcheck_and_gradients(upper, unit):
    a, b = _system(2, n=6)
    ours = [t.clone().requires_grad_() for t in (a, b)]
    exact = [t.double().requires_grad_() for t in (a, b)]
    torch.library.opcheck(OP.overload, (*ours, upper, unit))
    SOLVE(*ours, upper, unit).square().sum().backward()
    torch.linalg.solve_triangular(*exact, upper=upper, unitriangular=unit).square().sum().backward()
    for got, true in zip(ours, exact, strict=True):
        assert (got.grad - true.grad).abs().max() <= 100 * 2.0**-24 * true.grad.abs().max()


def test_bad_arguments():
    a, b = _system(2)
    with pytest.raises(ValueError, match="expected a"):
        SOLVE(a, b[:, :3], False, False)
    with pytest.raises(TypeError, match="float32"):
        SOLVE(a.double(), b.double(), False, False)

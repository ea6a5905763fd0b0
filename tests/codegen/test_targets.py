"""Targets are found, one of another package stands in for that of the same devices, and others are named."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llm42c.codegen import targets
from llm42c.codegen.ops import registry


class Toy(targets.Target):
    name, device_type, dispatch_key = "toy", "cpu", "CPU"


def test_targets_are_found_by_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {target.name for target in targets.targets()} == {"cpu", "cuda"}
    assert targets.of(torch.device("cpu")) is targets.named("cpu")
    with pytest.raises(targets.TargetUnavailableError, match="none for meta"):
        targets.of(torch.device("meta"))
    monkeypatch.setattr(targets, "_added", [])
    toy = Toy()
    targets.add(toy)
    assert targets.of(torch.device("cpu")) is toy
    assert {target.name for target in targets.targets()} == {"toy", "cuda"}


def test_the_layout_of_a_packed_weight_is_that_of_the_device_of_its_fake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.define()

    def packed(device: str) -> tuple[int, ...]:
        with FakeTensorMode():
            weight = torch.empty(100, 7, dtype=torch.bfloat16, device=device)
            found = torch.ops.llm42.linear_pack(weight)
            assert (found.dtype, found.device) == (weight.dtype, weight.device)
            assert torch.ops.llm42.linear_unpack(found, 100, 7).shape == weight.shape
        return tuple(found.shape)

    shapes = {device: packed(device) for device in ("cpu", "cuda")}
    assert len(set(shapes.values())) == 2, "one layout for both would hide that nobody asks"
    monkeypatch.setattr(targets, "_added", [])
    targets.add(Toy())
    assert packed("cpu") == (100, 7), "a target without a layout of its own"
    assert packed("cuda") == shapes["cuda"]


def test_references_take_the_weight_that_was_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel, and nobody's layout, is in the specification of a product."""
    x, weight, residual = torch.randn(3, 8), torch.randn(96, 8), torch.randn(3, 96)
    ops = registry.operators()
    product = x.double() @ weight.double().T
    monkeypatch.delattr(torch.ops, "llm42")
    assert torch.equal(ops["linear"].reference(x, weight, None, 96), product)
    added = ops["linear_add"].reference(x, weight, None, residual, 96)
    assert torch.equal(added, residual.double() + product.float())
    gated = ops["linear_silu_mul"].reference(x, weight, 48)
    assert torch.equal(gated, ops["silu_mul"].reference(product.float()))


def test_the_cost_of_a_product_is_its_own() -> None:
    """A fused product has more columns than its result; tensors are counted once each."""
    registry.load()
    x, weight = torch.ones(3, 8), torch.ones(96, 8)
    packed = torch.ops.llm42.linear_pack(weight)
    cost = registry.operators()["linear_silu_mul"].cost((x, packed, 48), torch.empty(3, 48))
    assert cost.flops == 2 * 3 * 8 * 96
    assert cost.bytes == 4 * (x.numel() + packed.numel() + 3 * 48)
    assert registry.operators()["rotary"].product is None

"""Targets are found, one of another package stands in for that of the same devices, and others are named."""

from __future__ import annotations

import pytest
import torch

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


def test_the_cost_of_a_product_is_its_own() -> None:
    """A fused product has more columns than its result; tensors are counted once each."""
    registry.load()
    x, weight = torch.ones(3, 8), torch.ones(96, 8)
    packed = torch.ops.llm42.linear_pack(weight)
    cost = registry.operators()["linear_silu_mul"].cost(x, packed, 48)
    assert cost.flops == 2 * 3 * 8 * 96
    assert cost.bytes == 4 * (x.numel() + packed.numel() + 3 * 48)
    assert registry.operators()["rotary"].product is None

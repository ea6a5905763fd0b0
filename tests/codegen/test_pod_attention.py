"""``llm42::pod_attention`` on a CPU: the bits of paged_attention, and the checked mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from paged_world import Heads, Runner, World, bits

from llm42c.codegen.ops import registry
from llm42c.codegen.ops.pod_attention import check_metadata

registry.load()


def hybrid() -> list[Any]:
    runner = Runner(World.make([40, 20, 1], Heads(sinks=True, window=17)))
    runner.call([(0, 39)])
    return runner.arguments([(0, 1), (1, 20), (2, 1)], padding=2)


def test_same_bits_as_paged_attention():
    a, b = hybrid(), hybrid()
    x = torch.ops.llm42.paged_attention(*a)
    y = torch.ops.llm42.pod_attention(*b, True)
    assert torch.equal(bits(x), bits(y))
    assert torch.equal(bits(a[3]), bits(b[3]))  # the caches, NaN where nothing was written
    assert x[:22].abs().min() < x[:22].abs().max()


def test_fake_agrees_with_the_operator():
    args = [x.nan_to_num() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in hybrid()]
    torch.library.opcheck(
        torch.ops.llm42.pod_attention.default, (*args, True), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (3, lambda t: t.index_fill(1, torch.tensor([0]), 99), r"block_table\[0, 0\] = 99"),
        (2, lambda t: t - 100, "less than the"),
        (2, lambda t: t + 1000, "more than"),
        (1, lambda t: t.flip(0), "cu_seqlens_q goes from"),
        (0, lambda t: t + 10**6, "neither -1 nor a slot"),
    ],
)
def test_inconsistent_metadata_is_an_error(position: int, change: Any, message: str):
    args = hybrid()
    metadata = list(args[5:9])
    check_metadata(args[3].shape[0], 16, len(args[0]), *metadata)
    metadata[position] = change(metadata[position])
    with pytest.raises(ValueError, match=message):
        check_metadata(args[3].shape[0], 16, len(args[0]), *metadata)

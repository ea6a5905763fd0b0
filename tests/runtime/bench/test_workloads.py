"""The workloads never change: results of years must compare."""

from __future__ import annotations

import hashlib
import struct

import pytest

from llm42c.errors import ConfigError
from llm42c.runtime.bench.workloads import WORKLOADS


def _digest(prompts: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(struct.pack(f"<I{len(prompt)}I", len(prompt), *prompt))
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "digest", "new_tokens", "sizes"),
    [
        ("mixed", "610d752d8ed993bc", 64, (1, 8, 32)),
        ("decode", "b442a18ae635e5d8", 128, (1, 8, 32)),
        ("long", "787bbedf4cb61bfd", 32, (4,)),
    ],
)
def test_tokens_are_the_published_ones(
    name: str, digest: str, new_tokens: int, sizes: tuple[int, ...]
) -> None:
    workload = WORKLOADS[name]
    assert _digest(workload.prompts(32)) == digest
    assert (workload.new_tokens, workload.sizes) == (new_tokens, sizes)
    assert workload.prompts(3) == workload.prompts(8)[:3]


@pytest.mark.parametrize("count", [0, 33, -1])
def test_a_workload_has_so_many_prompts(count: int) -> None:
    with pytest.raises(ConfigError, match="1 to 32"):
        WORKLOADS["mixed"].prompts(count)

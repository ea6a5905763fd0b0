"""Memory of KV caches: ordinary tensors, whatever pages they lie in."""

from __future__ import annotations

import gc
import mmap
import re
from pathlib import Path

import pytest
import torch

from llm42c import memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (3, 2, 700, 1024)])
def test_zeros_that_can_be_written(shape: tuple[int, ...], dtype: torch.dtype):
    x = memory.zeros(shape, dtype)
    assert (x.shape, x.dtype, x.is_contiguous()) == (shape, dtype, True)
    assert not x.any()
    x += 1
    gc.collect()
    assert (x == 1).all()


def test_two_tensors_share_nothing():
    a, b = (memory.zeros((1 << 20,), torch.float32) for _ in range(2))
    a += 1
    assert not b.any()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux only")
def test_large_pages_are_asked_for():
    x = memory.zeros((4 << 20,), torch.float32)
    assert {"hg", "sh"} & _flags(x.data_ptr()) == {"hg"}


def _flags(address: int) -> set[str]:
    """The kernel's flags of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    return set()


def test_systems_without_large_pages(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not memory.zeros((1 << 20,), torch.float32).any()


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="Linux only")
def test_pages_of_a_mapped_file_are_given_back_unless_written_to(tmp_path: Path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * (4 << 12))
    mapped = torch.from_file(str(file), shared=False, size=4 << 20, dtype=torch.uint8)
    before = mapped.clone()  # reads every page
    assert memory.forget(mapped) >= 4 << 20
    assert memory.forget(mapped) == 0
    assert torch.equal(mapped, before)
    mapped[1 << 20] += 1  # a page of this process's own: dropping it would lose the change
    assert memory.forget(mapped) == 0
    assert mapped[1 << 20] == before[1 << 20] + 1
    assert memory.forget(torch.ones(1 << 20)) == 0
    assert memory.forget(before.view(1024, 4096).t()) == 0

"""``llm42::apply_token_mask``: logits keep their bits or become minus infinity, on the CPU and in Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_masks import DTYPES, cases, same

from llm42c.codegen.ops import registry
from llm42c.codegen.ops.token_mask import apply_token_mask
from llm42c.codegen.triton import devices

registry.load()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_the_reference(dtype: torch.dtype) -> None:
    for logits, mask in cases(dtype):
        out = torch.ops.llm42.apply_token_mask(logits, mask)
        assert same(out, apply_token_mask.reference(logits, mask))
        assert out.is_contiguous()
        assert out.dtype == dtype
        if mask.shape[1] > 40:  # guards: something is kept, something is not, and the order of words counts
            assert 0 < int(out.isneginf().sum()) < out.numel()
            assert not same(out, apply_token_mask.reference(logits, mask.flip(1)))


@given(
    rows=st.integers(0, 9),
    vocab=st.integers(1, 130),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100, deadline=None)
def test_rows_are_their_own(rows: int, vocab: int, threads: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab + 3, generator=g)[:, :vocab]  # rows that are not one behind another
    mask = torch.randint(-(2**31), 2**31, (rows, -(-vocab // 32)), generator=g).int()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = torch.ops.llm42.apply_token_mask(logits, mask)
    finally:
        torch.set_num_threads(before)
    assert same(together, apply_token_mask.reference(logits, mask))
    for r in range(rows):
        alone = torch.ops.llm42.apply_token_mask(logits[r : r + 1], mask[r : r + 1])
        assert same(alone[0], together[r])


def test_opcheck() -> None:
    for logits, mask in cases(torch.float32):
        torch.library.opcheck(
            torch.ops.llm42.apply_token_mask.default,
            (logits, mask),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize(
    ("logits", "mask"),
    [
        (torch.zeros(2, 33), torch.zeros(2, 1).int()),
        (torch.zeros(2, 33), torch.zeros(1, 2).int()),
        (torch.zeros(2, 33), torch.zeros(2, 2)),
        (torch.zeros(2, 33), torch.zeros(2, 2).long()),
        (torch.zeros(33), torch.zeros(2).int()),
        (torch.zeros(2, 33).double(), torch.zeros(2, 2).int()),
        (torch.zeros(2, 33).int(), torch.zeros(2, 2).int()),
    ],
)
def test_bad_arguments(logits: torch.Tensor, mask: torch.Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match="apply_token_mask"):
        torch.ops.llm42.apply_token_mask(logits, mask)


def test_the_gpu_kernel_is_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("token_masks.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == [True] * len(found["same"])
    assert len(found["same"]) >= 9
    assert found["control"] is False


@pytest.mark.parametrize(
    "device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "AMD Instinct MI300X"]
)
def test_the_gpu_kernel_compiles_ahead_of_time(device: str) -> None:
    pytest.importorskip("triton")
    from llm42c.codegen.triton import token_mask

    target = devices.from_table(device)
    found = [kernel.compile(target).resources for kernel in token_mask.kernels(target)]
    assert len(found) == 2
    assert all(resources.spills == 0 for resources in found)

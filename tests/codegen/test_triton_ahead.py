"""Emitted kernels compile for devices that are not here and do not spill; cold imports."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys

import pytest
import spills

from llm42c.codegen.triton import devices, linear, pod_attention
from llm42c.codegen.triton.cost import Composition, choose
from llm42c.codegen.triton.spec import SCHEDULERS, SpecError, default_spec

H200 = devices.from_table("NVIDIA H200")
# Compiled by other tests: test_triton_reduce, test_fused_kernels, test_triton_binaries, test_triton_matrix.
ELSEWHERE = (
    "row_", "all_reduce", "multimem", "linear/m1", "linear/m3",
    *(f"pod_attention/{s}/roles" for s in SCHEDULERS),
)  # fmt: skip
LLAMA = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page": 16, "dtype": "bfloat16"}
DEVICES = ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "AMD Instinct MI300X")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_default_kernels_fit_and_do_not_spill(device: str):
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import kernels

    target = devices.from_table(device)
    attention = "pod_attention/persistent/uniform/d128"
    skipped = ELSEWHERE if target.arch == "sm_90" else (*ELSEWHERE, "pod_attention/")
    seen = set()
    for kernel in kernels(target):
        if kernel.label == attention or not kernel.label.startswith(skipped):
            found = kernel.compile(target).resources
            assert found.spills <= spills.allowed(), (kernel.label, found)
            assert found.shared <= target.get("shared_bytes"), (kernel.label, found)
            seen.add(kernel.label)
    assert {attention, "grouped_linear", "token_logprobs", "kv_write"} <= seen
    assert ("pod_attention/tickets/uniform/d128" in seen) == (target.arch == "sm_90")


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_specialisation_is_python(head_dim: int, scheduler: str):
    for dtype in ("bfloat16", "float16", "float32"):
        for page in (16, 48, 256):
            spec = default_spec(
                H200, heads=32, kv_heads=4, head_dim=head_dim, page=page, dtype=dtype, window=page,
                softcap=True, sinks=True, scheduler=scheduler,
            )  # fmt: skip
            text = pod_attention.emit(spec)
            ast.parse(text)
            assert "@" not in text.replace("@triton.jit", "")  # every placeholder was filled
            assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 72}, "head_dim"), ({"page": 24}, "page"), ({"kv_heads": 5}, "do not divide"),
        ({"dtype": "int8"}, "dtype"), ({"scheduler": "random"}, "scheduler"), ({"window": -1}, "window"),
    ],
)  # fmt: skip
def test_specialisations_that_do_not_exist(change: dict[str, object], message: str):
    with pytest.raises(SpecError, match=message):
        default_spec(H200, **{**LLAMA, **change})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="no multiple"):
        dataclasses.replace(default_spec(H200, **LLAMA), split=100)  # type: ignore[arg-type]


def test_the_cost_model_follows_the_batch():
    spec = default_spec(H200, **LLAMA)  # type: ignore[arg-type]
    pure = choose(Composition(decode_rows=64, decode_keys=4096), spec, H200)
    assert (pure.prefill_share, pure.decode_share) == (0, 1)
    balanced = choose(Composition(1024, 12288, 80, 12288), spec, H200)
    assert balanced.scheduler in ("tickets", "persistent")
    assert choose(Composition(64, 128, 200, 16384), spec, H200).scheduler == "partition"
    small = Composition(512, 4096, 8, 4096)
    assert choose(small, spec, H200).scheduler == "tickets"
    large = Composition(2048, 12288, 220, 12288)
    assert choose(large, spec, H200).scheduler == "persistent"


def test_buckets_of_one_target_share_an_instruction():
    assert all(m % 64 == 0 for m in linear.buckets(H200))
    specs = {m: linear.spec_for(H200, m, "bfloat16", True, False) for m in (1, 8, 64, 65, 1000)}
    assert {(s.columns, s.step) for s in specs.values()} == {(64, 64)}
    assert {s.rows for s in specs.values()} == {64, 128}


def test_importing_the_operators_and_emitters_needs_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from llm42c.codegen.ops import registry; registry.define()\n"
        "from llm42c.codegen.triton import devices\n"
        "from llm42c.codegen.triton import attention, linear, norm, sample, pod_attention, spec\n"
        "s = spec.default_spec(devices.from_table('NVIDIA H200'), heads=8, kv_heads=2, head_dim=64, page=16,"
        " dtype='bfloat16')\n"
        "assert 'tl.dot' in pod_attention.emit(s)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

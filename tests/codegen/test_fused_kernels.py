"""The fused all-reduce kernels: texts, grids, the interpreter with buffers as ranks, ahead of time."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import spills
import torch

from llm42c.codegen.ops import registry
from llm42c.codegen.triton import devices, symmetric
from llm42c.codegen.triton.all_reduce_norm import FORMS, FusedSpec, emit, emit_multimem, programs
from llm42c.codegen.triton.spec import SpecError

HERE = Path(__file__).parent
DEVICES = ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200")


@pytest.mark.parametrize("form", FORMS)
def test_every_specialisation_is_python(form: Any):
    for dtype, weight, cast in itertools.product(("bfloat16", "float32"), (True, False), (True, False)):
        for meetings, parts in ((True, (1, 2)), (False, (1,)), (False, (2,))):
            spec = FusedSpec(576, dtype, 4, form, weight, cast, meetings, parts)
            text = emit(spec)
            ast.parse(text)
            assert "@" not in text.replace("@triton.jit", "")  # every placeholder was filled
            assert max(map(len, text.splitlines())) <= 110
            assert ("atomic_cas" in text) == meetings


def test_specialisations_that_do_not_exist():
    with pytest.raises(SpecError, match="dtype"):
        FusedSpec(64, "int8", 2)
    with pytest.raises(SpecError, match="form"):
        FusedSpec(64, "float32", 2, "ring")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="0 ranks"):
        FusedSpec(64, "float32", 0)
    with pytest.raises(SpecError, match="no multiple of the 8"):
        emit_multimem(100, 2)
    with pytest.raises(SpecError, match="no flags"):
        programs("one", 10, 8, 16, 132)


@pytest.mark.parametrize("form", FORMS)
def test_the_grid_fits_the_pads_and_the_device(form: Any):
    for rows, world, pad in itertools.product((1, 7, 1000), (2, 8), (64, 2048)):
        grid = programs(form, rows, world, pad, 132)
        assert 1 <= grid <= min(132, pad // (4 * world))
        assert grid <= rows


def test_the_switch_adds_only_for_those_who_ask():
    """No group is enabled by anything but ``enable``, and no other kernel lets the switch add."""
    assert not symmetric.enabled("0")
    assert "multimem.ld_reduce" in emit_multimem(64, 2)  # control: the word is the instruction's
    for form, dtype, weight in itertools.product(FORMS, ("bfloat16", "float32"), (True, False)):
        assert "multimem" not in emit(FusedSpec(64, dtype, 2, form, weight))


def run(*program: str) -> dict[str, Any]:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / program[0]), *program[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return run("interpreted_fused.py")


@pytest.fixture
def interpreted(everything: dict[str, Any]) -> dict[str, Any]:
    return {name: found for name, found in everything.items() if name != "nobody waits"}


def test_without_waiting_the_sums_are_wrong(everything: dict[str, Any]):
    """Control: the check sees a rank that reads what the other has yet to add."""
    assert not everything["nobody waits"]["exact"]


def test_sums_are_in_rank_order_and_residuals_rounded_as_unfused(interpreted: dict[str, Any]):
    for name, found in interpreted.items():
        assert found["exact"], name
        assert found["same_on_all_ranks"], name


def test_norms_are_within_rounding_of_fp64(interpreted: dict[str, Any]):
    """Some 110 fp32 operations in fp32, a handful of roundings in fp16."""
    for name, found in interpreted.items():
        assert found["error"] <= (120 if "float32" in name else 8), (name, found["error"])


def test_forms_and_grids_give_the_same_bits(interpreted: dict[str, Any]):
    for key in ("torch.float32 2", "torch.float16 4"):
        assert len({interpreted[f"{form} {key}"]["digest"] for form in ("one", "two", "shard")}) == 1
    assert interpreted["other grid"]["digest"] == interpreted["two torch.float32 2"]["digest"]
    # Control: the digest sees another sum.
    assert interpreted["sum torch.float32 2"]["digest"] != interpreted["two torch.float32 2"]["digest"]


@pytest.mark.slow
def test_ranks_in_two_processes_meet():
    """Nothing is read too early, launches follow each other, and no flag is left standing."""
    for form, found in run("interpreted_meeting.py", "one", "two", "shard").items():
        assert found["exact"], form
        assert found["error"] < 1e-4, form
        assert found["flags_left"] == 0, form


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_compile_ahead_of_time_and_do_not_spill(device: str):
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import kernels

    target = devices.from_table(device)
    found = {k.label: k for k in kernels(target) if k.label.startswith(("all_reduce", "multimem"))}
    assert ("multimem_sum" in found) == (target.capability >= 90)
    for label, kernel in found.items():
        compiled = kernel.compile(target)
        assert compiled.resources.spills <= spills.allowed(), (label, compiled.resources)
        assert "atom" in compiled.asm["ptx"]
        assert "release.sys" in compiled.asm["ptx"].replace(".global", ""), label
        assert "acquire.sys" in compiled.asm["ptx"].replace(".global", ""), label


def test_operators_are_registered_for_both_devices():
    registry.define()
    for name in ("all_reduce", "all_reduce_add_rms_norm", "all_reduce_add_rms_norm_sharded", "gather_rows"):
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"llm42::{name}", key)

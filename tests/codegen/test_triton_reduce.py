"""Emitted row reductions: within fp64's bounds, alone or among other rows; ahead of time without spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm42c.codegen.triton import devices

pytest.importorskip("triton")
HERE = Path(__file__).parent
NAMES = ("row_sum", "row_softmax", "row_log_softmax", "running_sum", "running_product")


def test_row_reductions_are_within_their_bounds_and_know_no_other_row():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / "interpreted_reduce.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    ratios = json.loads(done.stdout.splitlines()[-1])
    assert len(ratios) == 3 * 6 + 4 + 6
    assert {k: v for k, v in ratios.items() if not v <= 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "device", ["NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "AMD Instinct MI300X"]
)
def test_row_reductions_do_not_spill(device: str):
    from llm42c.codegen.triton.catalog import kernels

    target = devices.from_table(device)
    found = {k.label: k.compile(target).resources.spills for k in kernels(target) if k.label in NAMES}
    assert found == dict.fromkeys(NAMES, 0)

"""One contract and one answer on every instruction set, with one thread or two, on the real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm42c.codegen.cpu import build

# What torch itself is told to use, so that the process is that of a machine without more.
TORCH = {"avx512_bf16": "avx512", "avx512": "avx512", "avx2": "avx2", "portable": "default"}


def _runs(isa: str, threads: tuple[int, ...]) -> list[dict[str, object]]:
    env = os.environ | {"LLM42_ISA": isa, "ATEN_CPU_CAPABILITY": TORCH[isa]}
    command = [sys.executable, str(Path(__file__).parent / "isa_demo.py"), "smollm2", *map(str, threads)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.model
@pytest.mark.slow
def test_machines_that_are_not_alike_share_a_contract_and_its_bits() -> None:
    flags = set(build.cpu_features().split())
    isas = [isa for isa in TORCH if build.NEEDS.get(isa, set()) <= flags]
    threads = {isa: (2,) if isa == "portable" and len(isas) > 1 else (1, 2) for isa in isas}  # it is slow
    found = [run for isa in isas for run in _runs(isa, threads[isa])]
    assert len(found) == sum(map(len, threads.values())) >= 2
    assert all(run == found[0] for run in found)
    for name in ("tokens", "logprobs"):
        alone, together = found[0][name]  # type: ignore[misc]
        assert alone == together

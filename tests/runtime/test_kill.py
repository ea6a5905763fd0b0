"""Processes killed at random times: who finishes the journal says what an undisturbed one says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_folder
from test_isa import TORCH

from llm42c.codegen.cpu import build

KILLS = 200


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_hundred_kills(tmp_path: Path) -> None:
    model = tiny_folder.save(tmp_path / "model")
    script = Path(__file__).parent / "kill_nursery.py"
    command = [sys.executable, str(script), str(model), str(tmp_path), str(KILLS), "11"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["kills"] == KILLS
    assert (seen["wrong"], seen["failed"]) == (0, 0)
    assert seen["in the middle"] > KILLS // 4, f"vacuous: {seen}"
    assert seen["finished after a kill"] > KILLS // 20


@pytest.mark.slow
def test_another_instruction_set_finishes_what_was_killed(tmp_path: Path) -> None:
    """`llm42 generate --journal`, killed, and `llm42 resume` on every other instruction set there is."""
    model = str(tiny_folder.save(tmp_path / "model"))
    flags = set(build.cpu_features().split())
    isas = [isa for isa in TORCH if build.NEEDS.get(isa, set()) <= flags]
    assert len(isas) > 1, "vacuous: this machine has no instruction set"
    way = [model, "w5 w6 w7", "w9 w5", "-n", "80", "--ignore-eos", "-t", "0.9", "--json"]
    wanted = llm42(isas[0], "generate", *way)
    journal, copy = tmp_path / "journal", tmp_path / "copy"
    arguments = ["generate", *way, "--journal", str(journal)]
    process = subprocess.Popen(command(*arguments), env=environment(isas[0]), stdout=subprocess.DEVNULL)
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 40):
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert 40 <= journal.read_bytes().count(b"\n") < 3 + 160, "vacuous: not killed in the middle"
    for isa in isas[1:]:
        shutil.copy(journal, copy)
        assert llm42(isa, "resume", str(copy), "--model", model, "--json") == wanted


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "llm42c", *arguments, "--kv-mb", "1"]


def environment(isa: str) -> dict[str, str]:
    return os.environ | {"LLM42_ISA": isa, "ATEN_CPU_CAPABILITY": TORCH[isa]}


def llm42(isa: str, *arguments: str) -> str:
    done = subprocess.run(
        command(*arguments), env=environment(isa), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

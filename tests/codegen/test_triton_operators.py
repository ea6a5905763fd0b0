"""Emitted kernels of experts, log-probabilities, other layouts of keys and dense pairs, interpreted."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm42c.codegen.ops import registry

HERE = Path(__file__).parent


def run(program: str) -> dict[str, Any]:
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, str(HERE / program)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    return run("interpreted_rows.py")


@pytest.fixture(scope="module")
def layouts() -> dict[str, Any]:
    return run("interpreted_layouts.py")


def test_every_operator_has_an_implementation_for_gpus():
    """None is left out; were there a reason to, it would stand here and in docs/gpu.md."""
    without = {
        name
        for name, op in registry.operators().items()
        if name not in registry.implemented("cuda") and "cuda" not in op.implementations
        if "cuda" in op.orders  # some are of CPUs: passes refuse to put them elsewhere
    }
    assert without == set()
    assert registry.implemented("cuda").keys() <= registry.operators().keys()


def test_implementations_take_the_arguments_of_their_operators():
    for name, launch in registry.implemented("cuda").items():
        schema = registry.operators()[name].schema.split("->")[0]
        wanted = [part.split()[-1].split("=")[0] for part in schema.split("(", 1)[1].rstrip(" )").split(", ")]
        wanted = [argument.split("!) ")[-1] for argument in wanted]
        assert list(inspect.signature(launch).parameters) == wanted, name


def test_experts_have_the_bits_of_linear_dense_whoever_shares_them(rows: dict[str, Any]):
    found = rows["experts"]
    assert found["error"] <= 1
    assert [k for k, same in found["same"].items() if not same] == []
    assert found["control"]


def test_work_lists_of_experts_hold_every_row_once(rows: dict[str, Any]):
    assert rows["work_lists"]


def test_logprobs(rows: dict[str, Any]):
    found = rows["logprobs"]
    assert found["error"] <= 1
    assert found["top_error"] <= 1
    assert [k for k, ok in found["checks"].items() if not ok] == []
    assert found["control"]


@pytest.mark.parametrize("case", range(2))
def test_layouts_of_keys_give_one_set_of_bits(layouts: dict[str, Any], case: int):
    found = layouts["varlen"][case]
    assert len(found["digests"]) == 5
    assert len(set(found["digests"])) == 1
    assert found["control"] not in found["digests"]
    assert max(found["errors"]) <= found["bound"]


def test_padding_and_hidden_keys_change_no_bits_of_dense_attention(layouts: dict[str, Any]):
    found = layouts["dense"]
    assert found["error"] <= found["bound"]
    assert found["padded"]
    assert found["alone"]
    assert found["control"]

"""Emitted kernels under Triton's interpreter: against fp64, and against themselves under other schedules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run(what: str) -> dict[str, Any]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py"), what],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def attention() -> dict[str, Any]:
    return run("attention")


@pytest.fixture(scope="module")
def operators() -> dict[str, Any]:
    return run("operators")


def test_the_batch_is_hybrid(attention: dict[str, Any]):
    prefills, decodes = attention["prefills_and_decodes"]
    assert prefills > 1
    assert decodes > 2  # one of the decoding sequences is split


def test_attention_is_within_its_bound(attention: dict[str, Any]):
    for variant in attention["variants"]:
        assert variant["error"] <= attention["bound"]


def test_bits_do_not_depend_on_who_runs_an_item(attention: dict[str, Any]):
    for uniform in (True, False):
        digests = {v["digest"] for v in attention["variants"] if v["uniform"] == uniform}
        assert len(digests) == 1


def test_order_is_visible_at_all(attention: dict[str, Any]):
    assert attention["another_split_changes_bits"]


def test_a_row_has_the_same_bits_in_either_role(attention: dict[str, Any]):
    assert attention["same_row_in_other_role"]


def test_sequences_without_room_for_splits_have_the_same_bits(attention: dict[str, Any]):
    assert attention["without_room_for_splits"]


def test_rows_of_no_sequence_are_zero(attention: dict[str, Any]):
    assert attention["padding_is_zero"]


@pytest.mark.parametrize("case", range(3))
def test_features(attention: dict[str, Any], case: int):
    found = attention["features"][case]
    assert found["error"] <= found["bound"]


def test_operators_are_within_their_bounds(operators: dict[str, Any]):
    assert {k: v for k, v in operators["ratios"].items() if not v <= 1} == {}


def test_sampled_tokens_are_those_of_the_specification(operators: dict[str, Any]):
    found = operators["sample"]
    assert found["token"] == found["want"]
    assert found["error"] < 1e-5
    assert found["nan"]

"""The scripts for a GPU run from end to end on the CPU at a tiny size, so that a GPU meets no new Python."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gpu"
# What a CPU, or a machine without the package, cannot have.
ONLY_A_GPU = {"torch varlen, one call", "error, torch varlen, one call"}
ONLY_WITH_FLASHINFER = {"FlashInfer POD", "error, FlashInfer POD"}


Row = dict[str, str]


def _dry_run(script: str, out: Path, **environment: str) -> list[Row]:
    """The rows of the CSV."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), "--dry-run", "--out", str(out)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_attention_script(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rows = _dry_run("pod.py", tmp_path / "pod.csv", TRITON_INTERPRET="1")
    missing = {row["what"] for row in rows if row["note"].startswith("not run")}
    assert missing <= ONLY_A_GPU | ONLY_WITH_FLASHINFER, missing
    errors = {r["what"]: r["note"] for r in rows if r["what"].startswith("error") and r["value"]}
    assert len(errors) >= 8, "every scheduler with both tiles, and two of torch's own"
    assert all(note.startswith("within the bound") for note in errors.values()), errors
    timed = {row["what"] for row in rows if row["unit"] == "ms" and row["value"]}
    assert {"our own pair, tuned", "our own pair, two streams", "the cost model's choice"} <= timed
    assert {"torch SDPA, two calls", "torch FlexAttention, two calls", "best serial pair"} <= timed
    against = {row["what"] for row in rows if row["case"] == "grid" and row["unit"] == "x serial"}
    assert {"our best scheduler", "our own pair, two streams", "the cost model's choice"} <= against


def test_the_engine_script(tmp_path: Path) -> None:
    rows = _dry_run("engine.py", tmp_path / "engine.csv")
    assert not [row for row in rows if row["note"].startswith("not run")]
    rates = {row["what"]: float(row["value"]) for row in rows if row["unit"] == "tokens/s"}
    plain = {"plain Inductor, one static batch", "llm42, stock, 0 %"}
    assert plain | {"llm42, 0 %", "llm42, 50 %", "llm42, 100 %", "llm42, stock, 100 %"} <= set(rates)
    assert all(rate > 0 for rate in rates.values())
    differ = {r["what"]: r for r in rows if r["what"].endswith("differ from solo")}
    assert len(differ) == 7
    assert {row["value"] for row in differ.values()} == {"0"}
    assert differ["llm42, 100 %: differ from solo"]["note"] == "of 3 requests"


@pytest.mark.parametrize("script", ["pod.py", "engine.py", "tokenweave.py"])
def test_without_a_gpu_nothing_is_measured(script: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(FOLDER / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no GPU here" in done.stdout


def test_the_token_weaving_script(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    rows = _dry_run("tokenweave.py", tmp_path / "tokenweave.csv")
    missing = {row["what"] for row in rows if row["note"].startswith("not run")}
    assert missing == {"communication hidden", "one kernel"}, "what needs several GPUs"
    times = {(row["case"], row["what"]) for row in rows if row["unit"] == "ms" and row["value"]}
    for case in ("16 tokens", "48 tokens"):
        assert {(case, what) for what in ("without communication", "whole", "woven")} <= times
    for case in ("1 x 64", "5 x 64"):
        assert {(case, what) for what in ("three calls", "one operator")} <= times
    assert {row["value"] for row in rows if row["what"] == "rows that differ"} == {"0"}
    assert [row for row in rows if row["what"] == "woven, predicted"]

"""The most memory that loading takes: the weights once, and one packed weight besides."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import load_peak
import pytest

MB = 1 << 20
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="peaks are read as Linux tells them"),
]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with a model of few large layers, and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
    weights = load_peak.save(folder, 5, num_key_value_heads=4, **sizes)
    assert weights > 600_000_000
    return folder, weights


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    load_peak.save(folder, 1, hidden_size=64, intermediate_size=128, num_attention_heads=2)
    return folder


def _run(way: str, folder: Path, ranks: int = 1) -> list[dict[str, Any]]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *(launcher if ranks > 1 else []), load_peak.__file__, way, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in re.findall(r"\{.*?\}", done.stdout)]  # ranks may share a line


@pytest.mark.parametrize("way", ["folder", "object"])
def test_loading_holds_the_weights_once(way: str, large: tuple[Path, int], small: Path) -> None:
    folder, weights = large
    (found,), (base,) = _run(way, folder), _run(way, small)
    # Half a gigabyte may be spent besides, which on a model of this size would hide a second copy.
    assert found["peak"] - base["peak"] < 1.2 * weights + 64 * MB
    assert found["released"] >= 5 * 7
    assert found["exact"]


def test_two_copies_would_be_seen(large: tuple[Path, int], small: Path) -> None:
    folder, weights = large
    (found,), (base,) = _run("keep", folder), _run("keep", small)
    assert found["peak"] - base["peak"] > 1.8 * weights
    assert found["released"] == 0


def test_a_rank_holds_its_own_part(large: tuple[Path, int], small: Path) -> None:
    folder, weights = large
    base = max(found["peak"] for found in _run("ranks", small, ranks=2))
    for found in _run("ranks", folder, ranks=2):
        assert found["peak"] - base < 1.2 * weights / 2 + 64 * MB

"""The main job on the real model, shortened: exit status, agreement, and what makes it no empty claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm42c import cli


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_agrees_alone_together_and_under_pressure(tmp_path: Path) -> None:
    out = tmp_path / "demo.json"
    assert cli.main(["demo", "--quick", "--control-tokens", "4", "--json", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["agree"] is True
    assert len({run["tokens_digest"] for run in data["runs"]}) == 1
    assert len({run["logprobs_digest"] for run in data["runs"]}) == 1
    assert all(run["requests"] == 6 for run in data["runs"])
    together, pressure = data["runs"][1]["stats"], data["runs"][2]["stats"]
    assert together["fast_tokens"] > 2 * together["fast_steps"], "requests did not share batches"
    assert pressure["ordinary_tokens"] > 0
    # The control shows that bits can differ; only in fp32 with several rows, and not on every CPU.
    assert data["control"]["logprobs_compared"] > 0

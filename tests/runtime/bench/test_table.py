"""Result files become Markdown tables."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from llm42c.runtime.bench.harness import write_csv

TABLE = Path(__file__).parents[3] / "benchmarks" / "table.py"


def test_a_result_file_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("bench_table", TABLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [{"engine": "a", "tok_s": 1.5, "empty": ""}, {"engine": "b", "tok_s": 2, "empty": ""}]
    write_csv(tmp_path / "x.csv", rows, command="llm42 bench", cpu="a cpu")
    module.main(tmp_path / "x.csv", [])
    expected = "| engine | tok_s |\n| --- | --- |\n| a | 1.5 |\n| b | 2 |\n\ncommand llm42 bench; cpu a cpu\n"
    assert capsys.readouterr().out == expected
    module.main(tmp_path / "x.csv", ["tok_s"])
    assert capsys.readouterr().out.startswith("| tok_s |\n")

"""The command line: a model as one of several ranks sees it, and the option ``--token-weave``."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_folder

from llm42c import cli
from llm42c.cli import exits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.save(tmp_path_factory.mktemp("tiny")))


def test_explain_divides_among_imagined_ranks(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sites, plan, costs and drawing, in one process."""
    drawing = tmp_path / "plan.dot"
    command = ["explain", model, "--ranks", "2", "--token-weave", "auto", "--draw", str(drawing)]
    assert cli.main([*command, "--link-gb-s", "0.001", "--link-us", "1"]) == 0
    page = capsys.readouterr().out
    assert "2 ranks; divided: " in page
    row = next(line.split() for line in page.splitlines() if line.startswith("allreduce_rmsnorm "))
    assert row[1:3] == ["4", "0"]  # sites matched, and not
    assert "4 of 4 collectives divided" in page
    assert "a collective 1 µs + bytes / 0.001 GB/s" in page
    assert "microseconds of n tokens" in page
    assert "woven: saves" in page
    assert drawing.read_text().startswith("digraph")


def test_explain_says_why_nothing_is_woven(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", model, "--token-weave", "auto"]) == 0
    assert "not woven: the graph has no all-reduce" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["explain", "MODEL", "--token-weave", "sometimes"],
            "--token-weave must be one of off, auto, always",
        ),
        (["generate", "MODEL", "--token-weave", "always", "w5"], "not divided among ranks"),
        (["explain", "MODEL", "--residual-shards"], "residual_shards=True, but"),
    ],
)
def test_what_cannot_be_had(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([model if a == "MODEL" else a for a in arguments]) not in (0, exits.FAILED)
    assert message in capsys.readouterr().err

"""What a process sees of `torchrun`: who speaks, and how its messages begin."""

from __future__ import annotations

import io

import pytest

from llm42c.cli import parallel


@pytest.mark.parametrize(
    ("rank", "size", "announced", "silent", "prefix"),
    [
        (None, None, False, False, "llm42: "),
        ("0", "1", False, False, "llm42: "),
        ("0", "2", True, False, "llm42 (rank 0): "),
        ("1", "2", True, True, "llm42 (rank 1): "),
    ],
)
def test_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    rank: str | None,
    size: str | None,
    announced: bool,
    silent: bool,
    prefix: str,
):
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert parallel.announced() == announced
    assert parallel.silent() == silent
    assert parallel.prefix() == prefix


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delenv("RANK", raising=False)
    with parallel.session():
        print("heard")
    assert capsys.readouterr().out == "heard\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("typed"))
    assert parallel.read_stdin() == "typed"

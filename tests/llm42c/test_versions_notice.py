"""A start on untested versions says so once, in one line, and goes on."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import tiny_folder
import torch

from llm42c import cli, versions
from llm42c.compile.compiler import ModelCompiler


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Versions that packages seem to have, beside the real ones."""
    fake: dict[str, str] = {}
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: fake.get(name) or real(name))
    versions.notice.cache_clear()
    yield fake
    versions.notice.cache_clear()


@pytest.mark.parametrize(
    ("package", "version", "tested"),
    [
        ("torch", "2.10.1", False),
        ("torch", "2.11.0", True),
        ("torch", "2.13.1+cpu", True),
        ("torch", "2.13.0a0+git", True),
        ("torch", "2.14.0", False),
        ("torch", "3.0", False),
        ("transformers", "5.16.3", False),
        ("transformers", "5.17.0", True),
        ("transformers", "5.24.2", True),
        ("transformers", "5.25.0.dev0", False),
        ("transformers", "4.99", False),
    ],
)
def test_one_line_for_an_untested_version(
    package: str, version: str, tested: bool, installed: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    installed[package] = version
    versions.notice()
    versions.notice()
    lines = [r.getMessage() for r in caplog.records if r.name == versions.__name__]
    assert len(lines) == (0 if tested else 1)
    for line in lines:
        assert f"{package} {version} was not tested" in line
        assert "\n" not in line


def test_an_engine_and_the_backend_say_it(
    installed: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    installed["torch"] = "2.99.0"
    ModelCompiler(tiny.model("llama"))
    assert [r.name for r in caplog.records].count(versions.__name__) == 1
    versions.notice.cache_clear()
    torch.compile(lambda x: x + 1, backend="llm42")(torch.ones(3))
    assert [r.name for r in caplog.records].count(versions.__name__) == 2


def test_the_command_line_says_it_on_stderr_and_goes_on(
    installed: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    installed["transformers"] = "5.99.0"
    model = str(tiny_folder.save(tmp_path))
    capsys.readouterr()
    assert cli.main(["contract", model]) == 0
    err = capsys.readouterr().err
    assert err.startswith("llm42: transformers 5.99.0 was not tested")
    assert err.count("\n") == 1

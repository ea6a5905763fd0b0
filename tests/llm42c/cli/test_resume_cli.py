"""`generate --journal` and `resume`: what they print, and what they say of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_folder

from llm42c import cli
from llm42c.cli import exits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.save(tmp_path_factory.mktemp("tiny")))


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    got = cli.main([*arguments, "--kv-mb", "1"])
    printed = capsys.readouterr()
    assert got == status, printed.err
    assert status == 0 or printed.err.count("\n") == 1
    return printed.out if status == 0 else printed.err


@pytest.mark.parametrize("json_out", [True, False])
@pytest.mark.parametrize("prompts", [["w5 w6 w7"], ["w5 w6 w7", "w9"]])
def test_resume_prints_what_generate_would_have(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], prompts: list[str], json_out: bool
) -> None:
    form, path = (["--json"] if json_out else []), tmp_path / "journal"
    way = ["generate", model, *prompts, "-n", "30", "--ignore-eos", "-t", "0.9", *form]
    wanted = run(capsys, *way)
    assert run(capsys, *way, "--journal", str(path)) == wanted
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 31 * len(prompts)
    for whole, rest in ((len(lines), b""), (len(lines) // 2, b"[0,5"), (1 + len(prompts), b"")):
        path.write_bytes(b"".join(lines[:whole]) + rest)
        assert run(capsys, "resume", str(path), "--model", model, *form) == wanted
        assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_what_cannot_be_resumed_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal"
    way = ["generate", model, "w5 w6", "-n", "9", "--ignore-eos", "--journal", str(path)]
    run(capsys, *way)
    resume = ["resume", str(path), "--model", model]
    assert "finish it with llm42 resume" in run(capsys, *way, status=exits.BAD_INPUT)
    assert "deterministic" in run(capsys, *way, "--no-deterministic", status=exits.BAD_INPUT)

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[3].replace(",", ", ", 1), *lines[4:]]))
    assert "line 4: damaged" in run(capsys, *resume, status=exits.BAD_INPUT)
    for left in ("", lines[0], lines[0] + lines[1][:100]):
        path.write_text(left)
        assert "holds no request" in run(capsys, *resume, status=exits.BAD_INPUT)
    run(capsys, *way)  # as the line above says
    assert path.read_text().splitlines(keepends=True) == lines
    path.write_text(lines[1])
    assert "finish it with llm42 resume" in run(capsys, *way, status=exits.BAD_INPUT)
    path.unlink()
    assert "cannot read" in run(capsys, *resume, status=exits.BAD_INPUT)


def test_another_model_is_refused_by_its_fields(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "journal"
    run(capsys, "generate", model, "w5 w6", "-n", "9", "--journal", str(path))
    from llm42c.runtime import sealed
    from llm42c.runtime.contract import Contract

    head, line = path.read_text().splitlines()[:2]
    state = json.loads(line)
    state["contract"]["weights"] = "0" * 64
    state["contract_hash"] = Contract(**state["contract"]).hash
    del state["sha256"]
    path.write_text(f"{head}\n{sealed.seal('llm42_state', 1, state)}\n")
    said = run(capsys, "resume", str(path), "--model", model, status=exits.BAD_INPUT)
    assert "pins another contract: weights: 00000" in said

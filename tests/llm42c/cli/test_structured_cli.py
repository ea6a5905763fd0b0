"""`generate --json-schema`, `--regex`, `--choice` and `--grammar`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_folder

from llm42c import cli
from llm42c.cli import exits

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Bo"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.save_letters(tmp_path_factory.mktemp("letters")))


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    got = cli.main([*arguments, "--kv-mb", "1"])
    printed = capsys.readouterr()
    assert got == status, printed.err
    return printed.out if status == 0 else printed.err


def test_what_is_printed_is_what_was_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "list.lark").write_text('start: item ("," item)*\nitem: /[a-z]{1,3}/\n')
    way = ["generate", model, "Say it:", "And:", "-n", "60", "-t", "1.0", "--json"]
    for asked, is_right in (
        (["--json-schema", str(tmp_path / "schema.json")], lambda t: json.loads(t)["name"] in ("Ann", "Bo")),
        (["--regex", r"\d{3}-[a-f]+"], lambda t: re.fullmatch(r"\d{3}-[a-f]+", t)),
        (["--choice", "yes", "--choice", "no, never"], lambda t: t in ("yes", "no, never")),
        (["--grammar", str(tmp_path / "list.lark")], lambda t: re.fullmatch("[a-z]{1,3}(,[a-z]{1,3})*", t)),
    ):
        receipts = tmp_path / "receipts"
        answers = [
            json.loads(line) for line in run(capsys, *way, *asked, "--receipt", str(receipts)).splitlines()
        ]
        assert len(answers) == 2
        assert all(a["finish_reason"] == "length" or is_right(a["text"]) for a in answers)
        assert any(a["finish_reason"] == "stop" for a in answers)
        said = run(capsys, "replay", str(receipts), "--model", model)
        assert said.count("exact") == 2


def test_what_cannot_be_asked_for_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text("{")
    words = tiny_folder.save(tmp_path / "words")
    capsys.readouterr()
    for arguments, said in (
        ([model, "w5", "-n", "9", "--json-schema", str(tmp_path / "bad.json")], "json_schema cannot be used"),
        ([model, "w5", "-n", "9", "--json-schema", str(tmp_path / "missing")], "cannot read the schema"),
        ([model, "w5", "-n", "9", "--regex", "("], "regex cannot be used"),
        ([model, "w5", "-n", "9", "--regex", "a", "--choice", "b"], "exclude each other"),
        ([str(words), "w5", "-n", "9", "--regex", "a"], "llguidance cannot read this tokenizer"),
    ):
        error = run(capsys, "generate", *arguments, status=exits.BAD_INPUT)
        assert said in error
        assert error.count("\n") == 1

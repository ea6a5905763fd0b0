"""`generate --receipt`, `replay` and `score`: what they print, and what they say of bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_folder

from llm42c import cli
from llm42c.cli import exits
from llm42c.passes import pipeline

PROMPTS = ["w5 w6 w7", "w9 w5 w9 w5 w9"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder.save(tmp_path_factory.mktemp("tiny")))


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> list[dict[str, Any]]:
    got = cli.main([*arguments, "--kv-mb", "1"])
    printed = capsys.readouterr()
    assert got == status, printed.err
    return [json.loads(line) for line in printed.out.splitlines()]


def test_receipts_are_replayed_and_scored(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "receipts.jsonl"
    way = ["-n", "20", "--ignore-eos", "-t", "0.9", "--seed", "7", "--speculate", "auto"]
    answers = run(capsys, "generate", model, "--json", *way, "--receipt", str(path), *PROMPTS)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in lines] == [a["token_ids"] for a in answers]

    results = run(capsys, "replay", str(path), "--model", model, "--json")
    assert [r["verdict"] for r in results] == ["exact"] * 2

    asked = [{"prompt": p, "completion": a["token_ids"]} for p, a in zip(PROMPTS, answers, strict=True)]
    (tmp_path / "score.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    scores = run(capsys, "score", model, str(tmp_path / "score.jsonl"))
    assert [s["logprobs"] for s in scores] == [a["logprobs"] for a in answers]
    assert [s["total"] for s in scores] == [sum(a["logprobs"]) for a in answers]

    data = bytearray(path.read_bytes())
    data[len(lines[0]) // 2] ^= 128  # no UTF-8 any more
    path.write_bytes(data)
    results = run(capsys, "replay", str(path), "--model", model, "--json", status=exits.FAILED)
    assert [r["verdict"] for r in results] == ["damaged", "exact"]

    path.write_text(lines[0] + "\n")
    (result,) = run(
        *(capsys, "replay", str(path), "--model", model, "--json", "--fast", "stock")
    )  # the form that decodes is no part of the contract
    assert result["verdict"] == "exact"


def test_a_receipt_shows_the_pass_that_it_was_made_with(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "receipts.jsonl", tmp_path / "score.jsonl"
    way = [model, PROMPTS[0], "-n", "9", "--ignore-eos", "--dtype", "bfloat16", "--receipt", str(path)]
    (answer,) = run(capsys, "generate", *way, "--json", "--pass", "two_chains")
    assert "linear_blocks" in json.loads(path.read_text())["contract"]["orders"]
    (result,) = run(capsys, "replay", str(path), "--model", model, "--json")
    assert result["verdict"] == "exact"
    asked.write_text(json.dumps({"prompt": PROMPTS[0], "completion": answer["token_ids"]}))
    way = ["score", model, str(asked), "--dtype", "bfloat16"]
    (same,), (other,) = (run(capsys, *way, *more) for more in (["--pass", "two_chains"], []))
    assert same["logprobs"] == answer["logprobs"]
    assert same["contract"] == answer["contract"] != other["contract"]
    monkeypatch.setattr(pipeline, "ON_REQUEST", ())  # control: nobody knows the pass
    (result,) = run(capsys, "replay", str(path), "--model", model, "--json", status=exits.FAILED)
    assert result["verdict"] == "another contract"


def test_a_receipt_of_another_model_names_what_differs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "receipt.json"
    run(capsys, "generate", model, "--json", "-n", "4", "--receipt", str(path), "--dtype", "float32", "w5")
    other = json.loads(path.read_text())
    from llm42c.runtime.contract import Contract
    from llm42c.runtime.receipt import Receipt

    receipt = Receipt.from_json(path.read_text())
    fields = other["contract"] | {"weights": "0" * 64}
    moved = Receipt(
        Contract(**fields),
        *(receipt.prompt, receipt.params, receipt.tokens, receipt.chain),
        *(receipt.finish_reason, receipt.stop_reason),
    )
    path.write_text(moved.to_json() + "\n")
    (result,) = run(capsys, "replay", str(path), "--model", model, "--json", status=exits.FAILED)
    assert result["verdict"] == "another contract"
    assert [f.partition(":")[0] for f in result["fields"]] == ["weights"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "1 is no JSON object"),
        ('{"prompt": "w5"}', "1 is no JSON object"),
        ('{"prompt": "w5", "completion": ""}', "completion must be"),
        ('{"prompt": 5, "completion": "w5"}', "prompt must be"),
        ('{"prompt": [5], "completion": [5000]}', "outside the vocabulary"),
        ("", "nothing to score"),
    ],
)
def test_what_cannot_be_scored_is_one_line(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(line + "\n")
    assert cli.main(["score", model, str(path), "--kv-mb", "1"]) == exits.BAD_INPUT
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_no_receipt_at_all(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("\n")
    for path, words in (("empty", "no receipt to replay"), ("missing", "cannot read")):
        assert cli.main(["replay", str(tmp_path / path), "--model", model]) == exits.BAD_INPUT
        assert words in capsys.readouterr().err


def test_a_signed_receipt_is_checked_with_the_public_key(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    for name in "ab":
        key = Ed25519PrivateKey.generate()
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
        (tmp_path / f"{name}.pem").write_bytes(private)
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    path, unsigned = tmp_path / "signed", tmp_path / "unsigned"
    way = ["generate", model, "--json", "-n", "4"]
    run(capsys, *way, "--receipt", str(path), "--sign", str(tmp_path / "a.pem"), *PROMPTS)
    run(capsys, *way, "--receipt", str(unsigned), *PROMPTS[:1])
    replay = ["replay", str(path), str(unsigned), "--model", model, "--json", "--public-key"]
    for name, verdicts in (("a", ["exact", "exact", "unsigned"]), ("b", ["another key"] * 2 + ["unsigned"])):
        found = run(capsys, *replay, str(tmp_path / f"{name}.pub"), status=exits.FAILED)
        assert [r["verdict"] for r in found] == verdicts
    run(capsys, "replay", str(path), "--model", model, "--public-key", str(tmp_path / "a.pub"), "--json")
    assert cli.main([*way, "--sign", str(tmp_path / "a.pem"), "w5"]) == exits.BAD_INPUT
    assert "--receipt FILE" in capsys.readouterr().err

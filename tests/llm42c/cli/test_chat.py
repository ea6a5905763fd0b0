"""`llm42 chat`: what is typed, and what comes back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tiny_folder
import transformers as hf

from llm42c import cli
from llm42c.cli import chat, exits

TEMPLATE = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:"
LIMITS = ("-n", "12", "--kv-mb", "1", "-t", "1.0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_folder.save_letters(tmp_path_factory.mktemp("letters"))
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str, *lines: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", model, *LIMITS]) == 0
    return capsys.readouterr().out


def test_a_conversation_comes_again(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ("Hello", "And then?", "/again", f"/receipt {tmp_path / 'r.json'}")
    first = talk(monkeypatch, capsys, model, *lines)
    assert "the same tokens and log-prob bits" in first
    assert talk(monkeypatch, capsys, model, *lines) == first
    assert json.loads((tmp_path / "r.json").read_text())["contract_hash"]
    other = talk(monkeypatch, capsys, model, "/seed 7", *lines[:2])
    assert other.splitlines()[0] != first.splitlines()[0], "this model says one thing whatever the noise"


def test_another_seed_is_another_answer(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = talk(monkeypatch, capsys, model, "Hello", "/seed 7", "/again")
    assert "another answer: the seed has changed" in said


def test_what_was_said_before_counts_until_reset(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = talk(monkeypatch, capsys, model, "Hello")
    assert talk(monkeypatch, capsys, model, "Well", "/reset", "Hello").endswith(alone)
    assert not talk(monkeypatch, capsys, model, "Well", "Hello").endswith(alone)
    assert not talk(monkeypatch, capsys, model, "/system Be brief", "Hello").endswith(alone)


def test_wrong_words_are_answered_and_end_nothing(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = talk(
        monkeypatch, capsys, model, "/nonsense", "/seed x", "/receipt", "/help", "Hello", "/exit", "Not"
    )
    for part in ("/nonsense is no command", "/seed takes an integer", "there is no answer yet", "/again"):
        assert part in said


def test_a_model_without_a_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(tiny_folder.save(tmp_path)), *LIMITS]) == exits.BAD_INPUT
    assert "has no chat template" in capsys.readouterr().err


def test_an_interrupted_answer_is_no_part_of_the_conversation(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = chat.Conversation._stream, []

    def stream(self: chat.Conversation, request_id: str) -> object:
        calls.append(len(self.messages))
        if len(calls) == 2:

            def interrupted() -> None:
                raise KeyboardInterrupt

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.built.engine, "step", interrupted)
                return real(self, request_id)
        return real(self, request_id)

    monkeypatch.setattr(chat.Conversation, "_stream", stream)
    talk(monkeypatch, capsys, model, "One", "Two", "Three")
    assert calls == [0, 2, 2]

"""The prompts that ship with the project."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm42c.errors import RequestError
from llm42c.hub import models
from llm42c.prompts import load_prompts


def test_there_are_enough_of_many_lengths() -> None:
    prompts = load_prompts()
    assert len(prompts) >= 24
    assert len({p.name for p in prompts}) == len({p.text for p in prompts}) == len(prompts)
    lengths = [len(p.text) for p in prompts]
    assert min(lengths) < 100 < 1000 < max(lengths)
    assert any(p.chat for p in prompts)
    assert not all(p.chat for p in prompts)


@pytest.mark.model
def test_one_is_longer_than_600_tokens() -> None:
    tokenizer = models.load_tokenizer("smollm2")
    lengths = {p.name: len(p.token_ids(tokenizer)) for p in load_prompts()}
    assert max(lengths.values()) > 600
    assert min(lengths.values()) < 16
    chat = next(p for p in load_prompts() if p.chat)
    assert tokenizer.decode(chat.token_ids(tokenizer)).startswith("<|im_start|>")


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        load_prompts(tmp_path / "absent")
    with pytest.raises(RequestError, match=r"no \*.txt"):
        load_prompts(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="not UTF-8"):
        load_prompts(tmp_path)
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(RequestError, match="is empty"):
        load_prompts(tmp_path)


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "b.chat.txt").write_text("a question\n")
    (tmp_path / "a.txt").write_text("a text\n\n")
    first, second = load_prompts(tmp_path)
    assert (first.name, first.text, first.chat) == ("a", "a text\n", False)
    assert (second.name, second.text, second.chat) == ("b", "a question", True)

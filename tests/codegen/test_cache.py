"""The user's cache folder keeps what was used last, up to a number."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm42c.codegen import cache


@pytest.fixture
def folder(own_cache: Path) -> Path:
    """Five entries, the last of them the newest, and a file of another kind that is older."""
    folder = cache.place("programs")
    assert folder is not None
    for age, name in enumerate(["4.json", "3.json", "2.json", "1.json", "0.json", "other.txt"]):
        (folder / name).write_text(name)
        os.utime(folder / name, (1e9 - age, 1e9 - age))
    return folder


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_oldest_go_and_other_files_stay(folder: Path) -> None:
    cache.keep_newest("programs", ".json", 2)
    assert _names(folder) == {"4.json", "3.json", "other.txt"}


def test_what_was_used_counts_as_new(folder: Path) -> None:
    cache.used(folder / "0.json")
    cache.keep_newest("programs", ".json", 2)
    assert _names(folder) == {"0.json", "4.json", "other.txt"}


def test_fewer_than_the_number_all_stay(folder: Path) -> None:
    before = _names(folder)
    cache.keep_newest("programs", ".json", 5)
    assert _names(folder) == before


def test_a_folder_that_is_not_there_is_no_error(own_cache: Path) -> None:
    cache.keep_newest("programs", ".json", 2)
    cache.used(own_cache / "none")

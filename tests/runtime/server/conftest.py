"""One tiny model for all files of a worker; each file has a server and an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import tiny_folder
from serving import TEMPLATE, Running, build, running

from llm42c.runtime.loader import BuiltEngine


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BuiltEngine]:
    folder = tiny_folder.save_letters(tmp_path_factory.mktemp("letters"))
    made = build(folder)
    made.tokenizer.chat_template = TEMPLATE
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(built: BuiltEngine) -> Iterator[Running]:
    with running(built.variant(), built.tokenizer) as up:
        yield up

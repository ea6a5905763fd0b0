"""What holds for every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm42c.codegen import cache

KEPT = ("kernels", "models", "targets", "triton")  # what is costly to make, and no test can spoil


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: a worker that takes one at the end would work alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What was imported by now stays: without this the garbage collector goes through it again and again."""
    gc.freeze()


def _links(folder: Path, kept: tuple[str, ...] = KEPT) -> Path:
    """Make `folder` a cache folder whose parts in `kept` are the present one's."""
    now = cache.folder()
    (folder / "llm42").mkdir(parents=True, exist_ok=True)
    for part in kept:
        (now / part).mkdir(parents=True, exist_ok=True)
        if not (folder / "llm42" / part).exists():
            (folder / "llm42" / part).symlink_to((now / part).resolve())
    return folder


def _of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share, and no other run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def run_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Certificates and stored graphs of this run: none of an earlier one is read, none is left behind.

    Workers share graphs, which are functions of their key; each has certificates of its own.
    """
    own = tmp_path_factory.getbasetemp() / "cache"
    graphs = _of_the_run(tmp_path_factory) / "graphs"
    graphs.mkdir(exist_ok=True)
    (own / "llm42").mkdir(parents=True)
    (own / "llm42" / "programs").symlink_to(graphs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(_links(own)))
        yield own


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Certificates and stored graphs of this test alone."""
    own = _links(tmp_path / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(own))
    return own


@pytest.fixture(scope="module")
def own_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the module's own, models included; kernels are compiled once."""
    own = _links(tmp_path_factory.mktemp("cache"), ("kernels",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own))
        yield own

"""What the compiler's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from llm42c.codegen import cache
from llm42c.codegen.ops import registry


@pytest.fixture(scope="module")
def own_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the module's own, but for kernels: those are compiled once."""
    registry.load()
    kernels = cache.folder() / "kernels"
    own = tmp_path_factory.mktemp("cache")
    (own / "llm42").mkdir()
    (own / "llm42" / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(own))
        yield own

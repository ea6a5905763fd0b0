"""`llm42 version`."""

from __future__ import annotations

import importlib.metadata
import platform


def version() -> None:
    """Print the versions that results depend on."""
    for name in ("llm42c", "torch", "transformers"):
        print(f"{name} {importlib.metadata.version(name)}")
    print(f"python {platform.python_version()} on {platform.machine()}")

"""llm42: reproducible batched LLM decoding through torch.compile."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names and the module that holds each: imported on first use, so that `import llm42c` is cheap
# and registers nothing.
_EXPORTS = {
    "explain": "llm42c.inspect.explanation",
    "Options": "llm42c.options",
    "Engine": "llm42c.runtime.engine",
    "EngineConfig": "llm42c.runtime.config",
    "SamplingParams": "llm42c.runtime.sampling",
    "deterministic": "llm42c.runtime.hf",
}
__all__ = [*_EXPORTS, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'llm42c' has no attribute {name!r}")

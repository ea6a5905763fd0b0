"""The model "llm42" of lm-evaluation-harness.

``python -m llm42c.scoring ARGUMENTS`` is ``lm_eval ARGUMENTS`` that knows ``--model llm42``; in Python,
``llm42c.scoring.register()`` comes before ``lm_eval.simple_evaluate(model="llm42", …)``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm42c.runtime.harness import HarnessModel

__all__ = ["HarnessModel", "main", "register"]


def register() -> type:
    """Let the harness of this process know the model; returns its class. Raises ConfigError."""
    from llm42c.runtime import harness

    return harness.register()


def __getattr__(name: str) -> Any:
    if name == "HarnessModel":
        from llm42c.runtime import harness

        return harness.HarnessModel
    raise AttributeError(f"module 'llm42c.scoring' has no attribute {name!r}")


def main() -> None:
    """The harness's own command line."""
    from llm42c.errors import Llm42Error

    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except Llm42Error as error:
        print(f"llm42: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

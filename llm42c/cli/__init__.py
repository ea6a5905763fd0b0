"""The ``llm42`` command: :func:`main` is its entry point; each command has a file of its own.

Mistakes of the user (``llm42c.errors``, unknown options) end in one line on stderr and exit code 2. With
``llm42 --debug COMMAND`` they end in a traceback. Under ``torchrun`` all ranks run the command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm42c.cli import exits, parallel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line given by `arguments` (default: ``sys.argv[1:]``); returns the exit status."""
    from llm42c.cli.app import app

    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with parallel.session():
            return app(args, prog_name="llm42", standalone_mode=False) or 0
    except Exception as error:
        if args[:1] == ["--debug"]:
            raise
        return _explain(error)
    except KeyboardInterrupt:
        return exits.INTERRUPTED


def _explain(error: Exception) -> int:
    from typer import Abort

    from llm42c.errors import Llm42Error

    if isinstance(error, Abort):
        return exits.INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `llm42 ... | head`
        sys.stderr.close()
        return exits.FAILED
    message = getattr(error, "format_message", None)  # what typer raises for a wrong command line
    if message is not None or isinstance(error, Llm42Error):
        _say(message() if message else str(error))
        return exits.BAD_INPUT
    _say(f"{type(error).__name__}: {error} (llm42 --debug shows where)")
    return exits.FAILED


def _say(text: str) -> None:
    print(parallel.prefix() + " ".join(text.split()), file=sys.stderr)

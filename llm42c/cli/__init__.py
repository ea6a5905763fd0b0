"""The ``llm42`` command: :func:`main` is its entry point; each command has a file of its own.

Mistakes of the user (``llm42c.errors``, unknown options) end in one line on stderr and exit code 2. With
``llm42 --debug COMMAND`` they end in a traceback. Under ``torchrun`` all ranks run the command.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence

from llm42c.cli import exits, parallel


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line given by `arguments` (default: ``sys.argv[1:]``); returns the exit status."""
    from llm42c.cli.app import app

    args = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with parallel.session(), warnings_on_stderr():
            return app(args, prog_name="llm42", standalone_mode=False) or 0
    except Exception as error:
        if args[:1] == ["--debug"]:
            raise
        return _explain(error)
    except KeyboardInterrupt:
        return exits.INTERRUPTED


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """What llm42 logs as a warning or worse is one line on stderr, while a command runs."""
    logger, handler = logging.getLogger("llm42c"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{parallel.prefix()}%(message)s"))
    handler.setLevel(logging.WARNING)
    if parallel.silent():  # the first rank says what concerns them all
        handler.setLevel(logging.ERROR)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _explain(error: Exception) -> int:
    from typer import Abort

    from llm42c.errors import IntegrityError, Llm42Error

    if isinstance(error, Abort):
        return exits.INTERRUPTED
    if isinstance(error, BrokenPipeError):  # `llm42 ... | head`
        sys.stderr.close()
        return exits.FAILED
    message = getattr(error, "format_message", None)  # what typer raises for a wrong command line
    if message is not None or isinstance(error, Llm42Error):
        _say((message() if message else str(error)) + _hint(error))
        return exits.FAILED if isinstance(error, IntegrityError) else exits.BAD_INPUT
    _say(f"{type(error).__name__}: {error} (llm42 --debug shows where)")
    return exits.FAILED


def _hint(error: Exception) -> str:
    """What an option's own message does not say."""
    if getattr(error, "option_name", None) in ("--model", "-m"):
        return " MODEL is an argument: llm42 COMMAND MODEL"
    context = getattr(error, "ctx", None)
    return f" ({context.command_path} --help lists what it takes)" if context is not None else ""


def _say(text: str) -> None:
    print(parallel.prefix() + " ".join(text.split()), file=sys.stderr)

"""A command under `torchrun`: every rank runs it, rank 0 speaks."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from llm42c.errors import RankFailureError


def announced() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def silent() -> bool:
    """Whether this process is a rank that writes no results."""
    return announced() and os.environ["RANK"] != "0"


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Join the ranks for the time of a command; all but rank 0 write to nowhere.

    A RankFailureError ends this process at once, after its message: the threads of a broken collective need
    not end, and would keep it.
    """
    if not announced():
        yield
        return
    from llm42c.parallel import ranks

    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(ranks.joined())
            if silent():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            yield
    except RankFailureError as error:
        print(f"{prefix()}{error}", file=sys.stderr, flush=True)
        os._exit(1)


def read_stdin() -> str:
    """Standard input, which only rank 0 can read."""
    from llm42c.parallel import ranks

    text: str = ranks.world().share("" if silent() else sys.stdin.read())
    return text


def prefix() -> str:
    """What an error message of this process begins with."""
    return f"llm42 (rank {os.environ['RANK']}): " if announced() else "llm42: "

"""Requests run to their ends, and what came of them on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llm42c.cli import exits
from llm42c.cli.common import print_json
from llm42c.cli.parallel import silent

if TYPE_CHECKING:
    from llm42c.runtime.journal import Journal
    from llm42c.runtime.loader import BuiltEngine
    from llm42c.runtime.outputs import RequestOutput


def open_journal(path: Path | None, end: int = 0) -> Journal | None:
    """A journal behind the first `end` bytes; under `torchrun` rank 0 has it. Raises ConfigError."""
    if path is None or silent():
        return None
    from llm42c.runtime.journal import Journal

    return Journal(path, end)


def run(
    built: BuiltEngine,
    ids: Sequence[str],
    *,
    echo: bool = False,
    report: Any = None,
    journal: Journal | None = None,
) -> list[RequestOutput]:
    """The finished outputs of requests `ids`, in their order. What is new goes to `journal` first."""
    count, done = 0, {}
    while built.engine.has_unfinished():
        outputs = built.engine.step()
        if journal is not None:
            journal.take(outputs)
        for output in outputs:
            count += len(output.new_token_ids)
            if echo:
                print(output.new_text, end="", flush=True)
            if output.finished:
                done[output.request_id] = output
        if report is not None:
            report(count)
    return [done[i] for i in ids]


def show(built: BuiltEngine, outputs: Sequence[RequestOutput], json_out: bool, streamed: bool) -> None:
    """Print finished outputs; of a streamed one the end of the line. Exits where one has failed."""
    for i, output in enumerate(outputs):
        if json_out:
            print_json(
                {
                    "index": i,
                    "text": output.text,
                    "token_ids": output.token_ids,
                    "logprobs": output.logprobs,
                    "top_logprobs": output.top_logprobs,
                    "finish_reason": output.finish_reason,
                    "limit": output.limit,
                    "error": output.error,
                    "contract": built.engine.contract.hash,
                }
            )
        elif streamed:
            print()
        else:
            print(f"--- {i + 1}\n{output.text}")
    failed = [output.error for output in outputs if output.error]
    if failed:
        print(f"llm42: {failed[0]}", file=sys.stderr)
        raise typer.Exit(exits.FAILED)

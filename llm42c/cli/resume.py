"""`llm42 resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm42c.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    FastOption,
    KvOption,
    PassOption,
    SpeculateOption,
    VerifyOption,
    open_engine_of,
    progress_bars,
)
from llm42c.cli.running import open_journal, run, show
from llm42c.errors import RequestError


def resume(
    journal: Annotated[
        Path, typer.Argument(metavar="JOURNAL", help="What generate --journal FILE has written.")
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="What the journal is of.")] = DEFAULT_MODEL,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    verify: VerifyOption = "auto",
    kv_mb: KvOption = 256,
    speculate: SpeculateOption = "off",
    passes: PassOption = None,
    json_out: Annotated[bool, typer.Option("--json", help="One line of JSON a prompt.")] = False,
) -> None:
    """Finish what generate --journal FILE began, bit for bit, and print the whole of it."""
    from llm42c.runtime.journal import Journal

    states, end = Journal.read(journal)
    if not states:
        raise RequestError(f"{journal} holds no request: generate was ended before it began; run it again")
    with progress_bars() as report:
        built = open_engine_of(
            states[0].contract,
            model,
            report,
            device=device,
            fast=fast,
            verify=verify,
            kv_mb=kv_mb,
            speculate=speculate,
            passes=passes,
        )
        names = [built.engine.resume(state) for state in states]
        record = open_journal(journal, end)
        if record is not None:
            for name, state in zip(names, states, strict=True):
                record.go_on(name, state)
        total = sum((state.params.max_tokens or 0) - len(state.tokens) for state in states)
        outputs = run(built, names, report=lambda n: report("decoding", n, total), journal=record)
    if len(outputs) == 1 and not json_out:
        print(outputs[0].text, end="")  # as generate shows a single one
    show(built, outputs, json_out, len(outputs) == 1)

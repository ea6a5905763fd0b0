"""`llm42 replay`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm42c.cli import exits
from llm42c.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    FastOption,
    KvOption,
    PassOption,
    VerifyOption,
    open_engine_of,
    print_json,
    progress_bars,
    read_lines,
)
from llm42c.errors import ReceiptError, RequestError

if TYPE_CHECKING:
    from llm42c.runtime.receipt import Receipt, ReplayResult


def replay(
    receipts: Annotated[
        list[Path],
        typer.Argument(metavar="RECEIPT...", help="Files with a receipt a line; '-' is stdin."),
    ],
    model: Annotated[str, typer.Option("--model", "-m", help="What the receipts are of.")] = DEFAULT_MODEL,
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key", metavar="PUB.pem", help="Only receipts signed with its other half count."
        ),
    ] = None,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    verify: VerifyOption = "auto",
    kv_mb: KvOption = 256,
    passes: PassOption = None,
    json_out: Annotated[bool, typer.Option("--json", help="One line of JSON a receipt.")] = False,
) -> None:
    """Do again what receipts say was done, in few passes, and compare every token and log-prob bit."""
    from llm42c.runtime.receipt import Receipt

    lines = [(f"{path}:{n}", text) for path in receipts for n, text in read_lines(path, "surrogateescape")]
    if not lines:
        raise RequestError("there is no receipt to replay")
    key = None
    if public_key is not None:
        from llm42c.runtime.signing import read_public_key

        key = read_public_key(public_key)
    read = {name: _read(text, key) for name, text in lines}
    first = next((r for r in read.values() if isinstance(r, Receipt)), None)
    built = None
    if first is not None:
        with progress_bars() as report:
            built = open_engine_of(
                *(first.contract, model, report),
                device=device,
                fast=fast,
                verify=verify,
                kv_mb=kv_mb,
                passes=passes,
            )
    exact = True
    for name, receipt in read.items():
        if isinstance(receipt, Receipt):
            assert built is not None
            result = built.engine.replay(receipt)
        else:
            result = receipt
        exact &= result.verdict == "exact"
        if json_out:
            print_json({"receipt": name, **dataclasses.asdict(result)})
        else:
            print(f"{name}: {result.detail}")
    if not exact:
        raise typer.Exit(exits.FAILED)


def _read(text: str, public_key: str | None) -> Receipt | ReplayResult:
    from llm42c.runtime.receipt import Receipt, ReplayResult, signature_result

    try:
        receipt = Receipt.from_json(text)
    except ReceiptError as error:
        return ReplayResult("damaged", str(error))
    refused = None if public_key is None else signature_result(receipt, public_key)
    return refused or receipt

"""`llm42 explain`, `llm42 certify` and `llm42 contract`: what the compiler and the engine say of a model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from llm42c.cli.common import (
    DtypeOption,
    FastOption,
    JsonFileOption,
    ModelArgument,
    open_engine,
    out,
    parse_dtype,
    print_json,
    progress_bars,
    write_json,
)

if TYPE_CHECKING:
    from llm42c.compiler import CompiledModel
    from llm42c.runtime.engine import Engine


def explain(
    model: ModelArgument,
    dtype: DtypeOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of the example prompt.")] = 8,
) -> None:
    """Say which pass fired where in the model, why the others did not, and what has no fixed order."""
    with progress_bars() as report:
        report("loading", 0, 0)
        from llm42c import models

        loaded, _ = models.load_model(model, parse_dtype(dtype))
        report("compiling", 0, 0)
        import torch

        from llm42c.explanation import explain as explain_model

        found = explain_model(loaded, {"input_ids": torch.arange(tokens).unsqueeze(0), "use_cache": False})
    print(found)


def certify(
    model: ModelArgument,
    dtype: DtypeOption = None,
    fast: FastOption = "pinned",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Largest batch to certify, in tokens.")
    ] = 512,
    json_file: JsonFileOption = None,
) -> None:
    """Compare every batch shape of the fast graph with the verifier graph, bit for bit."""
    with progress_bars() as report:
        config: dict[str, Any] = {"max_num_batched_tokens": max_tokens, "max_num_seqs": min(32, max_tokens)}
        built = open_engine(model, report, dtype=dtype, fast=fast, **config)
        engine = built.engine
        shapes = engine.config.shapes()
        engine.certificates.may_run(deterministic=True)
        for shape in shapes:
            engine.certificates.want(shape)
        while engine.certificates.advance():
            report("certifying", len(engine.certificates.status), len(shapes))
    table = Table("tokens", "logits rows", "state", title=f"{model}, {fast}")
    for shape in shapes:
        tokens, rows = shape
        table.add_row(str(tokens), str(rows), engine.certificates.status[shape])
    out.print(table)
    for line in _culprits(built.compiler.compile(built.fast), engine):
        print(line)
    print(f"contract {engine.contract.hash}")
    if json_file is not None:
        states = [{"tokens": t, "rows": r, "state": engine.certificates.status[t, r]} for t, r in shapes]
        write_json(json_file, {"contract": engine.contract.hash, "shapes": states})


def _culprits(fast: CompiledModel, engine: Engine) -> list[str]:
    """For each token count with an uncertified shape, the call that depends on the batch."""
    from llm42c.culprit import find_culprit

    reference = engine.config.verify_tokens
    sizes = {tokens for (tokens, _), state in engine.certificates.status.items() if state != "certified"}
    lines = []
    for tokens in sorted(sizes - {reference}):
        found = find_culprit(fast, *sorted((tokens, reference)))
        lines.append(f"{tokens} tokens: {found or 'no single call depends on the batch'}")
    return lines


def contract(
    model: ModelArgument,
    dtype: DtypeOption = None,
    fast: FastOption = "pinned",
    json_out: Annotated[bool, typer.Option("--json", help="Print it as one line of JSON.")] = False,
) -> None:
    """Print what the bits of this model's deterministic answers depend on, and its hash."""
    with progress_bars() as report:
        value = open_engine(model, report, dtype=dtype, fast=fast).engine.contract
    fields = dataclasses.asdict(value)
    if json_out:
        print_json({"hash": value.hash, **fields})
        return
    print(f"hash {value.hash}")
    for name, field in fields.items():
        if isinstance(field, dict):
            for key, inner in sorted(field.items()):
                print(f"{name}.{key} {inner}")
        else:
            print(f"{name} {field}")

"""`llm42 explain`, `llm42 certify` and `llm42 contract`: what the compiler and the engine say of a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from llm42c.cli.common import (
    DeviceOption,
    DtypeOption,
    FastOption,
    JsonFileOption,
    ModelArgument,
    PassOption,
    TokenWeaveOption,
    choice,
    open_engine,
    out,
    parse_dtype,
    print_json,
    progress_bars,
    write_json,
)
from llm42c.cli.parallel import silent
from llm42c.errors import ConfigError
from llm42c.options import TokenWeave

if TYPE_CHECKING:
    from llm42c.compile.compiler import CompiledModel
    from llm42c.passes.base import Pass
    from llm42c.runtime.engine import Engine


_PIPELINES = ("engine", "compile")


def explain(
    model: ModelArgument,
    dtype: DtypeOption = None,
    which: Annotated[
        str | None,
        typer.Option(
            "--pipeline",
            help="engine: the graph that generate runs; compile: what torch.compile(backend='llm42') makes. "
            "Default: engine, and compile with the options below.",
        ),
    ] = None,
    passes: PassOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of compile's example prompt.")] = 8,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=2, help="As one of so many ranks sees it; under torchrun: all of them."),
    ] = None,
    token_weave: TokenWeaveOption = "off",
    residual_shards: Annotated[
        bool, typer.Option("--residual-shards", help="Divide the residual stream among the ranks.")
    ] = False,
    link_gb_s: Annotated[
        float, typer.Option("--link-gb-s", min=1e-6, help="With --ranks: bandwidth of the imagined link.")
    ] = 10.0,
    link_us: Annotated[
        float, typer.Option("--link-us", min=1e-6, help="With --ranks: latency of a collective.")
    ] = 20.0,
    target: Annotated[
        Path | None, typer.Option("--target", help="JSON with the rates of another device and its link.")
    ] = None,
    draw: Annotated[
        Path | None, typer.Option("--draw", metavar="FILE", help="Write the woven graph: .dot or .mmd.")
    ] = None,
) -> None:
    """Say which pass fired where in the model, why others did not, what Inductor compiles, and the orders.

    This is about the engine's graph, which generate runs; --pipeline compile is about torch.compile.
    """
    weaves = token_weave != "off" or residual_shards or ranks is not None or target is not None
    pipeline = choice("--pipeline", which or ("compile" if weaves or draw else "engine"), _PIPELINES)
    if pipeline == "engine":
        if weaves or draw:
            raise ConfigError("--pipeline engine takes none of the options of token weaving: leave them out")
        _explain_engine(model, dtype, passes or ())
        return
    options: dict[str, Any] = {
        "token_weave": choice("--token-weave", token_weave, get_args(TokenWeave)),
        "residual_shards": residual_shards,
        "target": None if target is None else str(target),
        "passes": _found(passes or ()),
    }
    with progress_bars() as report:
        report("loading", 0, 0)
        from llm42c.hub import models

        loaded, _ = models.load_model(model, parse_dtype(dtype))
        report("compiling", 0, 0)
        import torch

        from llm42c.inspect.explanation import explain as explain_model

        ids = torch.arange(tokens).unsqueeze(0)
        with _divided(loaded, ranks) as line:
            link = None
            if ranks is not None and token_weave != "off" and target is None:
                from llm42c.inspect.imagined import with_link

                link = with_link(link_gb_s, link_us)
            found = explain_model(loaded, {"input_ids": ids, "use_cache": False}, options, target=link)
    if line:
        print(f"{line}\n")
    print(found)
    if draw is not None and not silent():
        found.draw(draw)


def _found(passes: Sequence[str]) -> Sequence[Pass]:
    """Looked up before a model is loaded."""
    if not passes:
        return ()
    from llm42c.compile.added_passes import find_passes

    return find_passes(passes)


def _explain_engine(model: str, dtype: str | None, passes: Sequence[str]) -> None:
    wanted, added = parse_dtype(dtype), _found(passes)
    with progress_bars() as report:
        report("loading", 0, 0)
        from llm42c.hub import models

        loaded, _ = models.load_model(model, wanted)
        report("compiling", 0, 0)
        from llm42c.compile.compiler import ModelCompiler
        from llm42c.inspect.explanation import explain_engine
        from llm42c.parallel import ranks

        compiler = ModelCompiler(loaded, strict=False, ranks=ranks.world(), passes=added)
        compiler.compile(release=True)
        found = explain_engine(compiler)
    print(found)


@contextlib.contextmanager
def _divided(model: Any, size: int | None) -> Iterator[str]:
    """The model among the ranks of `torchrun`, or among imagined ones; what was divided, or nothing."""
    from llm42c.parallel import ranks

    place = ranks.world()
    if place.size > 1:
        if size is not None and size != place.size:
            raise ConfigError(f"--ranks {size}, and torchrun has started {place.size}")
        from llm42c.parallel.tensor_parallel import divide

        yield f"{place.size} ranks; {divide(model, place).text()}"
    elif size is not None:
        from llm42c.inspect.imagined import imagined_ranks

        with imagined_ranks(model, size) as division:
            yield f"{size} ranks; {division.text()}"
    else:
        yield ""


def certify(
    model: ModelArgument,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Largest batch to certify, in tokens.")
    ] = 512,
    full: Annotated[
        bool, typer.Option("--full", help="Compare even what is certified by construction.")
    ] = False,
    json_file: JsonFileOption = None,
) -> None:
    """Say which batch shapes give the verifier graph's bits; where it takes a comparison, make it."""
    with progress_bars() as report:
        config: dict[str, Any] = {"max_num_batched_tokens": max_tokens, "max_num_seqs": min(32, max_tokens)}
        built = open_engine(model, report, dtype=dtype, device=device, fast=fast, **config)
        engine = built.engine
        shapes = engine.config.shapes()
        engine.certificates.settle_all(
            lambda: report("certifying", len(engine.certificates.status), len(shapes)), full
        )
        states = engine.certificates.states()
    table = Table("tokens", "logits rows", "state", title=f"{model}, {fast}")
    for shape in shapes:
        tokens, rows = shape
        table.add_row(str(tokens), str(rows), states[shape])
    out.print(table)
    for line in _culprits(built.compiler.compile(built.fast), engine):
        print(line)
    print(f"contract {engine.contract.hash}")
    if json_file is not None:
        found = [{"tokens": t, "rows": r, "state": states[t, r]} for t, r in shapes]
        write_json(json_file, {"contract": engine.contract.hash, "shapes": found})


def _culprits(fast: CompiledModel, engine: Engine) -> list[str]:
    """For each token count with an uncertified shape, the call that depends on the batch."""
    from llm42c.inspect.culprit import find_culprit

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
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    json_out: Annotated[bool, typer.Option("--json", help="Print it as one line of JSON.")] = False,
) -> None:
    """Print what the bits of this model's deterministic answers depend on, and its hash."""
    with progress_bars() as report:
        built = open_engine(model, report, dtype=dtype, device=device, fast=fast)
    value, foreign = built.engine.contract, built.compiler.compile("pinned").computation.foreign
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
    if foreign:
        calls = ", ".join(f"{name} ×{count}" for name, count in foreign.items())
        print(f"not computed by llm42, hence the machine: {calls}")

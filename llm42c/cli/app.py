"""The list of commands. Nothing heavy is imported before a command runs, so that --help is quick."""

from __future__ import annotations

from typing import Annotated

import typer

from llm42c.cli import (
    bench,
    bench_serve,
    cache,
    chat,
    demo,
    doctor,
    generate,
    inspect,
    kernels,
    plan,
    quantize,
    replay,
    resume,
    score,
    serve,
    survey,
    version,
)

app = typer.Typer(
    help="Reproducible batched LLM decoding.",
    no_args_is_help=False,
    add_completion=True,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    show_version: Annotated[bool, typer.Option("--version", help="As the command.")] = False,
) -> None:
    """Reproducible batched LLM decoding: per request, bit for bit."""
    if show_version:
        version.version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("resume")(resume.resume)
app.command("replay")(replay.replay)
app.command("score")(score.score)
app.command("serve")(serve.serve)
bench.app.command("serve")(bench_serve.serve)
app.add_typer(bench.app, name="bench")
app.add_typer(plan.app, name="plan")
app.command("explain")(inspect.explain)
app.command("certify")(inspect.certify)
app.command("contract")(inspect.contract)
app.command("inspect")(kernels.inspect)
app.command("quantize")(quantize.quantize)
app.command("survey")(survey.survey)
app.command("cache")(cache.cache)
app.command("doctor")(doctor.doctor)
app.command("version")(version.version)

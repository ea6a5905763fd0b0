"""`llm42 serve`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm42c.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    FastOption,
    ModelArgument,
    PassOption,
    PlannedKvOption,
    PlannedSpeculateOption,
    PlanOption,
    VerifyOption,
    engine_options,
    err,
    open_engine,
    progress_bars,
    read_text,
)
from llm42c.cli.parallel import announced
from llm42c.errors import ConfigError

if TYPE_CHECKING:
    from llm42c.runtime.contract import Contract
    from llm42c.runtime.server.listen import Served
    from llm42c.runtime.server.settings import Settings

    Run = Callable[[Any, Served, Contract], None]

_PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model: ModelArgument = DEFAULT_MODEL,
    host: Annotated[str, typer.Option("--host")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 is any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What requests call the model; default: MODEL.")
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic/--no-deterministic", help="What a request is that does not say."),
    ] = True,
    api_keys: Annotated[
        Path | None, typer.Option("--api-keys", metavar="FILE", help="A key a line; others are refused.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="TLS, in PEM.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Of the certificate.")] = None,
    max_num_seqs: Annotated[
        int | None,
        typer.Option("--max-num-seqs", help="Requests that run at once; default 32, or the plan's."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", help="Tokens of prompt and output; default: the model's.")
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Requests that may wait; further ones get 429.")
    ] = 256,
    max_body_mb: Annotated[int, typer.Option("--max-body-mb", min=1)] = 2,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a request may take.")] = 600.0,
    write_timeout: Annotated[
        float, typer.Option("--write-timeout", help="Seconds that a client may read nothing.")
    ] = 30.0,
    drain: Annotated[
        float, typer.Option("--drain", help="Seconds for accepted requests after SIGTERM.")
    ] = 30.0,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FILE", help="Keep exact answers of deterministic requests there."),
    ] = None,
    cache_mb: Annotated[int, typer.Option("--cache-mb", min=1, help="Of the cache.")] = 256,
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    verify: VerifyOption = "auto",
    kv_mb: PlannedKvOption = None,
    speculate: PlannedSpeculateOption = None,
    plan: PlanOption = None,
    passes: PassOption = None,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Engines of one contract, in processes of Ray Serve.")
    ] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Of each replica; default: its share of the cores.")
    ] = None,
    hedge_ms: Annotated[
        float | None,
        typer.Option(
            "--hedge-ms", min=0, help="Without news for so long, a second replica does the request too."
        ),
    ] = None,
) -> None:
    """Serve MODEL to OpenAI's clients, with answers that can be checked, resumed and repeated."""
    _check_packages(replicas, threads, hedge_ms)
    from llm42c.runtime.server import listen
    from llm42c.runtime.server.settings import Settings

    settings = Settings(
        model=name or model,
        deterministic=deterministic,
        max_queue=max_queue,
        max_body_bytes=max_body_mb * 2**20,
        timeout_s=timeout,
        write_timeout_s=write_timeout,
        drain_s=drain,
        cache_path=cache,
        cache_bytes=cache_mb * 2**20,
        api_keys=() if api_keys is None else _keys(api_keys),
    )
    listen.check_certificate(certificate, key)
    listener = listen.bind(host, port)
    options = {
        "dtype": dtype,
        "device": device,
        "fast": fast,
        "verify": verify,
        "kv_mb": kv_mb,
        "speculate": speculate,
        "plan": plan,
        "passes": passes,
        "max_num_seqs": max_num_seqs,
        "max_model_len": max_model_len,
    }
    scheme = "http" if certificate is None else "https"
    shown = f"[{host}]" if ":" in host else host
    where = f"{scheme}://{shown}:{listener.getsockname()[1]}/v1"

    def run(app: Any, served: Served, contract: Contract) -> None:
        def ready() -> None:
            err.print(f"{settings.model} at {where}, contract {contract.hash}", soft_wrap=True)

        listen.serve(app, served, listener, certificate=certificate, key=key, ready=ready)

    if replicas == 1:
        _one(model, settings, options, run)
    else:
        hedge_s = None if hedge_ms is None else hedge_ms / 1000
        _several(model, settings, options, run, replicas, threads or _share(replicas), hedge_s)


def _one(model: str, settings: Settings, options: dict[str, Any], run: Run) -> None:
    """An engine in this process."""
    from llm42c.runtime.server.app import make_app
    from llm42c.runtime.server.service import Service

    with progress_bars() as report:
        built = open_engine(model, report, **options)
    service = Service(built.engine, built.tokenizer, settings)
    run(make_app(service), service, service.contract)


def _several(
    model: str,
    settings: Settings,
    options: dict[str, Any],
    run: Run,
    replicas: int,
    threads: int,
    hedge_s: float | None,
) -> None:
    """Engines in processes of Ray Serve, and the router in this one."""
    from llm42c.hub import models
    from llm42c.runtime.server.replicas import on_ray
    from llm42c.runtime.server.replicas.places import Places, agree
    from llm42c.runtime.server.replicas.router import Router, make_router_app

    models.resolve(model)
    blueprint = on_ray.Blueprint(
        os.path.abspath(model) if os.path.exists(model) else model,
        settings,
        engine_options(model, **options),
        threads,
    )
    with contextlib.ExitStack() as stack:
        with progress_bars() as report:
            report(f"starting {replicas} replicas", 0, 0)
            found = stack.enter_context(on_ray.cluster(replicas, blueprint))
            contract = agree([one.name for one in found], [one.first_state() for one in found])
        router = Router(Places(found, contract), settings, hedge_s)
        run(make_router_app(router), router, contract)


def _share(replicas: int) -> int:
    """Cores of each replica."""
    return max(1, len(os.sched_getaffinity(0)) // replicas)


def _check_packages(replicas: int, threads: int | None, hedge_ms: float | None) -> None:
    """Raises ConfigError for what is missing, and for what does not go together."""
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'llm42c[serve]'")
    if announced():
        raise ConfigError("llm42 serve runs in one process, not under torchrun")
    if replicas > 1 and importlib.util.find_spec("ray") is None:
        raise ConfigError("replicas need Ray: pip install 'llm42c[serve,ray]'")
    for name, given in (("--threads", threads), ("--hedge-ms", hedge_ms)):
        if replicas == 1 and given is not None:
            raise ConfigError(f"{name} is for --replicas of 2 or more")


def _keys(path: Path) -> tuple[str, ...]:
    """Raises RequestError or ConfigError."""
    keys = tuple(line.strip() for line in read_text("API keys", path).splitlines() if line.strip())
    if not keys:
        raise ConfigError(f"{path} holds no API key")
    return keys

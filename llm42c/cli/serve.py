"""`llm42 serve`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

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
    err,
    open_engine,
    progress_bars,
    read_text,
)
from llm42c.cli.parallel import announced
from llm42c.errors import ConfigError

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
) -> None:
    """Serve MODEL to OpenAI's clients, with answers that can be checked, resumed and repeated."""
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'llm42c[serve]'")
    if announced():
        raise ConfigError("llm42 serve runs in one process, not under torchrun")
    from llm42c.runtime.server.listen import bind, check_certificate
    from llm42c.runtime.server.listen import serve as run
    from llm42c.runtime.server.service import Service
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
    check_certificate(certificate, key)
    listener = bind(host, port)
    with progress_bars() as report:
        built = open_engine(
            model,
            report,
            dtype=dtype,
            device=device,
            fast=fast,
            verify=verify,
            kv_mb=kv_mb,
            speculate=speculate,
            plan=plan,
            passes=passes,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        )
    service = Service(built.engine, built.tokenizer, settings)
    scheme = "http" if certificate is None else "https"
    shown = f"[{host}]" if ":" in host else host
    where = f"{scheme}://{shown}:{listener.getsockname()[1]}/v1"

    def ready() -> None:
        err.print(f"{settings.model} at {where}, contract {service.contract.hash}", soft_wrap=True)

    run(service, listener, certificate=certificate, key=key, ready=ready)


def _keys(path: Path) -> tuple[str, ...]:
    """Raises RequestError or ConfigError."""
    keys = tuple(line.strip() for line in read_text("API keys", path).splitlines() if line.strip())
    if not keys:
        raise ConfigError(f"{path} holds no API key")
    return keys

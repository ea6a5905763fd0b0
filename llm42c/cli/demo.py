"""`llm42 demo`: the main job, with its table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

from llm42c.cli import exits, parallel
from llm42c.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    FastOption,
    JsonFileOption,
    ModelArgument,
    Report,
    TokenWeaveOption,
    VerifyOption,
    check_device,
    choice,
    open_engine,
    out,
    progress_bars,
    write_json,
)
from llm42c.errors import ConfigError
from llm42c.prompts import load_prompts

if TYPE_CHECKING:
    from llm42c.runtime.demo.control import Control
    from llm42c.runtime.demo.job import DemoResult, Job

QUICK_PROMPTS, QUICK_TOKENS = 6, 48


def demo(
    model: ModelArgument = DEFAULT_MODEL,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Folder of *.txt prompts; default: the ones shipped.")
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=1, help="Tokens to decode for each prompt.")
    ] = 96,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    verify: VerifyOption = "auto",
    token_weave: TokenWeaveOption = "off",
    control: Annotated[
        str, typer.Option("--control", help="Plain PyTorch to compare with: eager, inductor, off.")
    ] = "eager",
    control_tokens: Annotated[
        int, typer.Option("--control-tokens", min=1, help="Tokens for it to decode.")
    ] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of the order of arrival.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help=f"{QUICK_PROMPTS} prompts, {QUICK_TOKENS} tokens.")
    ] = False,
    json_file: JsonFileOption = None,
) -> None:
    """Decode real prompts alone, together, and under pressure, and compare tokens and log-probs bit for bit.

    Exit status 0 only if every deterministic request agrees in all three.
    """
    backend = choice("--control", control, ("eager", "inductor", "off"))
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise ConfigError(f"cannot write {json_file}: no such folder")
    texts = load_prompts(prompts)
    if quick:
        texts, tokens = texts[:QUICK_PROMPTS], min(tokens, QUICK_TOKENS)
        control_tokens = min(control_tokens, tokens)
    with progress_bars() as report:
        built = open_engine(model, report, device=device, fast=fast, verify=verify, token_weave=token_weave)
        from llm42c.runtime.demo import job

        named = [(p.name, p.token_ids(built.tokenizer)) for p in texts]
        jobs = job.make_jobs(named, tokens)
        result = job.run_demo(built, jobs, report, seed=seed)
        if backend != "off" and not parallel.silent():
            built.close()
            del built
            result.control = _control(model, device, named, control_tokens, backend, report)
    _show(result, jobs, model)
    if json_file is not None:
        write_json(json_file, result.as_dict())
    if not result.agree:
        raise typer.Exit(exits.FAILED)


def _control(
    model: str, device: str, named: list[tuple[str, list[int]]], tokens: int, backend: Any, report: Report
) -> Control:
    import torch

    from llm42c.hub import models
    from llm42c.runtime.demo.control import run_control

    report("control", 0, 2 * len(named))
    plain, _ = models.load_model(model, torch.float32)
    return run_control(plain.to(check_device(device)), named, tokens, backend=backend, progress=report)


def _show(result: DemoResult, jobs: list[Job], model: str) -> None:
    lengths = sorted(len(job.prompt) for job in jobs)
    shape = f"{len(jobs)} prompts of {lengths[0]} to {lengths[-1]} tokens"
    title = f"{model}: {shape}, {jobs[0].params.max_tokens} new tokens each"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    table.add_column("run", no_wrap=True)
    for name in (
        "tokens",
        "log-prob bits",
        "differ",
        "tokens/s",
        "certi-\nfied",
        "roll-\nbacks",
        "pre-\nempted",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for run in result.runs:
        stats = run.stats
        table.add_row(
            run.name,
            run.tokens_digest[:12],
            run.logprobs_digest[:12],
            str(len(run.differ)),
            f"{run.rate:.1f}",
            f"{100 * stats['certified_share']:.0f} %",
            str(stats["rollbacks"]),
            str(stats["preemptions"]),
        )
    out.print(table)
    for run in result.runs:
        if run.differ:
            print(f"{run.name}: these differ from running alone: {', '.join(run.differ)}")
    shapes = ", ".join(f"{count} {state}" for state, count in result.shapes.items()) or "none"
    probing = sum(run.stats["seconds_probe"] for run in result.runs)
    print(f"batch shapes: {shapes} (probing took {probing:.1f} s, not counted in tokens/s)")
    print(f"contract {result.contract}")
    if result.control:
        _show_control(result.control)
    print("every deterministic request agrees bit for bit" if result.agree else "BITS DIFFER")


def _show_control(control: Control) -> None:
    print(
        f"control: plain PyTorch ({control.backend}, fp32), alone against batches: "
        f"{len(control.differ)} of {control.requests} prompts differ in log-prob bits, "
        f"{len(control.tokens_differ)} in text; {control.logprobs_differ} of {control.logprobs_compared} "
        f"log-probs differ, by up to {control.max_difference:.1e}"
    )

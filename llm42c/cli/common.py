"""Options that commands share, the terminal, and loading a model with a progress bar."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from llm42c.cli.parallel import announced, read_stdin, silent
from llm42c.errors import ConfigError, ModelNotFoundError, RequestError
from llm42c.options import TokenWeave

if TYPE_CHECKING:
    from llm42c.runtime.contract import Contract
    from llm42c.runtime.loader import BuiltEngine

DEFAULT_MODEL = "smollm2"
DTYPES = ("bfloat16", "float16", "float32")


def _is_there(context: typer.Context, name: str) -> str:
    """MODEL itself, once it is known to name something: before torch is imported, and at once."""
    from llm42c.hub import models

    try:
        models.require(name)
    except ModelNotFoundError as error:
        if context.info_name != "generate":
            raise
        raise ModelNotFoundError(f"{error}; prompts come after it: llm42 generate MODEL PROMPT") from error
    return name


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", callback=_is_there, help="A folder, a GGUF file, a hub id, or 'smollm2'."
    ),
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help=f"{', '.join(DTYPES)}; default: the checkpoint's own.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, or cuda: a GPU that runs Triton.")]
FastOption = Annotated[
    str,
    typer.Option(
        "--fast", help="pinned: the verifier's own kernels; stock: unpinned, so that tokens may roll back."
    ),
]
VerifyOption = Annotated[
    str, typer.Option("--verify", help="auto: replay what no certificate covers; always: replay everything.")
]
TokenWeaveOption = Annotated[
    str,
    typer.Option(
        "--token-weave",
        help="Under torchrun: off; auto: overlap all-reduces where that gains; always. Changes no bit.",
    ),
]
SpeculateOption = Annotated[
    str,
    typer.Option(
        "--speculate",
        help="off; ngram: guess from the request's own text; self: by the model in 4 bits; auto; auto:self; "
        "model:PATH: by a smaller one. Changes no bit.",
    ),
]
PassOption = Annotated[
    list[str] | None,
    typer.Option("--pass", metavar="NAME", help="A pass that is not in the list runs too; repeatable."),
]
KvOption = Annotated[int, typer.Option("--kv-mb", min=1, help="Memory for keys and values, in MiB.")]
PlannedKvOption = Annotated[
    int | None,
    typer.Option("--kv-mb", min=1, help="Memory for keys and values, in MiB; default 256, or the plan's."),
]
PlannedSpeculateOption = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        help="off; ngram: guess from the request's own text; self: by the model in 4 bits; auto; auto:self; "
        "model:PATH: by a smaller one; default off, or the plan's. Changes no bit.",
    ),
]
PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="Sizes of llm42 plan --out, where no option says others."),
]
JsonFileOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")
]

out = Console(highlight=False)
err = Console(file=sys.__stderr__, highlight=False)

Report = Callable[[str, int, int], None]


def choice(name: str, value: str, allowed: tuple[str, ...]) -> Any:
    """`value` if it is allowed; raises ConfigError naming the option."""
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def parse_dtype(name: str | None) -> Any:
    """The torch dtype of that name. Raises ConfigError."""
    if name is None:
        return None
    import torch

    return getattr(torch, choice("--dtype", name, DTYPES))


def check_device(name: str) -> Any:
    """The torch device of that name, before anything is loaded. Raises DeviceError or ConfigError."""
    from llm42c.device import parse_device

    device = parse_device(name)
    if device.type != "cpu" and announced():
        raise ConfigError(f"--device {name} runs on one GPU; under torchrun models are divided among CPUs")
    return device


def open_engine(model: str, report: Report, **options: Any) -> BuiltEngine:
    """Load MODEL and build an engine, under `torchrun` divided among the ranks. `options` are those of
    `engine_options`.

    Raises the errors of both, ConfigError for a bad choice, and DeviceError for a device that is not there.
    """
    chosen = engine_options(model, **options)
    from llm42c.parallel import ranks
    from llm42c.runtime.opening import open_model

    place = ranks.world()
    built = open_model(model, report=report, ranks=place, **chosen)
    if place.size > 1 and not silent():
        err.print(f"{place.size} ranks; {built.compiler.division.text()}", soft_wrap=True)
        if (weaving := built.compiler.compile("pinned").weaving) is not None:
            err.print(f"token weaving: {weaving.summary()}", soft_wrap=True)
    return built


def engine_options(
    model: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    fast: str = "pinned",
    verify: str = "auto",
    kv_mb: int | None = None,
    speculate: str | None = None,
    token_weave: str = "off",
    passes: Sequence[str] | None = None,
    plan: Path | None = None,
    **config: Any,
) -> dict[str, Any]:
    """What commands take, as options of `open_model`. What is None is the plan's, if there is one, else the
    engine's default. Raises ConfigError for a bad choice or another model's plan than `model`'s, and
    DeviceError for a device that is not there.
    """
    choice("--fast", fast, ("pinned", "stock"))
    choice("--verify", verify, ("auto", "always"))
    decided = {} if plan is None else _planned(plan, model)
    drafts = decided.get("speculate") if speculate is None else None if speculate == "off" else speculate
    choice("--token-weave", token_weave, get_args(TokenWeave))
    wanted, where = parse_dtype(dtype), check_device(device)
    from llm42c.runtime.drafters import drafter_source

    drafter_source(drafts)
    given = {name: value for name, value in config.items() if value is not None}
    if kv_mb is not None:
        given["kv_cache_bytes"] = kv_mb * 2**20
    config = {**decided, "verify": verify, "speculate": drafts, **given}
    return {
        "dtype": wanted,
        "device": where,
        "fast": fast,
        "token_weave": token_weave,
        "passes": passes or (),
        **config,
    }


def _planned(plan: Path, model: str) -> dict[str, Any]:
    from llm42c.runtime.plan.settings import settings

    return settings(plan, model)


def open_engine_of(
    contract: Contract, model: str, report: Report, *, passes: Sequence[str] | None = None, **options: Any
) -> BuiltEngine:
    """As `open_engine`, with the dtype and the shapes that `contract` names, and the passes of llm42's own
    that it shows; other passes are to be named. Raises the same."""
    from llm42c.passes import pipeline

    shown = [step.name for step in pipeline.ON_REQUEST if step.makes & contract.orders.keys()]
    return open_engine(
        model,
        report,
        dtype=contract.dtype,
        verify_tokens=contract.verify_tokens,
        verify_seqs=contract.verify_seqs,
        verify_rows=contract.verify_rows,
        page_size=contract.page_size,
        passes=list(dict.fromkeys([*shown, *(passes or ())])),
        **options,
    )


@contextlib.contextmanager
def progress_bars() -> Iterator[Report]:
    """Gives `report(task, done, total)`, which draws bars on stderr; total 0 is a spinner.

    A new task ends the one before. Where stderr is no terminal, nothing is drawn.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bars = Progress(*columns, console=err, transient=True, disable=silent() or not err.is_terminal)
    tasks: dict[str, Any] = {}

    def report(name: str, done: int, total: int) -> None:
        if name not in tasks:
            for task in bars.tasks:
                if task.total is None:
                    bars.update(task.id, total=1, completed=1)
            tasks[name] = bars.add_task(name, total=total or None)
        bars.update(tasks[name], completed=done)

    with bars:
        yield report


def write_json(path: Path, data: Any) -> None:
    """Raises ConfigError where the file cannot be written. Under `torchrun` rank 0 writes."""
    write_text(path, json.dumps(data, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_json`."""
    if silent():
        return
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def read_text(what: str, path: Path) -> str:
    """A file that holds `what`. Raises RequestError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {what} in {path}: {error}") from None


def read_lines(path: Path, errors: str = "strict") -> list[tuple[int, str]]:
    """Lines of a file, or of stdin for '-', that are not empty, with their numbers. Raises RequestError."""
    try:
        text = read_stdin() if str(path) == "-" else path.read_text(encoding="utf-8", errors=errors)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}") from None
    return [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line]


def print_json(data: Any) -> None:
    print(json.dumps(data), flush=True)

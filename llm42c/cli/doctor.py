"""`llm42 doctor`: what this machine has, what it lacks, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import typer
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from llm42c.cli import exits
from llm42c.cli.common import out

Verdict = Literal["ok", "note", "wrong"]
PACKAGE = "llm42c"
LEAST_MEMORY = 2.2e9  # bytes that the packaged model needs with 256 MiB for keys and values
_STYLE = {"ok": "green", "note": "yellow", "wrong": "red"}


@dataclass(frozen=True)
class Finding:
    """``verdict``: "note" is a thing to know, "wrong" stops some command. ``mend``: what to do."""

    subject: str
    verdict: Verdict
    found: str
    mend: str = ""


def doctor(json_out: Annotated[bool, typer.Option("--json", help="A list of findings.")] = False) -> None:
    """Look at CPU, compiler, versions, GPU, cache folder and memory. Exits with 1 if something is wrong."""
    found = list(findings())
    if json_out:
        print(json.dumps([asdict(f) for f in found], indent=1))
    else:
        table = Table("", "", "found", "what to do", box=None, pad_edge=False)
        for f in found:
            table.add_row(Text(f.verdict, _STYLE[f.verdict]), *map(Text, (f.subject, f.found, f.mend)))
        out.print(table)
    if any(f.verdict == "wrong" for f in found):
        raise typer.Exit(exits.FAILED)


def findings() -> Iterator[Finding]:
    """Everything that is looked at, cheapest first."""
    yield from versions()
    yield from extras()
    yield from cpu()
    yield compiler()
    yield gpu()
    yield cache()
    yield memory()


def versions() -> Iterator[Finding]:
    """What must be installed, against the range that was tested."""
    for requirement in _requirements(None):
        yield _installed(requirement, requirement.name, "wrong", f"pip install '{requirement}'")


def extras() -> Iterator[Finding]:
    """What may be installed: an extra is there if all that it names is."""
    offered = importlib.metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    for extra in offered:
        if extra == "dev":
            continue
        subject, command = f"[{extra}]", f"pip install '{PACKAGE}[{extra}]'"
        parts = [_installed(r, subject, "note", command) for r in _requirements(extra)]
        bad = [p for p in parts if p.verdict != "ok"]
        yield bad[0] if bad else Finding(subject, "ok", "; ".join(p.found for p in parts))


def _requirements(extra: str | None) -> list[Requirement]:
    """Of the package itself, or what an extra adds."""
    every = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    plain = [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]
    if extra is None:
        return plain
    return [r for r in every if r not in plain and r.marker and r.marker.evaluate({"extra": extra})]


def _installed(requirement: Requirement, subject: str, otherwise: Verdict, command: str) -> Finding:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(subject, otherwise, f"{requirement.name} is not installed", command)
    found = f"{requirement.name} {version}"
    if requirement.specifier.contains(version, prereleases=True):
        return Finding(subject, "ok", found)
    return Finding(subject, "note", f"{found} was not tested ({requirement.specifier} was)", command)


def cpu() -> Iterator[Finding]:
    """What the kernels use of this CPU."""
    from llm42c.codegen.cpu import build

    isa, asked = build.widest_isa(), os.environ.get(build.ISA_VARIABLE)
    yield Finding("CPU", "ok", f"{isa}, {os.cpu_count()} threads")
    if asked and asked != isa:
        yield Finding(build.ISA_VARIABLE, "note", f"kernels are of {asked}", f"unset {build.ISA_VARIABLE}")
    if isa == "portable":
        yield Finding("vectors", "note", "none that the kernels know: decoding will be slow")
    if "amx_bf16" in build.cpu_features().split():
        more = "--pass two_chains computes products of bf16 with it, in an order of its own (docs/orders.md)"
        yield Finding("AMX", "note", "not used by the order of every CPU", more)


def compiler() -> Finding:
    """What compiles the kernels, or the library that needs no compiler."""
    from llm42c.codegen.cpu import build

    if (carried := build.carried(build.widest_isa())) is not None:
        return Finding("kernels", "ok", f"this package carries them ({carried.stem})")
    try:
        toolchain = build.Toolchain.find()
    except build.BuildError as error:
        return Finding("kernels", "wrong", str(error).splitlines()[0], "install g++ or a wheel")
    return Finding("kernels", "ok", f"compiled by {toolchain.version}")


def gpu() -> Finding:
    """Whether --device cuda would work."""
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "ok", "none: everything runs on the CPU")
    name = torch.cuda.get_device_name(0)
    if importlib.util.find_spec("triton") is None:
        return Finding("GPU", "wrong", f"{name}, but no Triton", "pip install triton")
    return Finding("GPU", "ok", f"{name}: --device cuda")


def cache() -> Finding:
    """Whether what is compiled is kept."""
    from llm42c.codegen import cache as folders

    reason = folders.obstacle()
    if reason is None:
        return Finding("cache", "ok", str(folders.folder()))
    return Finding("cache", "note", f"cannot be written: {reason}", "set XDG_CACHE_HOME")


def memory() -> Finding:
    """What is free, against what the packaged model needs."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{available / 1e9:.1f} GB free"
    if available >= LEAST_MEMORY:
        return Finding("memory", "ok", text)
    found = f"{text}, smollm2 takes {LEAST_MEMORY / 1e9:.1f}"
    return Finding("memory", "note", found, "--kv-mb 64 takes less")

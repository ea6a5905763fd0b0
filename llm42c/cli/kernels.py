"""`llm42 inspect --kernels`: the emitted Triton kernels of a device, which need not be here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from llm42c.cli.common import out


def inspect(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile the emitted kernels ahead of time.")
    ] = True,
    device: Annotated[str, typer.Option("--device", help="Name as the driver gives it.")] = "NVIDIA H200",
    target_file: Annotated[Path | None, typer.Option("--target", help="JSON of a target.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    head_dim: Annotated[int, typer.Option("--head-dim")] = 128,
    only: Annotated[str, typer.Option("--only", help="Kernels whose label holds this text.")] = "",
    source: Annotated[bool, typer.Option("--source", help="Print the emitted text too.")] = False,
) -> None:
    """Show source, registers, shared memory and spills of the emitted kernels."""
    from llm42c.codegen import target as targets
    from llm42c.codegen.triton.catalog import kernels as catalog

    found = targets.from_table(device)
    if target_file is not None:
        found = targets.Target.from_json(target_file.read_text())
    table = Table(
        "kernel", "registers", "shared bytes", "spills", "warps", title=f"{found.name} ({found.arch})"
    )
    for kernel in catalog(found, dtype, head_dim):
        if only not in kernel.label:
            continue
        if source:
            print(f"# {kernel.label}\n{kernel.source}")
        if kernels:
            used = kernel.compile(found).resources
            numbers = (used.registers, used.shared, used.spills, used.warps)
            table.add_row(kernel.label, *map(str, numbers))
    if kernels:
        out.print(table)

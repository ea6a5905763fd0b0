"""`llm42 inspect --kernels`: the emitted Triton kernels of a device, which need not be here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from llm42c.cli.common import out
from llm42c.errors import OptionsError

if TYPE_CHECKING:
    from llm42c.codegen.device import Device

# One device of each architecture that kernels are checked for.
ARCHITECTURES = {
    "sm_80": "NVIDIA A100-SXM4-80GB",
    "sm_90": "NVIDIA H200",
    "sm_100": "NVIDIA B200",
    "gfx942": "AMD Instinct MI300X",
}
DTYPES = ("bfloat16", "float16", "float32")


def inspect(
    kernels: Annotated[
        bool,
        typer.Option("--kernels/--no-kernels", help="Compile them ahead of time and show what they use."),
    ] = True,
    target: Annotated[
        str,
        typer.Option("--target", help="sm_80, sm_90, sm_100, gfx942, a driver's device name, or a .json."),
    ] = "sm_90",
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    head_dim: Annotated[int, typer.Option("--head-dim", help="64, 80, 96, 128 or 256.")] = 128,
    only: Annotated[str, typer.Option("--only", help="Kernels whose label holds this text.")] = "",
    source: Annotated[bool, typer.Option("--source", help="Print the emitted text too.")] = False,
) -> None:
    """Show source, registers, shared memory and spills of the emitted kernels; no GPU is needed."""
    from llm42c.codegen.triton import catalog, spec

    found = read_target(target)
    if dtype not in DTYPES:
        raise OptionsError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype}")
    if head_dim not in spec.HEAD_DIMS:
        raise OptionsError(f"--head-dim must be one of {spec.HEAD_DIMS}, not {head_dim}")
    chosen = [k for k in catalog.kernels(found, dtype, head_dim) if only in k.label]
    if not chosen:
        raise OptionsError(f"--only {only!r} is in no kernel's label")
    if kernels and importlib.util.find_spec("triton") is None:
        raise OptionsError("compiling kernels needs Triton (pip install triton); --no-kernels does without")
    columns = ("registers", "shared bytes", "spills", "warps") if kernels else ()
    table = Table(Column("kernel", overflow="fold"), *columns, title=f"{found.name} ({found.arch})")
    for kernel in chosen:
        if source:
            print(f"# {kernel.label}\n{kernel.source}")
        numbers: tuple[int, ...] = ()
        if kernels:
            used = kernel.compile(found).resources
            numbers = (used.registers, used.shared, used.spills, used.warps)
        table.add_row(kernel.label, *map(str, numbers))
    out.print(table)


def read_target(text: str) -> Device:
    """The device that ``--target`` names. Raises OptionsError."""
    from llm42c.codegen.device import Device, UnknownDeviceError
    from llm42c.codegen.triton import devices

    try:
        if text.endswith(".json"):
            return Device.from_json(Path(text).read_text())
        return devices.from_table(ARCHITECTURES.get(text, text))
    except OSError as error:
        raise OptionsError(f"--target: cannot read {text}: {error.strerror}") from error
    except UnknownDeviceError as error:
        raise OptionsError(f"--target: {error}") from error

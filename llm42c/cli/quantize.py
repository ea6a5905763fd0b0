"""`llm42 quantize`: a model with quantised weights."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from llm42c.cli.common import DtypeOption, ModelArgument, choice, parse_dtype
from llm42c.errors import ConfigError

_FORMATS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def quantize(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", help=f"{', '.join(_FORMATS)}: GGUF's formats.")],
    folder: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="A folder that does not exist.")],
    dtype: DtypeOption = None,
) -> None:
    """Write MODEL with the weights of its linears and embeddings quantised; FOLDER is then a MODEL."""
    choice("--to", to, _FORMATS)
    if folder.exists():
        raise ConfigError(f"{folder} exists: --out takes a folder that does not")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("quantising needs gguf: pip install gguf")
    from llm42c.hub import models
    from llm42c.hub.quantise import quantise

    made, kept = quantise(*models.load_model(model, parse_dtype(dtype)), to)
    models.write(folder, made)
    for name in kept:
        print(f"not quantised: {name}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.1f} MB, {to}")

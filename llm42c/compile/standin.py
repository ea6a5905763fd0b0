"""What a stored graph needs of a model: its weights and a few facts, read without the model's code.

Most of a start is importing: the classes of a model bring Dynamo, and nothing of either is needed where the
rewritten graph is stored. So the first start of a folder leaves a note (:func:`remember`): which tensor of
which file is which parameter, the buffers, the facts, the key of the stored graphs. A later one makes a
:class:`StandIn` of it (:func:`recall`). A note counts while nothing has changed that the model depends on:

- the folder's files, and every source file that the model's classes take something from, by their contents;
- llm42's sources, Python, torch, everything installed, the environment of torch and transformers;
- names, types, shapes and bits of all parameters and buffers: the digest of the weights is that of the model

and only in a process that has not imported models, where nobody can have changed them. What is in doubt is
loaded the ordinary way.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor, nn

from llm42c import quantised
from llm42c.capture.support import context_limit
from llm42c.codegen import cache
from llm42c.codegen.ops import registry
from llm42c.compile.identity import Identity, UnknownIdentityError, digest_of_file, sources
from llm42c.digest import checked_digest
from llm42c.errors import Llm42Error

if TYPE_CHECKING:
    from llm42c.compile.compiler import ModelCompiler

FOLDER = "programs"
_SUFFIX, _KEPT = ".note", 64
_MODELS = "transformers.modeling_utils"  # imported by every model
_READ = ("HF_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "USE_", "DISABLE_")  # variables that may change a model
_LARGEST = 1 << 16  # bytes of a buffer that is noted
_READABLE = 64 << 20  # bytes of a file that is known by its contents
_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    safetensors.SafetensorError,
    Llm42Error,
)


class StaleError(Exception):
    """The stand-in is not of the model as it is now, or has no stored graph: the model must be loaded."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is asked of a model's configuration, under the same names."""

    vocab_size: int
    max_position_embeddings: int
    eos_token_id: Sequence[int]

    def get_text_config(self, decoder: bool = True) -> Facts:
        return self


class StandIn(nn.Module):
    """Parameters and buffers under the names that they have in the model; it cannot be called.

    ``tokenizer``: what was said to :func:`remember`. ``loaded`` loads the model itself, for those who need
    its classes after all; it is the caller of :func:`recall` who knows how.
    """

    identity: str
    weights: str
    tokenizer: str | None
    loaded: Callable[[], nn.Module]

    def __init__(self, facts: Facts, identity: str, weights: str, tokenizer: str | None) -> None:
        super().__init__()
        self.config = self.generation_config = facts
        self.identity, self.weights, self.tokenizer = identity, weights, tokenizer

    def require(self, weights: str) -> None:
        """Raises StaleError unless ``weights`` is the digest of the model's."""
        if weights != self.weights:
            raise StaleError("the weights are not those that the note is of")


def untouched() -> bool:
    """Whether this process has imported no models, so that nobody can have changed their code in it."""
    return _MODELS not in sys.modules


@dataclasses.dataclass(frozen=True)
class Note:
    """Where the note of a folder is kept. ``files``: the folder's, when this was asked."""

    folder: Path
    files: tuple[str, ...]
    path: Path


def surroundings(dtype: torch.dtype | None) -> tuple[str, ...]:
    """What a model asked for in ``dtype`` depends on besides its folder and its sources.

    To be asked before anything is imported that sets environment variables.
    """
    return (
        *(sys.version, torch.__version__, torch.__file__, str(torch.get_default_dtype()), str(dtype)),
        *sources(),
        *_installed(),
        *sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(_READ)),
    )


def note_of(folder: Path, around: tuple[str, ...]) -> Note | None:
    """``around``: the surroundings. None for a folder that cannot be read."""
    try:
        files = tuple(_files(folder))
    except (OSError, UnknownIdentityError):
        return None
    key = hashlib.sha256(json.dumps([*around, *files]).encode()).hexdigest()
    return Note(folder, files, cache.folder() / FOLDER / f"{key}{_SUFFIX}")


def recall(note: Note, loaded: Callable[[], nn.Module]) -> StandIn | None:
    """The stand-in for the model in a folder; None without a note that counts. The process is untouched."""
    try:
        content = cache.sealed(note.path)
        if content is None:
            return None
        data = json.loads(content)
        if any(digest_of_file(Path(file)) != digest for file, digest in data["sources"]):
            return None
        cache.used(note.path)
        made = _made(data, note.folder)
        made.loaded = loaded
        return made
    except (*_FAULTS, UnknownIdentityError):
        return None


def remember(note: Note, compiler: ModelCompiler, eos: Sequence[int], tokenizer: str | None) -> bool:
    """Note what the folder's model is, as ``compiler`` has it; False if no stand-in can be it.

    ``eos``: the tokens that end its texts; ``tokenizer``: the class of its tokenizer, if that is enough. The
    process was :func:`untouched` before it loaded the model.
    """
    identity = compiler.identity
    try:
        data = None if identity is None else _described(note.folder, compiler.model, eos, identity)
        if data is None or tuple(_files(note.folder)) != note.files:
            return False
        data |= {"weights": compiler.digest, "tokenizer": tokenizer}
        if checked_digest(_made(data, note.folder)) != compiler.digest:
            return False
        written = cache.write(note.path, json.dumps(data), seal=True)
    except (*_FAULTS, UnknownIdentityError):
        return False
    cache.keep_newest(FOLDER, _SUFFIX, _KEPT)
    return written


# -- the key -------------------------------------------------------------------------------------------------


def _installed() -> Iterator[str]:
    """Names and versions of all distributions, and where they are."""
    for place in sys.path:
        try:
            names = sorted(os.listdir(place or "."))
        except OSError:  # a zip file, or nothing
            names = []
        yield place
        yield from (name for name in names if name.endswith((".dist-info", ".egg-info", ".egg-link", ".pth")))


def _files(folder: Path) -> Iterator[str]:
    """The files of a model's folder by their contents; of weights the list of tensors."""
    yield str(folder.resolve())
    for path in sorted(folder.iterdir()):
        yield path.name
        if path.suffix == ".safetensors":
            yield hashlib.sha256(_header(path)).hexdigest()
        elif path.is_file() and path.stat().st_size <= _READABLE:
            yield digest_of_file(path)
        elif path.is_file():  # weights of another kind, which no note has
            yield f"{path.stat().st_size} {path.stat().st_mtime_ns}"


def _header(file: Path) -> bytes:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return stream.read(min(size, file.stat().st_size))


# -- the note ------------------------------------------------------------------------------------------------


def _described(folder: Path, model: Any, eos: Sequence[int], identity: Identity) -> dict[str, Any] | None:
    config = json.loads((folder / "config.json").read_text())
    method = (config.get("quantization_config") or {}).get("quant_method", quantised.METHOD)
    if "auto_map" in config or method != quantised.METHOD:
        return None
    stored = _stored(folder)
    formats = {
        f"{name}.weight": [m.n, m.k, m.format]
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, quantised.Quantised)
    }
    tensors: dict[str, Any] = {}
    first: dict[int, str] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        entry: dict[str, Any] = {"format": formats.get(name)}
        if (same := first.setdefault(id(tensor), name)) != name:
            entry["same"] = same
        elif isinstance(tensor, nn.Parameter):
            if name not in stored:
                return None
            entry |= {"file": stored[name], "gradient": tensor.requires_grad}
        elif tensor.nbytes <= _LARGEST:
            entry["constant"] = [str(tensor.dtype), list(tensor.shape), _content(tensor)]
        else:
            return None
        tensors[name] = entry
    text = model.config.get_text_config(decoder=True)
    return {
        "tensors": tensors,
        "facts": dataclasses.asdict(Facts(text.vocab_size, context_limit(model), tuple(eos))),
        "identity": identity.digest,
        "sources": [[file, digest_of_file(Path(file))] for file in identity.files],
    }


def _stored(folder: Path) -> dict[str, str]:
    """The file of each tensor that lies in a folder."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: file.name for file in files for name in json.loads(_header(file)) if name != "__metadata__"}


def _content(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return base64.b64encode(flat.numpy().tobytes()).decode()


def _made(data: dict[str, Any], folder: Path) -> StandIn:
    """The stand-in of a note, weights lying in the mapped files. Raises one of _FAULTS."""
    registry.define()
    facts = Facts(**data["facts"])
    made = StandIn(facts, data["identity"], data["weights"], data["tokenizer"])
    known: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        files = {
            name: stack.enter_context(safetensors.safe_open(folder / name, framework="pt"))
            for name in sorted({e["file"] for e in data["tensors"].values() if "file" in e})
        }
        for name, entry in data["tensors"].items():
            module, leaf = _place(made, name, entry["format"])
            if "same" in entry:
                known[name] = known[entry["same"]]
            elif "file" in entry:
                known[name] = nn.Parameter(files[entry["file"]].get_tensor(name), entry["gradient"])
            else:
                known[name] = _tensor(*entry["constant"])
            tensor = known[name]
            if isinstance(tensor, nn.Parameter):
                module.register_parameter(leaf, tensor)
            else:
                module.register_buffer(leaf, tensor)
    for part in made.modules():
        if isinstance(part, quantised.Quantised):
            part.pack()
    return made.eval()


def _place(made: nn.Module, name: str, format: list[Any] | None) -> tuple[nn.Module, str]:
    """Where a tensor of that name is registered, and as what."""
    *path, leaf = name.split(".")
    module = made
    for i, part in enumerate(path):
        if part not in module._modules:
            new = quantised.Quantised(*format) if format and i == len(path) - 1 else nn.Module()
            module.add_module(part, new)
        module = module.get_submodule(part)
    return module, leaf


def _tensor(dtype: str, shape: list[int], content: str) -> Tensor:
    flat = torch.frombuffer(bytearray(base64.b64decode(content)), dtype=torch.uint8)
    return flat.view(getattr(torch, dtype.removeprefix("torch."))).reshape(shape)

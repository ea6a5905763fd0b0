"""What a rewritten graph is a function of, as one digest: the key under which it is kept between processes.

Cases that change it:

1. the model: the classes of its modules, every plain attribute of each (the configuration is one), names,
   shapes and places of its parameters and buffers, and which of them are one
2. code: the files of these classes, of all that they derive from, and of what those files take from their own
   package; and what each name in them stands for, so that a function replaced at run time counts
3. who rewrites: all files of llm42c but those that run engines, and what their names stand for
4. Python, torch, transformers, the device, torch's default dtype, and the options of the caller

What a module holds that is none of this (a hook with state, an object without a file) is an
:class:`UnknownIdentityError`: such a model is captured at every start.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import llm42c
from llm42c.capture import dynamo
from llm42c.codegen import targets
from llm42c.device import device_of_model
from llm42c.passes import pipeline

_PLAIN = (str, bytes, int, float, bool, complex, type(None), torch.dtype, torch.device, torch.Size)
# What is described by name, and what no forward reads.
_NOT_DESCRIBED = frozenset({"_parameters", "_buffers", "_modules", "generation_config"})
_RUNNING = frozenset({"runtime", "cli", "prompts"})  # parts of llm42c that no graph depends on
_ROOT = Path(llm42c.__file__).parent
_TORCH, _STDLIB = f"{Path(torch.__file__).parent}{os.sep}", f"{sysconfig.get_path('stdlib')}{os.sep}"


class UnknownIdentityError(Exception):
    """Nothing tells this model from another; the message says what stands in the way."""


class Identity(NamedTuple):
    """``files``: the sources that the model and its graph come from, but for those of torch and llm42."""

    digest: str
    files: tuple[str, ...]


def identity(model: nn.Module, *options: Any) -> str:
    """The digest for ``model`` as it is, with ``options`` (plain values). Raises UnknownIdentityError."""
    return identify(model, *options).digest


def identify(model: nn.Module, *options: Any) -> Identity:
    """As :func:`identity`, with the files."""
    described = _Described()
    device = device_of_model(model)
    parts = [
        *("python", sys.version, "torch", torch.__version__, "transformers", transformers.__version__),
        *(str(torch.get_default_dtype()), str(device), targets.of(device).name),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        described.value(options),
        _tensors(model),
        *(f"{name}\0{described.module(module)}" for name, module in model.named_modules()),
        *described.code(dynamo, pipeline),
        *sources(),
    ]
    return Identity(hashlib.sha256(json.dumps(parts).encode()).hexdigest(), described.paths)


def digest_of_values(*values: Any) -> str:
    """The digest of plain values, functions and objects, with the files of their code."""
    described = _Described()
    return hashlib.sha256("\0".join([described.value(values), *described.files()]).encode()).hexdigest()


def _tensors(model: nn.Module) -> str:
    first: dict[int, str] = {}
    lines = []
    named = (*model.named_buffers(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    for name, t in named:
        where = first.setdefault(id(t), name)
        lines.append(f"{name} {where} {type(t).__qualname__} {t.dtype} {tuple(t.shape)} {t.stride()}")
    return "\n".join(lines)


class _Described:
    """Values as text, and the files and modules that their code is from."""

    def __init__(self) -> None:
        self._files: set[str] = set()
        self._modules: dict[str, ModuleType] = {}
        self._leaves: set[str] = set()  # modules whose own numbers and names count too
        self._open: set[int] = set()  # ids of the objects that are being described
        self._classes: dict[type, str] = {}

    def module(self, module: nn.Module) -> str:
        own = {k: v for k, v in vars(module).items() if k not in _NOT_DESCRIBED}
        self._leaves.add(type(module).__module__)
        return f"{self._class(type(module))} {self.value(own)}"

    def value(self, x: Any) -> str:
        if isinstance(x, enum.Enum):
            return f"{self._class(type(x))}.{x.name}"
        if isinstance(x, _PLAIN):
            return f"{type(x).__name__} {x!r}"
        if isinstance(x, Tensor):
            return self._tensor(x)
        if id(x) in self._open:
            return f"again {type(x).__qualname__}"
        self._open.add(id(x))
        try:
            if isinstance(x, (type, FunctionType, BuiltinFunctionType, MethodType)):
                return self._function(x)
            if isinstance(x, functools.partial):
                return f"partial {self.value([x.func, list(x.args), x.keywords])}"
            return self._container(x)
        finally:
            self._open.discard(id(x))

    def _container(self, x: Any) -> str:
        name = type(x).__qualname__
        if isinstance(x, Mapping):
            items = [f"{self.value(k)}: {self.value(v)}" for k, v in x.items()]
            return f"{name} {{{', '.join(items)}}}"
        if isinstance(x, (set, frozenset)):
            return f"{name} {sorted(map(self.value, x))}"
        if isinstance(x, (list, tuple)):
            return f"{name} {list(map(self.value, x))}"
        if isinstance(x, nn.Module):
            return f"module {self.module(x)}"
        if hasattr(x, "__dict__") and not hasattr(type(x), "__slots__"):
            return f"{self._class(type(x))} {self.value(vars(x))}"
        raise UnknownIdentityError(f"a {name} among the attributes of its modules")

    def _tensor(self, x: Tensor) -> str:
        if type(x) is not Tensor or x.is_meta:
            raise UnknownIdentityError(f"a {type(x).__qualname__} that is no buffer")
        content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        return f"tensor {x.dtype} {tuple(x.shape)} {hashlib.sha256(content).hexdigest()}"

    def _function(self, x: Any) -> str:
        """A class, or a function with what it has closed over, and where its code stands."""
        if isinstance(x, type):
            return self._class(x)
        if isinstance(x, BuiltinFunctionType):
            return f"{x.__module__}.{x.__qualname__}"
        if isinstance(x, MethodType):
            owner = type(x.__self__).__qualname__
            return f"{owner} {self.value(x.__func__)}"
        self._file(x.__code__.co_filename)
        held = [c.cell_contents for c in x.__closure__ or () if not _is_empty(c)]
        return f"{_place(x)} {self.value([*held, x.__defaults__, x.__kwdefaults__])}"

    def _class(self, cls: type) -> str:
        if cls not in self._classes:
            self._classes[cls] = self._class_text(cls)
        return self._classes[cls]

    def _class_text(self, cls: type) -> str:
        for base in cls.__mro__:
            module = sys.modules.get(base.__module__)
            file = getattr(module, "__file__", None)
            if base.__module__ in sys.builtin_module_names or (file and _is_library(file)):
                continue
            if module is None or file is None:
                raise UnknownIdentityError(f"{base.__qualname__} is defined in no file")
            self._modules[base.__module__] = module
            for value in vars(base).values():
                for function in _functions(value):
                    self._file(function.__code__.co_filename)
        return f"{cls.__module__}.{cls.__qualname__}"

    def _file(self, file: str) -> None:
        if not _is_library(file) and not file.startswith("<"):  # made at run time: see `_place`
            self._files.add(file)

    def code(self, *seeds: ModuleType) -> Iterator[str]:
        """The files met so far, and those that they and ``seeds`` take something from, of their packages or
        of nobody's; and what every name in them stands for."""
        self._modules |= {module.__name__: module for module in seeds}
        packages = {name.partition(".")[0] for name in self._modules}
        waiting = list(self._modules.values())
        while waiting:
            for module in _taken_from(waiting.pop()):
                file = str(module.__file__)
                theirs = module.__name__.partition(".")[0] in packages or not _is_installed(file)
                if module.__name__ not in self._modules and theirs and not _is_library(file):
                    self._modules[module.__name__] = module
                    waiting.append(module)
        for name in sorted(self._modules):
            self._file(str(self._modules[name].__file__))
            yield from _bindings(self._modules[name], name in self._leaves)
        yield from self.files()

    def files(self) -> Iterator[str]:
        return (f"{file} {digest_of_file(Path(file))}" for file in self.paths)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))


def _taken_from(module: ModuleType) -> Iterator[ModuleType]:
    """The modules, with files, of what a module's names stand for."""
    for value in list(vars(module).values()):
        found: Any = None
        if isinstance(value, (type, FunctionType)):
            found = sys.modules.get(value.__module__ or "")
        elif not hasattr(module, "__path__"):  # a package gets its modules as names when they are imported
            found = value
        if isinstance(found, ModuleType) and getattr(found, "__file__", None):
            yield found


def _is_library(file: str) -> bool:
    """Of torch or of Python itself: known by its version."""
    return file.startswith(_TORCH) or (file.startswith(_STDLIB) and not _is_installed(file))


def _is_installed(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file


def digest_of_file(file: Path) -> str:
    """The digest of a file. Raises UnknownIdentityError where there is none."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        raise UnknownIdentityError(f"code of {file}, which is no file") from None


def _place(function: FunctionType) -> str:
    """Where a function's code stands; of code that is in no file, as a dataclass makes it, the code."""
    code = function.__code__
    text = _code(code) if code.co_filename.startswith("<") else f"{code.co_filename}:{code.co_firstlineno}"
    return f"{function.__module__}.{code.co_qualname} {text}"


def _code(code: CodeType) -> str:
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _functions(value: Any) -> Iterator[FunctionType]:
    """The functions that an entry of a class stands for."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
    for part in parts:
        if isinstance(part, FunctionType):
            yield part
            inner = inspect.unwrap(part)
            if inner is not part and isinstance(inner, FunctionType):
                yield inner


def _bindings(module: ModuleType, constants: bool) -> Iterator[str]:
    """What the names of a module, and of the classes defined in it, stand for."""
    for name, value in sorted(vars(module).items()):
        if isinstance(value, FunctionType):
            yield f"{module.__name__}.{name} = {_place(value)}"
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for key, entry in sorted(vars(value).items()):
                for function in _functions(entry):
                    yield f"{module.__name__}.{name}.{key} = {_place(function)}"
        elif constants and isinstance(value, _PLAIN) and not name.startswith("__"):
            yield f"{module.__name__}.{name} = {value!r}"


def _is_empty(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


@functools.cache
def sources() -> tuple[str, ...]:
    """The files of llm42 that a graph depends on, and their digests."""
    files = [f for part in sorted(_ROOT.iterdir()) if part.name not in _RUNNING for f in _python(part)]
    return tuple(f"{file.relative_to(_ROOT)} {digest_of_file(file)}" for file in files)


def _python(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".py" else []
    return sorted(path.rglob("*.py"))

"""`llm42c.deterministic`: wrapper, decorator, and the way back."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from transformers import PreTrainedModel

from llm42c.capture.support import require_supported
from llm42c.errors import OptionsError
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.hf.handle import Handle

# Of a decorated class: the class as it was; of its instances: set while they are ordinary models.
_BASE, _OFF = "_llm42_base", "_llm42_off"
_OPTIONS = ("fast", "keep_weights", "passes", "persist_certificates", *(f.name for f in fields(EngineConfig)))


class Deterministic:
    """Makes a Hugging Face decoder's `generate` and `generate_batch` deterministic.

    ``llm42c.deterministic(model, **options)`` returns the same model. As a decorator, plain or with options,
    it takes a function that returns a model, or a model class, of which it makes a subclass of the same name.

    A row's tokens and log-probability bits are then a function of the contract (`model.llm42.contract`), its
    prompt and its parameters, `seed=` included: not of the other rows, the padding, `torch.manual_seed` or
    what was generated before.

    Options are the fields of EngineConfig, `fast` ("pinned" or "stock"), `passes` (of other packages:
    docs/compile.md), and `keep_weights`: by default the model's weights live packed in the engine and return
    into the model when it is used otherwise.

    Raises OptionsError for an unknown option, UnsupportedModelError for a model that cannot be served.
    """

    def __call__(self, target: Any = None, **options: Any) -> Any:
        _check_options(options)
        if target is None:
            return functools.partial(self, **options)
        if isinstance(target, PreTrainedModel):
            require_supported(target)
            handle = _handle(target, options)
            try:
                handle.warm_up()
            except BaseException:
                handle.remove()
                raise
            return target
        if isinstance(target, type):
            return _decorated_class(target, options)
        if callable(target) and not hasattr(target, "parameters"):
            return self._decorated_function(target, options)
        raise TypeError(
            "llm42c.deterministic takes a Hugging Face model, a model class or a function that returns a "
            f"model, not {type(target).__name__}"
        )

    def _decorated_function(
        self, function: Callable[..., Any], options: dict[str, Any]
    ) -> Callable[..., Any]:
        @functools.wraps(function)
        def load(*args: Any, **kwargs: Any) -> Any:
            model = function(*args, **kwargs)
            if not isinstance(model, PreTrainedModel):
                raise TypeError(
                    f"{function.__name__} returned a {type(model).__name__}, not a Hugging Face model"
                )
            return self(model, **options)

        return load

    @contextlib.contextmanager
    def off(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Inside this block the model is the ordinary one, weights included."""
        handle = self._take_off(model)
        try:
            yield model
        finally:
            model.__dict__.pop(_OFF, None)
            handle.install()
            handle.release()

    def undo(self, model: PreTrainedModel) -> PreTrainedModel:
        """Make the model ordinary again, exactly as it was; returns it."""
        self._take_off(model)
        return model

    def _take_off(self, model: PreTrainedModel) -> Handle:
        handle = getattr(model, "llm42", None)
        if not isinstance(handle, Handle):
            raise ValueError(f"this {type(model).__name__} is not deterministic")
        handle.remove()
        if hasattr(type(model), _BASE):
            model.__dict__[_OFF] = True
        return handle


def _check_options(options: dict[str, Any]) -> None:
    for key in options:
        if key not in _OPTIONS:
            near = difflib.get_close_matches(key, _OPTIONS, n=1, cutoff=0.0)[0]
            raise OptionsError(f"unknown option {key!r} of llm42c.deterministic; did you mean {near!r}?")


def _handle(model: Any, options: dict[str, Any]) -> Handle:
    """The model's handle, installed; one with other options is replaced."""
    handle = model.__dict__.get("llm42")
    if isinstance(handle, Handle):
        if handle.options == options:
            return handle
        handle.remove()
    model.__dict__.pop(_OFF, None)
    base = getattr(type(model), _BASE, None)
    handle = Handle(model, model.generate if base is None else base.generate.__get__(model), options)
    handle.install()
    return handle


class _FirstUse:
    """`llm42` of a decorated class: an instance gets its handle when it is first asked for."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return self
        if _OFF in model.__dict__:
            raise AttributeError(f"this {owner.__name__} is not deterministic")
        return _handle(model, self._options)


def _decorated_class(cls: type, options: dict[str, Any]) -> type:
    """A subclass of the same name whose instances become deterministic at their first `generate`."""
    if not issubclass(cls, PreTrainedModel):
        raise TypeError(
            f"{cls.__name__} is not a Hugging Face model class; decorate a class, or wrap a model"
        )
    base: Any = cls

    def dispatch(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(base, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _OFF in self.__dict__:
                return getattr(base, name)(self, *args, **kwargs)
            return getattr(self.llm42, name)(*args, **kwargs)

        return method

    body = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        _BASE: cls,
        "llm42": _FirstUse(options),
        **{name: dispatch(name) for name in ("generate", "generate_batch", "init_continuous_batching")},
    }
    return type(cls.__name__, (cls,), body)


deterministic = Deterministic()

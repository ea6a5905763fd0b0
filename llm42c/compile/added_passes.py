"""Passes of other packages, for ``Options.passes``: found by name, looked at before anything runs.

A pass is named by where it stands, ``"package.module:name"``, by the name of an entry point of the group
``llm42c.passes``, or by its own name if it is one of ``pipeline.ON_REQUEST``. Nothing is loaded or run that
was not named.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable
from typing import Any

from llm42c.errors import OptionsError
from llm42c.passes import pipeline
from llm42c.passes.base import PACKED, PLAIN, STOCK, Pass

GROUP = "llm42c.passes"
_KINDS = {PLAIN, PACKED, STOCK}


def find_passes(wanted: Any) -> tuple[Pass, ...]:
    """The passes that ``wanted`` names, a list or tuple of names and of passes themselves.

    Raises OptionsError for a name that leads to no pass, and for a pass that cannot be put into the list.
    """
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise OptionsError(f"option 'passes' must be a list of names or passes, got {wanted!r}")
    found: list[Pass] = []
    for one in wanted:
        step = _named(one) if isinstance(one, str) else one
        if not isinstance(step, Pass):
            raise OptionsError(
                f"{one!r} of option 'passes' is {type(step).__name__}, not a llm42c.passes.base.Pass"
            )
        if (reason := _refusal(step, found)) is not None:
            raise OptionsError(f"the pass {step.name!r} of option 'passes' {reason}")
        found.append(step)
    return tuple(found)


def _named(name: str) -> Any:
    own = {step.name: step for step in pipeline.ON_REQUEST}
    if name in own:
        return own[name]
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            return _entry_point(name).load()
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
        return value
    except OptionsError:
        raise
    except Exception as error:  # whatever importing somebody else's module raises
        raise OptionsError(
            f"{name!r} of option 'passes' cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _entry_point(name: str) -> importlib.metadata.EntryPoint:
    offered = importlib.metadata.entry_points(group=GROUP)
    if found := sorted({one.value: one for one in offered if one.name == name}.items()):
        if len(found) > 1:
            places = ", ".join(place for place, _ in found)
            raise OptionsError(f"several packages offer a pass {name!r}: say which of {places}")
        return found[0][1]
    near = difflib.get_close_matches(name, offered.names, n=1)
    raise OptionsError(
        f"no installed package offers a pass {name!r}"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + f" (entry points {GROUP}: {', '.join(sorted(offered.names)) or 'none'}; else name a pass "
        "'package.module:name')"
    )


def _refusal(step: Pass, others: list[Pass]) -> str | None:
    """Why a pass cannot be added to the list and ``others``, or None."""
    listed = list(dict.fromkeys(p.name for p in pipeline.PASSES))
    if not step.name.isidentifier():
        return "has a name that is no identifier"
    if step.name in listed or step.name in [p.name for p in others]:
        return "has the name of another pass"
    if step.before not in listed:
        near = difflib.get_close_matches(step.before, listed, n=1, cutoff=0.0)
        return f"stands before {step.before!r}, which is no pass; did you mean {near[0]!r}?"
    if not step.targets or not step.targets <= _KINDS:
        return f"is for {sorted(step.targets)}; kinds of graph are {', '.join(sorted(_KINDS))}"
    if not inspect.isfunction(step.function()[0]):
        return "has an apply that is no function, nor a functools.partial of one"
    try:
        _ = step.uuid
    except OSError:
        return "has a function without a file, so nothing tells it from another"
    except TypeError as error:
        return f"has options that are no plain values: {error}"
    return None

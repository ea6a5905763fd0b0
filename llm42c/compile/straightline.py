"""Turn a flat graph into straight Python source: one line a call, tensors freed after their last use.

The interpreter's cost per operator is then a global look-up and the call itself.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Step:
    """One line: ``results = function(*args, **kwargs)``; a string names a method of the first argument."""

    results: tuple[fx.Node, ...]
    function: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    sequence: bool = False  # the function returns a sequence of results, even of one

    def reads(self) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.node.map_arg((self.args, dict(self.kwargs)), found.append)
        return found


class _Namer:
    """Unique readable identifiers."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, wanted: str) -> str:
        base = re.sub(r"\W", "_", wanted)
        base = f"_{base}" if not base or base[0].isdigit() or keyword.iskeyword(base) else base
        name, count = base, 1
        while name in self._taken:
            name, count = f"{base}_{count}", count + 1
        self._taken.add(name)
        return name


def emit(
    inputs: list[fx.Node],
    constants: Mapping[fx.Node, Any],
    steps: list[Step],
    outputs: Any,
    labels: Mapping[int, str] | None = None,
    name: str = "forward",
) -> tuple[Callable[..., Any], str]:
    """Compile ``steps`` to a function of ``inputs``; returns it with its source.

    ``constants`` are bound once and never freed by the function. ``labels`` name functions, by id, where
    their own name says nothing. Results that nobody reads are not kept.
    """
    namer = _Namer()
    namer(name)
    scope: dict[str, Any] = {}
    text: dict[fx.Node, str] = {}
    for node in inputs:
        text[node] = namer(node.name)
    for node, constant in constants.items():
        text[node] = namer(node.name)
        scope[text[node]] = constant
    functions: dict[int, str] = {}

    def callee(function: Callable[..., Any]) -> str:
        if id(function) not in functions:
            label = (labels or {}).get(id(function)) or _short_name(function)
            functions[id(function)] = namer(label)
            scope[functions[id(function)]] = getattr(function, "_op", function)
        return functions[id(function)]

    def literal(arg: Any) -> str:
        return _literal(arg, text, scope, namer)

    last = _last_uses(steps, outputs)
    lines = [f"def {name}({', '.join(text[n] for n in inputs)}):"]
    for i, step in enumerate(steps):
        args = [literal(a) for a in step.args]
        args_text = ", ".join([*args, *(f"{k}={literal(v)}" for k, v in step.kwargs.items())])
        if isinstance(step.function, str):
            call = f"{args[0]}.{step.function}({args_text[len(args[0]) :].removeprefix(', ')})"
        else:
            call = f"{callee(step.function)}({args_text})"
        for node in step.results:
            text[node] = namer(node.name)
        target = ", ".join(text[n] for n in step.results) + ("," if step.sequence else "")
        target += " = " if step.results else ""
        lines.append(f"    {target}{call}")
        dead = [text[n] for n in last.get(i, []) if n not in constants]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    lines.append(f"    return {literal(outputs)}")
    source = "\n".join(lines) + "\n"
    exec(compile(source, f"<llm42 {name}>", "exec"), scope)
    return scope[name], source


def _last_uses(steps: list[Step], outputs: Any) -> dict[int, list[fx.Node]]:
    """For each step, the nodes that nothing reads afterwards."""
    kept: list[fx.Node] = []
    fx.node.map_arg(outputs, kept.append)
    last: dict[fx.Node, int] = {}
    for i, step in enumerate(steps):
        for node in (*step.results, *step.reads()):
            last[node] = i
    dead: dict[int, list[fx.Node]] = {}
    for node, i in last.items():
        if node not in kept:
            dead.setdefault(i, []).append(node)
    return dead


def _short_name(function: Callable[..., Any]) -> str:
    if isinstance(function, torch._ops.OpOverload):
        return function.name().split("::")[1].removesuffix(".default").replace(".", "_")
    return str(getattr(function, "__name__", "function"))


def _literal(arg: Any, text: Mapping[fx.Node, str], scope: dict[str, Any], namer: _Namer) -> str:
    """Source text of an argument; anything without one is bound in ``scope``."""

    def recurse(a: Any) -> str:
        return _literal(a, text, scope, namer)

    if isinstance(arg, fx.Node):
        return text[arg]
    if isinstance(arg, tuple):
        return f"({', '.join(recurse(a) for a in arg)}{',' if len(arg) == 1 else ''})"
    if isinstance(arg, list):
        return f"[{', '.join(recurse(a) for a in arg)}]"
    if isinstance(arg, dict):
        return "{" + ", ".join(f"{k!r}: {recurse(v)}" for k, v in arg.items()) + "}"
    if isinstance(arg, slice):
        return f"slice({recurse(arg.start)}, {recurse(arg.stop)}, {recurse(arg.step)})"
    if arg is None or arg is Ellipsis or isinstance(arg, (bool, int, str)):
        return "..." if arg is Ellipsis else repr(arg)
    if isinstance(arg, float) and arg == arg and abs(arg) != float("inf"):
        return repr(arg)
    name = namer(f"const_{type(arg).__name__}")
    scope[name] = arg
    return name

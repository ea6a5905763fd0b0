"""The option ``token_weave`` of ``torch.compile(model, backend="llm42")``.

A graph is woven after AOTAutograd, where DTensors have become tensors and their collectives stand in the
graph. What cannot be woven, or is not asked to be, runs exactly as without the option, with the reason in the
log, the dump and ``explain``; ``"always"`` makes the reason an error.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import fx

from llm42c.codegen.device import Device, UnknownDeviceError
from llm42c.codegen.dist.collectives import group_of
from llm42c.compile.piecewise import PiecewiseProgram
from llm42c.errors import OptionsError, UnsupportedModelError
from llm42c.options import Options, TokenWeave
from llm42c.passes import graph as g
from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.rules import UnsplittableError
from llm42c.passes.weave.schedule import Planner
from llm42c.passes.weave.text import describe_plan, to_dot, to_mermaid
from llm42c.weave.captured import WovenProgram, compile_woven
from llm42c.weave.runner import Style

_log = logging.getLogger(__name__)
Plain = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


_NOT_DIVIDED = "the graph has no all-reduce: the model is not divided among ranks"
_SHOWN = tuple(2**i for i in range(13))  # tokens


@dataclass
class Weaving:
    """What became of one graph: the planner that decides at every call, or why there is none."""

    planner: Planner | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.planner is None:
            return f"not woven: {self.reason}\n"
        return describe_plan(self.planner)

    def summary(self) -> str:
        """One line: at how many tokens the plan weaves."""
        if self.planner is None:
            return f"none: {self.reason}"
        sizes = [n for n in _SHOWN if self.planner.decide(n).weaves]
        few, many = (str(sizes[0]), str(sizes[-1])) if sizes else ("", "")
        where = f"at {few} to {many} tokens" if few != many else f"at {few} tokens"
        return f"{where}, of {_SHOWN[0]} to {_SHOWN[-1]}" if sizes else "no batch gains by it"

    def drawing(self, form: Literal["dot", "mermaid"] = "dot") -> str | None:
        """The pieces of the woven graph, for Graphviz or Mermaid; None where there is no plan."""
        if self.planner is None:
            return None
        return (to_dot if form == "dot" else to_mermaid)(self.planner.woven)


def read_target(path: str | None) -> Device | None:
    """The rates in a file. Raises OptionsError where it is none."""
    if path is None:
        return None
    try:
        return Device.from_json(Path(path).read_text())
    except (OSError, UnicodeDecodeError, UnknownDeviceError) as error:
        raise OptionsError(f"option 'target': {path}: {error}") from None


def weave_or_leave(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    style: Style,
    plain: Plain,
    *,
    grad: bool = False,
    target: Device | None = None,
    tell: Callable[[Weaving], None] = lambda _: None,
) -> Callable[..., Any]:
    """``gm`` woven as ``options`` say, or what ``plain`` makes of it.

    ``tell`` hears what became of the graph. Raises UnsupportedModelError for ``token_weave="always"`` and a
    graph that cannot be divided, OptionsError for a target without the rates that are needed,
    RanksDifferError where ranks differ.
    """
    from torch._dynamo.backends.common import aot_autograd

    target = target or read_target(options.target)
    if (reason := _hopeless(gm, grad)) is not None:
        _leave(reason, options, tell)
        return plain(gm, example_inputs)

    def compile_graph(traced: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            program = _programs(traced, options, style, target, tell)
        except UnsplittableError as refusal:
            _leave(str(refusal), options, tell)
            unwoven = plain(traced, inputs)
            return lambda *args: unwoven(*args)  # which AOTAutograd must not take for a function of one list

        def run(*args: Any) -> tuple[Any, ...]:
            return program(args)(*args)

        return run

    compiled: Callable[..., Any] = aot_autograd(fw_compiler=compile_graph)(gm, example_inputs)
    return compiled


def _programs(
    traced: fx.GraphModule,
    options: Options,
    style: Style,
    target: Device | None,
    tell: Callable[[Weaving], None],
) -> Callable[[tuple[Any, ...]], WovenProgram]:
    """The program for given inputs: one for all, or one for each size of the batch.

    A mask of every sequence has three symbolic sizes, and their product is too large to compute with.
    """

    def made(fixed: Mapping[str, int] | None) -> WovenProgram:
        program = _woven(traced, options, style, target, fixed)
        tell(Weaving(program.planner))
        return program

    try:
        for_all = made(None)
    except UnsplittableError:
        others = _sizes_beside_tokens(traced)
        if not others:
            raise
    else:
        return lambda _: for_all
    names = {place: str(symbol) for place, symbol in others.items()}
    known = functools.cache(lambda *sizes: made(dict(zip(names.values(), sizes, strict=True))))
    known(*(symbol.node.hint for symbol in others.values()))
    return lambda args: known(*(args[place] for place in names))


def _sizes_beside_tokens(gm: fx.GraphModule) -> dict[int, torch.SymInt]:
    """Inputs that are symbolic sizes, by their place, but for the one that counts the rows of messages."""
    shapes = [g.fake(n.args[0]).shape for n in gm.graph.nodes if comm.is_collective(n)]
    tokens = {str(shape[-2]) for shape in shapes if len(shape) > 1}
    inputs = [g.value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    sizes = {i: v for i, v in enumerate(inputs) if isinstance(v, torch.SymInt)}
    return {i: v for i, v in sizes.items() if str(v) not in tokens}


def _woven(
    traced: fx.GraphModule,
    options: Options,
    style: Style,
    target: Device | None,
    fixed: Mapping[str, int] | None,
) -> WovenProgram:
    group = asked_group(traced)
    if group is None and target is None:
        raise UnsplittableError("no ranks to measure the link with, and no target that has its rates")
    when = options.token_weave
    try:
        return compile_woven(traced, target, when=when, style=style, group=group, fixed=fixed)
    except UnknownDeviceError as error:
        raise OptionsError(f"option 'target': {error}") from None


@dataclass
class PackedWeaving(Weaving):
    """What became of the engine's graph; ``run`` is what computes it, woven or not."""

    run: Callable[..., tuple[Any, ...]] = field(kw_only=True)
    program: WovenProgram | None = None


_PREPARED = (64, 512, 4096)  # tokens for which segments are compiled before the first step


def weave_packed(
    gm: fx.GraphModule, token_weave: TokenWeave, whole: PiecewiseProgram, target: Device | None = None
) -> PackedWeaving:
    """The engine's graph, its packed weights materialised, woven at the batches that gain by it.

    ``whole`` computes the other batches, and everything where the graph cannot be divided. Which batches are
    woven follows from rates, which may be others in the next run: both ways give the same bits. All ranks
    call this together. Raises UnsupportedModelError for ``"always"`` and a graph that cannot be divided.
    """
    try:
        group = asked_group(gm)
        program = compile_woven(gm, target, when=token_weave, style="fixed", group=group, whole=whole)
    except UnsplittableError as refusal:
        if token_weave == "always":
            raise UnsupportedModelError(f"token_weave='always', but {refusal}") from None
        return PackedWeaving(reason=str(refusal), run=whole)

    def run(*args: Any) -> tuple[Any, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return program(*args)

    for tokens in _PREPARED:
        program.prepare(tokens)
    return PackedWeaving(planner=program.planner, run=run, program=program)


def _leave(reason: str, options: Options, tell: Callable[[Weaving], None]) -> None:
    if options.token_weave == "always":
        raise UnsupportedModelError(f"token_weave='always', but {reason}")
    _log.info("not woven: %s", reason)
    tell(Weaving(reason=reason))


def _hopeless(gm: fx.GraphModule, grad: bool) -> str | None:
    """A reason that can be seen before the graph is traced further."""
    if grad:
        return "the graph is differentiated"
    if not any(_communicates(n) for n in gm.graph.nodes):
        return _NOT_DIVIDED
    return None


def _communicates(node: fx.Node) -> bool:
    """A collective, or a DTensor, which may become one."""
    from torch.distributed.tensor import DTensor  # slow to import, and here only if weaving is asked for

    if comm.is_collective(node) or "all_reduce" in g.called(node):
        return True
    return isinstance(g.value(node), DTensor)


def asked_group(gm: fx.GraphModule) -> dist.ProcessGroup | None:
    """The group of the graph's collectives, if its ranks can be asked; None where they are simulated.

    Raises UnsplittableError for several groups, and for a group of one.
    """
    names = {comm.group_name(n) for n in gm.graph.nodes if comm.is_collective(n)}
    if len(names) != 1:
        raise UnsplittableError("its collectives belong to several groups" if names else _NOT_DIVIDED)
    group = group_of(names.pop())
    if group.size() == 1:
        raise UnsplittableError("its group has one rank")
    known: Any = dist.distributed_c10d
    return group if dist.is_initialized() and group in known._world.pg_map else None

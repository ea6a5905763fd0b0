"""Write what the compiler did to a folder: graphs before and after each pass, reports, generated code.

``LLM42_DUMP=dir`` or ``options={"dump": dir}``. Each compiled graph gets a folder of its own::

    dir/0000_plain/00_input.txt          the graph as Dynamo captured it
                   04_attention_sdpa.txt after each pass that changed something
                   report.txt            what fired, what did not and why
                   inductor_0.py         what Inductor generated, C++ kernels included
                   token_weave.txt       with that option: the plan, or why there is none; .dot: its pieces
    dir/0001_packed/program.py           the straight-line program that an engine runs; besides, as above

A folder that cannot be written is an OptionsError.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import fx

from llm42c.errors import OptionsError
from llm42c.options import Options
from llm42c.passes import graph as g
from llm42c.passes.base import Report

if TYPE_CHECKING:
    from llm42c.weave.option import Weaving


def text(graph: fx.Graph) -> str:
    """A graph, one call a line, with shapes and strides."""
    lines = []
    for node in graph.nodes:
        if node.op == "output":
            lines.append(f"return {node.args[0]}")
            continue
        shape = g.describe(g.value(node))
        module = g.where(node)
        if node.op in ("placeholder", "get_attr"):
            lines.append(f"{node.name}  # {node.op} {shape}")
        else:
            arguments = [*map(_show, node.args), *(f"{k}={_show(v)}" for k, v in node.kwargs.items())]
            lines.append(
                f"{node.name} = {_callee(node)}({', '.join(arguments)})  # {shape} {module}".rstrip()
            )
    return "\n".join(lines) + "\n"


def _show(arg: object) -> str:
    return str(arg) if isinstance(arg, (fx.Node, str, tuple, list)) else repr(arg)


def _callee(node: fx.Node) -> str:
    overload = isinstance(node.target, torch._ops.OpOverload)
    name = str(node.target).removesuffix(".default") if overload else g.called(node)
    return f".{name}" if node.op == "call_method" else name.replace("::", ".")


class Dump:
    """A folder for one compiled graph; does nothing without a directory."""

    def __init__(self, directory: str | None, label: str) -> None:
        self._folder: Path | None = None
        if directory:
            self._folder = _fresh_folder(Path(directory), label)

    @classmethod
    def for_options(cls, options: Options, label: str) -> Dump:
        """Where the option, or else the environment variable, says."""
        return cls(options.dump or os.environ.get("LLM42_DUMP") or None, label)

    def write(self, name: str, contents: str) -> None:
        if self._folder is not None:
            try:
                (self._folder / name).write_text(contents)
            except OSError as error:
                raise _unwritable(self._folder, error) from error

    def graph(self, name: str, graph: fx.Graph) -> None:
        """An observer for ``pipeline.run``."""
        if self._folder is not None:
            self.write(f"{name}.txt", text(graph))

    def report(self, report: Report) -> None:
        if self._folder is not None:
            self.write("report.txt", report.table())

    def weaving(self, found: Weaving) -> None:
        """What became of the option ``token_weave``: the plan, and its pieces for Graphviz."""
        self.write("token_weave.txt", str(found))
        if (drawing := found.drawing()) is not None:
            self.write("token_weave.dot", drawing)

    @contextlib.contextmanager
    def generated_code(self) -> Iterator[None]:
        """What Inductor generates (or takes from its cache) inside the block is written too."""
        if self._folder is None:
            yield
            return
        from torch._inductor.graph import GraphLowering

        sources: list[str] = []
        before = GraphLowering.save_output_code
        GraphLowering.save_output_code = staticmethod(sources.append)
        try:
            yield
        finally:
            GraphLowering.save_output_code = before
            for i, source in enumerate(sources):
                self.write(f"inductor_{i}.py", source)


def _unwritable(folder: Path, error: OSError) -> OptionsError:
    return OptionsError(f"LLM42_DUMP or the option dump: cannot write to {folder}: {error}")


def _fresh_folder(directory: Path, label: str) -> Path:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from error
    number = len(list(directory.iterdir()))
    while True:
        folder = directory / f"{number:04d}_{label}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder
